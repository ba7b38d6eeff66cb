"""The batch's files: what a line may be, what an earlier run has settled, what is left to ask."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import orjson
import pytest

from cache_proxy.batch import Pace, parse_rate
from cache_proxy.batch_files import Bad, Batch, Job, Settled, read_line
from cache_proxy.errors import ConfigError


def line(custom_id: object = "a", text: str = "Who wrote Hamlet?", **changes: Any) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": text}]}
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}
    return orjson.dumps(fields | changes) + b"\n"


def answer(text: str = "Shakespeare", status: int = 200) -> Settled:
    body = orjson.dumps({"text": text})
    response = b'{"status_code":%d,"request_id":null,"body":%b}' % (status, body)
    return Settled(status == 200, response)


class Files:
    """Input, output and errors of one batch, and a way to run it against known answers."""

    def __init__(self, folder: Path, *lines: bytes) -> None:
        self.input = folder / "in.jsonl"
        self.output = folder / "out.jsonl"
        self.errors = folder / "errors.jsonl"
        self.input.write_bytes(b"".join(lines))

    def open(self) -> closing[Batch]:
        return closing(Batch(self.input, self.output, self.errors))

    def run(self, settled: Settled) -> list[list[str]]:
        """Answer all that is left with this; the custom_ids that had to be asked, by request."""
        with self.open() as batch:
            asked = []
            for offsets in batch.groups():
                asked.append([batch.job(offset).custom_id for offset in offsets])
                batch.write(offsets, settled)
            return asked

    def ids(self, path: Path | None = None) -> list[str | None]:
        file = path or self.output
        lines = file.read_bytes().splitlines() if file.exists() else []
        return [orjson.loads(each)["custom_id"] for each in lines]


# Reading ------------------------------------------------------------------------------------------


def test_lines_that_ask_the_same_have_the_same_request_and_ids_of_their_own() -> None:
    """Order of keys and 1.0 for 1 are spelling; path, text and any field are not."""
    body = b'{"model":"m","temperature":1.0,"messages":[]}'
    spelt = b'{"messages":[],"temperature":1,"model":"m"}'
    form = b'{"custom_id":"%b","method":"POST","url":"/v1/%b","body":%b}'
    one, other, third, fourth = (
        read_line(form % parts)
        for parts in (
            (b"a", b"chat/completions", body),
            (b"b", b"chat/completions", spelt),
            (b"a", b"completions", body),
            (b"a", b"chat/completions", body.replace(b"1.0", b"0.9")),
        )
    )
    assert isinstance(one, Job)
    assert isinstance(other, Job)
    assert isinstance(third, Job)
    assert isinstance(fourth, Job)
    assert one.request == other.request
    assert one.id != other.id
    assert len({one.request, third.request, fourth.request}) == 3


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (b"{", "JSON"),
        (b"[1]", "object"),
        (b'{"custom_id":"a","custom_id":"b"}', "twice"),
        (line(7), "custom_id"),
        (line(""), "custom_id"),
        (line(method="GET"), "method"),
        (line(url="https://elsewhere.example/v1"), "url"),
        (line(url="/v1/a b"), "url"),
        (line(url=None), "url"),
        (line(body="text"), "body"),
        (line(body={"stream": True}), "stream"),
    ],
)
def test_a_line_that_cannot_be_asked_says_why(bad: bytes, told: str) -> None:
    """I10: a whole address in a line is refused, so nothing goes anywhere but to the sidecar."""
    read = read_line(bad)
    assert isinstance(read, Bad)
    assert told in read.message


def test_a_rate_is_a_number_per_second_minute_or_hour() -> None:
    assert [parse_rate(text) for text in ("10/s", "600/m", "1800/h", "0.5/s")] == [10, 10, 0.5, 0.5]
    for text in ("", "10", "10/d", "0/s", "-1/s", "ten/s"):
        with pytest.raises(ConfigError, match="rate"):
            parse_rate(text)


async def test_calls_start_evenly_and_what_was_not_needed_is_given_back() -> None:
    """Six starts at 50 a second take a tenth of a second; given back, no time at all."""

    async def seconds(pace: Pace, *, give_back: bool) -> float:
        started = time.monotonic()
        for _ in range(6):
            await pace.take()
            if give_back:
                pace.give_back()
        return time.monotonic() - started

    assert await seconds(Pace(50), give_back=False) >= 0.099
    assert await seconds(Pace(0.1), give_back=True) < 5
    assert await seconds(Pace(None), give_back=False) < 5


async def test_a_place_given_back_wakes_whoever_waits_for_one() -> None:
    pace = Pace(0.01)
    await pace.take()
    waiting = asyncio.create_task(pace.take())
    await asyncio.sleep(0)
    pace.give_back()
    await asyncio.wait_for(waiting, 5)


async def test_nobody_starts_while_upstream_wants_to_be_left_alone() -> None:
    pace = Pace(None)
    pace.hold(0.1)
    pace.hold(0.01)
    started = time.monotonic()
    await pace.take()
    assert time.monotonic() - started >= 0.099


# What is left -------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """Three lines, of which the first and the last ask the same."""
    return Files(tmp_path, line("a"), line("b", "Who wrote Faust?"), b"\n", line("c"))


def test_lines_that_ask_the_same_are_asked_once_and_each_has_its_answer(files: Files) -> None:
    assert files.run(answer()) == [["a", "c"], ["b"]]
    assert sorted(map(str, files.ids())) == ["a", "b", "c"]
    assert files.run(answer()) == []
    assert len(files.ids()) == 3
    assert not files.errors.exists()  # a run without errors leaves no file of them


def test_a_run_killed_at_any_byte_goes_on_without_asking_twice(files: Files) -> None:
    """Whatever part of the output there is, each line is answered once in the end, and a request
    is asked again only when none of its lines stands there whole."""
    files.run(answer())
    whole = files.output.read_bytes()
    ends = [n for n, byte in enumerate(whole) if byte == ord("\n")]
    about = {end + step for end in ends for step in (-1, 0, 1)}
    for length in sorted({*range(0, len(whole), 13), *about}):
        kept = whole[:length].count(b"\n")
        files.output.write_bytes(whole[:length])
        asked = files.run(answer())
        assert asked == {0: [["a", "c"], ["b"]], 1: [["b"]], 2: [["b"]], 3: []}[kept]
        assert sorted(map(str, files.ids())) == ["a", "b", "c"]


def test_an_answer_is_passed_to_its_twin_as_it_is(files: Files) -> None:
    """Integers beyond 64 bits and texts of any language included."""
    odd = Settled(True, '{"body":{"n":123456789012345678901234567890,"t":"Hà Nội"}}'.encode())
    files.run(odd)
    first = files.output.read_bytes().splitlines(keepends=True)[0]
    files.output.write_bytes(first)
    assert files.run(answer()) == [["b"]]
    assert files.output.read_bytes().count(odd.response) == 2


def test_failures_that_may_pass_are_asked_again_and_others_are_not(files: Files) -> None:
    """429 and 5xx pass; 400 does not; a line that has no answer in the end is in one file only."""
    for status in (429, 503):
        assert files.run(answer(status=status)) == [["a", "c"], ["b"]]
        assert sorted(map(str, files.ids(files.errors))) == ["a", "b", "c"]
    assert files.run(answer(status=400)) == [["a", "c"], ["b"]]
    assert files.run(answer()) == []
    assert sorted(map(str, files.ids(files.errors))) == ["a", "b", "c"]
    assert files.ids() == []


def test_a_request_that_was_mended_is_asked(files: Files) -> None:
    """A final error belongs to the request, not to its name."""
    files.run(answer(status=400))
    files.input.write_bytes(line("a", "Mended") + line("b", "Who wrote Faust?") + line("c"))
    assert files.run(answer()) == [["a"]]
    assert (files.ids(), sorted(map(str, files.ids(files.errors)))) == (["a"], ["b", "c"])


def test_bad_lines_are_told_by_number_and_the_others_go_on(files: Files) -> None:
    files.input.write_bytes(line("a") + b"{oops\n" + line("b", url=1))
    for _ in range(2):  # each run tells of them anew, and once
        files.run(answer())
        told = [orjson.loads(each) for each in files.errors.read_bytes().splitlines()]
        assert [(each["custom_id"], each["error"]["line"]) for each in told] == [
            (None, 2),
            ("b", 3),
        ]
        assert {each["error"]["code"] for each in told} == {"bad_line"}
    assert files.ids() == ["a"]


# What stops it before anything is asked ---------------------------------------------------------


def test_a_custom_id_given_twice_stops_it(files: Files) -> None:
    files.input.write_bytes(line("a") + line("b") + line("a", "Another"))
    with pytest.raises(ConfigError, match="lines 1 and 3 have the same custom_id"), files.open():
        pass
    assert not files.output.exists()


@pytest.mark.parametrize(
    "held", [b"notes", b"notes\n", b'{"id":"batch_req_1"}\n', b'[1]\n{"id":"batch_req_']
)
def test_a_file_that_is_no_output_is_left_as_it_is(files: Files, held: bytes) -> None:
    """Somebody else's file, named by mistake, loses no byte."""
    files.output.write_bytes(held)
    with pytest.raises(ConfigError, match="line 1 is no answer of a batch"), files.open():
        pass
    assert files.output.read_bytes() == held


def test_an_output_of_another_input_is_not_taken_for_this_ones(files: Files) -> None:
    """A custom_id may be used again; an answer to another question is not its answer."""
    files.run(answer())
    files.input.write_bytes(line("a", "Another question"))
    with pytest.raises(ConfigError, match="another request under the custom_id of line 1"):
        files.open()


def test_two_runs_cannot_write_one_output(files: Files) -> None:
    with files.open(), pytest.raises(ConfigError, match="another batch"):
        files.open()
    with files.open():
        pass


def test_input_output_and_errors_are_three_files(files: Files) -> None:
    with pytest.raises(ConfigError, match="three files"):
        Batch(files.input, files.input, files.errors)
    with pytest.raises(ConfigError, match="cannot be read"):
        Batch(files.input / "no", files.output, files.errors)
    with pytest.raises(ConfigError, match="cannot be written"):
        Batch(files.input, files.input.parent / "no" / "out", files.errors)


# Pipes and devices --------------------------------------------------------------------------------


def test_requests_may_come_out_of_a_pipe(tmp_path: Path) -> None:
    """They are read more than once, which a pipe cannot do: a file without a name can."""
    files = Files(tmp_path)
    files.input.unlink()
    os.mkfifo(files.input)

    def feed() -> None:
        files.input.write_bytes(line("a") + line("b") + line("c", "Who wrote Faust?"))

    for asked in ([["a", "b"], ["c"]], []):
        feeding = threading.Thread(target=feed)
        feeding.start()
        assert files.run(answer()) == asked
        feeding.join()
    assert files.ids() == ["a", "b", "c"]


@pytest.mark.parametrize("which", ["output", "errors"])
def test_answers_go_into_files_alone(tmp_path: Path, which: str) -> None:
    """What is no file cannot be read back by the next run, and is not for us to take away."""
    files = Files(tmp_path, line())
    path: Path = getattr(files, which)
    os.mkfifo(path)
    with pytest.raises(ConfigError, match="is no file"):
        files.open()
    assert path.is_fifo()


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    """Nothing but the run's own files is taken away or put in another's place."""
    files = Files(tmp_path, line())
    for link in (files.output, files.errors):
        link.symlink_to(tmp_path / f"{link.name}.target")
    with files.open():
        assert files.errors.stat().st_size == 0
    assert files.output.is_symlink()
    assert files.errors.is_symlink()
