"""`cache-proxy bench` on real sockets: its times are the upstream's, and its prompts are new."""

from __future__ import annotations

import asyncio
import io
import signal
import statistics
import time
from dataclasses import replace
from itertools import groupby
from typing import Any

import orjson
import pytest
from rich.console import Console

from cache_proxy.bench import Arm, Measured, Plan, measure, report
from cache_proxy.errors import ConfigError
from cache_proxy.pricing import PriceBook
from tests.conftest import WorldMaker
from tests.scripted import Reply, Seen, echo, scripted_upstream, streamed
from tests.served import command, until
from tests.stopwatch import of_three

pytestmark = pytest.mark.live

KEY = "sk-bench-secret"
NOWHERE = "http://127.0.0.1:9/v1"  # the discard port: nobody listens there


def plan(direct: str, *models: str, proxy: str = "", **changes: Any) -> Plan:
    vias = ("proxy", "direct") if proxy else ("direct",)
    made = Plan(
        arms=tuple(Arm(model, via) for model in models for via in vias),
        bases={"direct": direct, "proxy": proxy},
        requests=20,
        concurrency=4,
        prompt_tokens=100,
        max_tokens=16,
        stream=False,
        cached=False,
    )
    return replace(made, **changes)


async def measured(asked: Plan) -> Measured:
    return await measure(asked, KEY, Console(file=io.StringIO()))


def arms(of: Measured) -> list[dict[str, Any]]:
    prices = PriceBook(overrides=(), clock=lambda: 1_790_000_000.0)
    found: list[dict[str, Any]] = report(of, prices, "https://api.openai.com/v1")["arms"]
    return found


def asked(seen: list[Seen]) -> list[Seen]:
    """All but the questions that open connections."""
    return [each for each in seen if each.method == "POST"]


@of_three
async def test_times_are_those_that_upstream_took() -> None:
    """Of two models at once, the median of each within 5 %, and requests a second with it."""
    took: dict[str, list[float]] = {"quick": [], "slow": []}

    async def script(seen: Seen) -> Reply:
        if seen.method == "POST":
            began = time.perf_counter()
            await asyncio.sleep({"quick": 0.5, "slow": 1.0}[seen.json["model"]])
            took[seen.json["model"]].append(time.perf_counter() - began)
        return echo(seen)

    async with scripted_upstream() as upstream:
        upstream.script = script
        of = await measured(plan(upstream.base_url, "quick", "slow"))
    for arm, times in zip(arms(of), took.values(), strict=True):
        seconds = statistics.median(times)
        assert (arm["good"], arm["error_rate"]) == (20, 0.0)
        assert seconds * 1_000 <= arm["ms"]["p50"] <= seconds * 1_000 * 1.05
        assert arm["requests_per_second"] == pytest.approx(4 / statistics.fmean(times), rel=0.1)


@of_three
async def test_a_stream_is_timed_to_its_first_text_and_to_its_end() -> None:
    """The role chunk that comes first says nothing yet."""

    def script(seen: Seen) -> Reply:
        if seen.method != "POST":
            return echo(seen)
        reply = streamed("four words of text", seen)
        reply.pause = 0.1  # after each of: the role, four words, the end, the usage, [DONE]
        return reply

    async with scripted_upstream() as upstream:
        upstream.script = script
        of = await measured(plan(upstream.base_url, "gpt-4o-mini", stream=True, requests=8))
        (arm,) = arms(of)
    assert arm["good"] == 8
    assert 100 <= arm["first_token_ms"]["p50"] <= 150
    assert 700 <= arm["ms"]["p50"] <= 900
    assert arm["tokens"]["output"] == 8 * 7
    assert arm["usd"] > 0


async def test_arms_take_turns_with_new_prompts_and_a_warm_up_beside() -> None:
    """What upstream saw: each model once beforehand, then a turn each; no prompt twice, and all of
    them about as long as was asked for."""
    async with scripted_upstream() as upstream:
        of = await measured(plan(upstream.base_url, "a", "b", prompt_tokens=500))
        seen = asked(upstream.seen)
        assert {each.key for each in upstream.seen} == {KEY}
        assert {each.path for each in upstream.seen if each.method == "GET"} == {"/v1/models"}
        assert not [each for each in seen if any("x-cache" in name for name in each.headers)]
    assert len(of.shots) == 40
    assert len(seen) == 42
    assert [each.json["model"] for each in seen[:2]] == ["a", "b"]
    runs = [len(list(run)) for _, run in groupby(each.json["model"] for each in seen[2:])]
    assert max(runs) <= 8 + 3  # two turns where rounds meet, and three workers ahead of the fourth
    prompts = [each.json["messages"][0]["content"] for each in seen]
    assert len(set(prompts)) == 42
    words = [" ".join(m["content"] for m in each.json["messages"]).split() for each in seen]
    assert {480 <= len(each) <= 500 for each in words} == {True}


async def test_the_cache_answers_only_when_hits_are_what_is_measured(
    make_world: WorldMaker,
) -> None:
    """Through the sidecar: new prompts are all misses, however alike; one prompt is all hits."""
    async with make_world() as world:
        upstream = world.upstream
        fresh = plan(upstream.base_url, "gpt-4o-mini", proxy=world.base, prompt_tokens=60)
        of = await measured(fresh)
        assert [(arm["via"], arm["hits"]) for arm in arms(of)] == [("proxy", 0), ("direct", 0)]
        assert [arm["good"] for arm in arms(of)] == [20, 20]

        before = upstream.calls
        of = await measured(replace(fresh, cached=True))
        proxy, direct = arms(of)
        assert (proxy["hits"], proxy["usd"]) == (20, 0)
        assert (direct["hits"], direct["good"]) == (0, 20)
        assert len(asked(upstream.seen[before:])) <= 20 + 1 + 5


async def test_errors_are_counted_by_kind_and_spoil_no_figure() -> None:
    async def script(seen: Seen) -> Reply:
        model = seen.json["model"] if seen.method == "POST" else ""
        match model:
            case "limited":
                return Reply(429, (b"{}",))
            case "broken":
                return Reply(200, (b"{",), cut=True)
            case "empty":
                return Reply(200, (b'{"choices": []}',))
            case "odd":
                return Reply(200, (b"[]",))
        return echo(seen)

    async with scripted_upstream() as upstream:
        upstream.script = script
        models = ("limited", "broken", "empty", "odd", "good")
        of = await measured(plan(upstream.base_url, *models, requests=4))
    errors = [arm["errors"] for arm in arms(of)]
    assert errors == [{"429": 4}, {"no_answer": 4}, {"unfinished": 4}, {"unreadable": 4}, {}]
    assert [arm["ms"]["p50"] is None for arm in arms(of)] == [True] * 4 + [False]


async def test_a_stream_without_its_end_is_an_error() -> None:
    async with scripted_upstream() as upstream:
        upstream.script = lambda seen: (
            streamed("some text", seen, done=False) if seen.method == "POST" else echo(seen)
        )
        of = await measured(plan(upstream.base_url, "m", stream=True, requests=4))
    assert arms(of)[0]["errors"] == {"unfinished": 4}


async def test_nobody_there_is_said_before_anything_is_measured() -> None:
    with pytest.raises(ConfigError, match="cannot be measured: Nobody answers"):
        await measured(plan(NOWHERE, "m"))


async def test_the_command_prints_what_was_measured_and_no_key() -> None:
    """JSON by the documented names; a bad --via is one sentence."""
    async with scripted_upstream() as upstream:
        flags = ("--direct-url", upstream.base_url, "--requests", "4", "--concurrency", "2")
        ran = await command(
            *("bench", "--models", "gpt-4o-mini", "--via", "direct", "--json", *flags),
            OPENAI_API_KEY=KEY,
        )
    assert (ran.code, ran.err) == (0, "")
    assert KEY not in ran.out
    told = orjson.loads(ran.out)
    assert (told["concurrency"], told["interrupted"], told["cached"]) == (2, False, False)
    assert told["arms"][0]["good"] == 4
    assert told["prices_as_of"]


async def test_interrupted_it_tells_what_it_has() -> None:
    """SIGINT ends the waiting at once, and the shots so far are kept."""
    async with scripted_upstream() as upstream:
        waiting = asyncio.Event()

        async def script(seen: Seen) -> Reply:
            if seen.number > 20:
                waiting.set()
                await seen.ended.wait()
            return echo(seen)

        upstream.script = script
        asking = asyncio.create_task(measured(plan(upstream.base_url, "m", requests=100)))
        await asyncio.wait_for(waiting.wait(), 60)
        signal.raise_signal(signal.SIGINT)
        of = await asyncio.wait_for(asking, 60)
        await until(lambda: all(each.aborted_at for each in upstream.seen[20:]))
    assert of.interrupted
    (arm,) = arms(of)
    assert arm["good"] == arm["requests"] == 15  # of 20, four opened connections and one warmed up
