"""`cache-proxy batch` before a real sidecar: killed, interrupted, told to wait, refused."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import orjson
import pytest

from cache_proxy.batch import Pace, Run
from cache_proxy.batch_files import Batch, Tally
from cache_proxy.caller import Caller
from cache_proxy.errors import ConfigError
from cache_proxy.pricing import PriceBook
from tests.conftest import WorldMaker
from tests.scripted import Reply, Seen, echo, scripted_upstream
from tests.served import command, until
from tests.stopwatch import awake, of_three

pytestmark = pytest.mark.live

KEY = "sk-batch-secret"
NOWHERE = "http://127.0.0.1:9/v1"  # the discard port: nobody listens there


def write(path: Path, questions: list[str], **fields: Any) -> Path:
    """One line a question, "r0" the first."""
    with path.open("wb") as file:
        for n, question in enumerate(questions):
            body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": question}]}
            line = {"custom_id": f"r{n}", "method": "POST", "url": "/v1/chat/completions"}
            file.write(orjson.dumps(line | {"body": body | fields}) + b"\n")
    return path


def answers(path: Path) -> dict[str, Any]:
    """The output by custom_id; no custom_id stands there twice."""
    lines = [orjson.loads(each) for each in path.read_bytes().splitlines()]
    assert len({each["custom_id"] for each in lines}) == len(lines)
    return {each["custom_id"]: each for each in lines}


def said(line: dict[str, Any]) -> str:
    return str(line["response"]["body"]["choices"][0]["message"]["content"])


async def ask_all(base: str, folder: Path, pace: Pace | None = None, concurrency: int = 4) -> Tally:
    """A run in this process, without screen and signals, from in.jsonl to out.jsonl."""
    files = (folder / "in.jsonl", folder / "out.jsonl", folder / "errors.jsonl")
    with closing(Batch(*files)) as batch:
        work = Run(
            batch,
            base=base,
            pace=pace or Pace(None),
            prices=PriceBook(overrides=(), clock=time.time),
            seller="https://api.openai.com/v1",
            dice=lambda: 0.01,
        )
        await work.all([Caller(base, KEY) for _ in range(concurrency)], asyncio.Event())
        return batch.tally


# What the command does once it has read its flags, without the second that importing those takes.
PROGRAM = """
import sys, time
from pathlib import Path
from rich.console import Console
from cache_proxy.batch import run
from cache_proxy.batch_files import Batch
from cache_proxy.pricing import PriceBook
base, folder, concurrency = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
batch = Batch(folder / "in.jsonl", folder / "out.jsonl", folder / "errors.jsonl")
prices = PriceBook(overrides=(), clock=time.time)
asked = {"base": base, "key": "sk-batch-secret", "concurrency": concurrency, "rate": None}
sys.exit(run(batch, Console(), prices=prices, seller="", **asked))
"""


async def started(base: str, folder: Path, concurrency: int) -> Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PROGRAM, base, str(folder), str(concurrency)),
        stdout=PIPE,
        stderr=PIPE,
    )


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Exactly once -----------------------------------------------------------------------------------


async def test_a_batch_killed_again_and_again_answers_each_line_once(
    make_world: WorldMaker, tmp_path: Path
) -> None:
    """1,500 lines of 1,000 questions, six times kill -9: every line has its own answer, once, and
    upstream was asked once for each question, calls in flight at a kill aside."""
    kills, concurrency = 6, 20
    questions = [f"question {n % 1000}" for n in range(1500)]
    write(tmp_path / "in.jsonl", questions)
    output = tmp_path / "out.jsonl"
    async with make_world(model="none") as world:
        for _ in range(kills):
            process = await started(world.base, tmp_path, concurrency)
            enough = lines_in(output) + 1500 // (kills + 2)
            await until(lambda: lines_in(output) >= enough, 90)  # noqa: B023  # waited for here
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        process = await started(world.base, tmp_path, concurrency)
        out, err = await process.communicate()
        assert process.returncode == 0, err
        assert b"1,500 of 1,500 lines answered" in out
        found = answers(output)
        assert len(found) == 1500
        for n, question in enumerate(questions):
            assert f"<{question}>" in said(found[f"r{n}"])
        times = Counter(seen.text for seen in world.upstream.seen)
        assert times.keys() == set(questions)
        assert sum(times.values()) - 1000 <= kills * concurrency


async def test_what_may_not_be_cached_is_asked_once_all_the_same(
    make_world: WorldMaker, tmp_path: Path
) -> None:
    """Lines that ask the same share an answer by the batch's own doing, in this run and the next;
    a second batch is served by the cache, which no rate slows down."""
    write(tmp_path / "in.jsonl", ["the same"] * 5, temperature=1.9)
    async with make_world(model="none") as world:
        tally = await ask_all(world.base, tmp_path)
        assert (world.upstream.calls, tally.asked, tally.answered, tally.copied) == (1, 1, 5, 4)

        questions = [f"question {n}" for n in range(40)]
        for folder, hits in ((tmp_path / "first", 0), (tmp_path / "again", 40)):
            folder.mkdir()
            write(folder / "in.jsonl", questions)
            begun = awake()
            tally = await ask_all(world.base, folder, Pace(1000 if hits == 0 else 0.5))
            assert awake() - begun < 20
            assert (tally.answered, tally.hits) == (40, hits)
            assert (tally.nano_usd == 0) == (hits == 40)
        assert world.upstream.calls == 41
        assert {seen.key for seen in world.upstream.seen} == {KEY}


async def test_an_interrupted_run_ends_cleanly_and_goes_on_later(tmp_path: Path) -> None:
    """SIGINT: nothing new is asked, what is in flight is written, exit 130 says how to go on."""
    write(tmp_path / "in.jsonl", [f"question {n}" for n in range(12)])
    async with scripted_upstream() as upstream:

        async def slow(seen: Seen) -> Reply:
            await asyncio.sleep(2.0)
            return echo(seen)

        upstream.script = slow
        process = await started(upstream.base_url, tmp_path, 4)
        await until(lambda: upstream.calls == 4)
        process.send_signal(signal.SIGINT)
        out, err = await asyncio.wait_for(process.communicate(), 60)
        assert process.returncode == 130
        assert b"the same command goes on from here" in out
        assert KEY.encode() not in out + err
        assert upstream.calls == len(answers(tmp_path / "out.jsonl")) == 4

        upstream.script = echo
        tally = await ask_all(upstream.base_url, tmp_path)
        assert (tally.before, tally.answered, upstream.calls) == (4, 8, 12)


async def test_an_interrupted_run_does_not_sit_out_its_waits(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["one", "two"])
    async with scripted_upstream() as upstream:
        upstream.script = lambda _: Reply(429, (b"{}",), (("retry-after", "60"),))
        files = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "errors.jsonl"))
        with closing(Batch(*files)) as batch:
            work = Run(
                batch,
                base=upstream.base_url,
                pace=Pace(None),
                prices=PriceBook(overrides=(), clock=time.time),
                seller="",
                dice=lambda: 0.01,
            )
            stop = asyncio.Event()
            callers = [Caller(upstream.base_url, KEY) for _ in range(2)]
            running = asyncio.create_task(work.all(callers, stop))
            await until(lambda: upstream.calls == 2)
            await asyncio.sleep(0.1)
            stop.set()
            await asyncio.wait_for(running, 30)
            assert batch.tally.done == 0


# Trouble ----------------------------------------------------------------------------------------


@of_three
async def test_nobody_asks_within_a_window_that_upstream_named(tmp_path: Path) -> None:
    """After a 429 with Retry-After no line is asked before its end, be it that one or another; what
    is on its way just then aside."""
    folder = Path(mkdtemp(dir=tmp_path))
    write(folder / "in.jsonl", [f"question {n}" for n in range(12)])
    moments: list[tuple[float, bool]] = []

    def script(seen: Seen) -> Reply:
        refused = len(moments) in (3, 7)
        moments.append((time.monotonic(), refused))
        return Reply(429, (b"{}",), (("retry-after-ms", "900"),)) if refused else echo(seen)

    async with scripted_upstream() as upstream:
        upstream.script = script
        tally = await ask_all(upstream.base_url, folder, Pace(20), concurrency=3)
    assert (tally.answered, tally.failed, len(moments)) == (12, 0, 14)
    for start in (moment for moment, refused in moments if refused):
        assert not [moment for moment, _ in moments if 0.3 < moment - start < 0.89]


def failing(status: int, **headers: str) -> Callable[[Seen], Reply]:
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda _: Reply(status, (b'{"error": {\n "message": "no"}}',), named)


@pytest.mark.parametrize(
    ("script", "times"),
    [
        (failing(400), 1),
        (failing(503, x_should_retry="false"), 1),
        (failing(429, retry_after="86400"), 1),
        (failing(503, retry_after_ms="5"), 5),
        (lambda _: Reply(200, (b"<html>",)), 1),
        (lambda _: Reply(200, (b"{",), cut=True), 5),
    ],
    ids=["final", "sidecar gave up", "too long", "until the last attempt", "no json", "cut"],
)
async def test_what_fails_is_told_in_the_errors_file_after_bounded_attempts(
    tmp_path: Path, script: Callable[[Seen], Reply], times: int
) -> None:
    """One line there, none in the output, and its response is upstream's own."""
    write(tmp_path / "in.jsonl", ["one"])
    async with scripted_upstream() as upstream:
        upstream.script = script
        tally = await ask_all(upstream.base_url, tmp_path)
        assert (tally.failed, tally.answered, upstream.calls) == (1, 0, times)
        told = answers(tmp_path / "errors.jsonl")["r0"]
        if told["response"] is None:
            assert told["error"]["code"] in ("no_answer", "unreadable_answer")
        else:
            assert told["response"]["body"] == {"error": {"message": "no"}}
        assert not (tmp_path / "out.jsonl").exists()


async def test_a_refused_key_stops_the_run_and_spoils_nothing(tmp_path: Path) -> None:
    """A 401 is about the key, not about the line: no line is given up for it."""
    write(tmp_path / "in.jsonl", [f"question {n}" for n in range(50)])
    async with scripted_upstream() as upstream:
        upstream.script = failing(401)
        with pytest.raises(ConfigError, match="key was refused") as told:
            await ask_all(upstream.base_url, tmp_path)
        assert KEY not in str(told.value)
        assert upstream.calls <= 4
        upstream.script = echo
        tally = await ask_all(upstream.base_url, tmp_path)
    assert (tally.answered, tally.failed) == (50, 0)


async def test_a_slash_at_the_end_of_the_address_says_nothing(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["one"])
    async with scripted_upstream() as upstream:
        assert (await ask_all(upstream.base_url + "/", tmp_path)).answered == 1
        assert upstream.seen[0].path == "/v1/chat/completions"


async def test_a_sidecar_that_goes_away_costs_no_line(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["one", "two"])
    with pytest.raises(ConfigError, match="has gone"):
        await ask_all(NOWHERE, tmp_path)
    assert not (tmp_path / "out.jsonl").exists()
    assert not (tmp_path / "errors.jsonl").exists()


async def test_without_a_sidecar_it_says_how_to_start_one(tmp_path: Path) -> None:
    write(tmp_path / "in.jsonl", ["one"])
    ran = await command(
        "batch", str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), "--url", NOWHERE
    )
    assert (ran.code, ran.out) == (2, "")
    assert f"no sidecar answers at {NOWHERE}; start one with: cache-proxy serve" in ran.err
