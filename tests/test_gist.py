"""What a prompt says is read once and kept with its answer."""

from __future__ import annotations

import pytest

from benchmarks.pairs import TUNING_FILES, load
from cache_proxy import decisions
from cache_proxy.gist import LONGEST, gist, unpack
from cache_proxy.guards import facts
from cache_proxy.model import Candidate, Directives, Entry, Hit, Miss, Policy
from tests.conftest import World
from tests.test_codec import ENTRY

ODD = [
    'Don\'t use `a.b()` in ```py\nx = 1\n``` but https://x.y/z?q=1 or "this one"!',
    "Who painted the Mona Lisa, and when: 1503 or 1.5k years later, at 7am?",
    "Đừng tắt chế độ tối trên iPhone 14 Pro, bật nó lúc 21:30 cho tôi",
    "?",
]


def test_what_is_kept_comes_back_as_it_was_read() -> None:
    """Field by field, whatever the prompt holds; a guard must not see a difference."""
    texts = ODD + [text for name in TUNING_FILES for pair in load(name) for text in pair[:2]]
    assert [text for text in texts if unpack(gist(text)) != facts(text)] == []


def test_what_other_rules_read_is_read_anew() -> None:
    """Facts of two versions of the word lists must not be compared."""
    kept = gist(ODD[0])
    assert unpack("0" * 16 + kept[16:]) is None
    assert unpack("") is None


def test_a_prompt_that_is_hardly_ever_matched_is_not_kept() -> None:
    """Bytes of the store are for answers."""
    assert gist("") == ""
    assert gist("word " * (LONGEST // 5 + 1)) == ""


@pytest.mark.parametrize("kept", ["whole", "none", "foreign"])
def test_the_verdict_does_not_depend_on_what_was_kept(kept: str) -> None:
    """I1: an entry of an older version is judged as one that was stored now."""

    def said(stored: str, asked: str) -> Hit | Miss:
        gists = {"whole": gist(stored), "none": "", "foreign": "f" * 16 + gist(stored)[16:]}
        entry = Entry(
            **{name: getattr(ENTRY, name) for name in ENTRY.__slots__}
            | {"text": stored, "gist": gists[kept]}
        )
        return decisions.choose(asked, [Candidate(entry, 0.97)], Directives(), Policy(), 0)

    assert isinstance(said("Turn on dark mode", "Please turn on dark mode"), Hit)
    assert said("Turn on dark mode", "Turn off dark mode").vetoes == ("antonyms",)


@pytest.mark.live
async def test_it_is_stored_with_the_entry(world: World) -> None:
    """By whoever stored it, for every sidecar that reads it."""
    asked = "What is the capital of France?"
    await world.ask(asked)
    entry = (await world.ask(asked)).headers["x-cache-entry"]
    (found,) = await world.sidecar.memory.fetch([bytes.fromhex(entry)])
    assert found is not None
    assert unpack(found.gist) == facts(asked)
