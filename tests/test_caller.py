"""A connection of one's own: what it takes for an address, and how it says that it is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cache_proxy.caller import Caller, listens
from cache_proxy.errors import ConfigError
from tests.served import command

PLAIN = "url: is an http or https base URL without a query or a password, such as"


@pytest.mark.parametrize(
    "base",
    [
        "",
        "127.0.0.1:8080/v1",
        "ftp://127.0.0.1/v1",
        "http://",
        "http://127.0.0.1:99999/v1",
        "http://127.0.0.1:port/v1",
        "http://127.0.0.1:0/v1",
        "http://[::1/v1",
        "http://user:sk-secret@127.0.0.1/v1",
        "http://127.0.0.1/v1?key=sk-secret",
        "http://127.0.0.1/v 1",
        "http://127.0.0.1/v1\r\nX-Other: 1",
        "http://hôte/v1",
    ],
)
def test_what_is_no_address_is_told_in_one_sentence(base: str) -> None:
    """I9: without what stands in it."""
    with pytest.raises(ConfigError, match=f"^{PLAIN}") as told:
        Caller(base, "")
    assert "secret" not in str(told.value)


@pytest.mark.parametrize("host", ["a..b", "x" * 70, "[::1]:9"])
async def test_at_an_address_that_cannot_be_nobody_listens(host: str) -> None:
    assert not await listens(f"http://{host}/v1")


@pytest.mark.live
@pytest.mark.parametrize(
    "words",
    [
        ("batch", "in.jsonl", "out.jsonl", "--url"),
        ("bench", "--models", "m", "--via", "proxy", "--proxy-url"),
    ],
    ids=["batch", "bench"],
)
async def test_the_commands_say_it_in_one_line_and_exit_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """No traceback, and no files left behind."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_text("")
    ran = await command(*words, "http://127.0.0.1:99999/v1")
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert PLAIN in ran.err
    assert os.listdir(tmp_path) == ["in.jsonl"]
