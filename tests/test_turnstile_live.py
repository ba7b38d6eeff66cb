"""The queue before a provider that takes only so many at once, as clients see it."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import Any

import pytest

from cache_proxy.proxy import Proxy
from tests.conftest import World, WorldMaker
from tests.rawhttp import Line, chat, post
from tests.scripted import Reply, ScriptedUpstream, Seen, echo, scripted_upstream
from tests.stopwatch import of_three

pytestmark = pytest.mark.live


class Gated:
    """An upstream whose answers come when the test says so."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self.upstream = upstream
        self.gate = asyncio.Event()
        upstream.script = self

    async def __call__(self, seen: Seen) -> Reply:
        await self.gate.wait()
        return echo(seen)

    @property
    def texts(self) -> list[str]:
        return [seen.text for seen in self.upstream.seen]


def limited(upstream: ScriptedUpstream, **limits: Any) -> dict[str, Any]:
    """A provider with limits, as settings."""
    table = {"base_url": upstream.base_url, "models": ["*"], **limits}
    return {"providers": {"one": table}, "upstream": upstream.base_url}


async def queued(world: World, number: int) -> None:
    """So many wait for a place at the one provider that has limits."""
    proxy: Proxy = world.sidecar.app._handlers["chat"].__self__  # type: ignore[attr-defined]
    gate = proxy.parts.relay._attempts._turnstiles["one"]
    await world.until(lambda: gate.waiting == number)


def at(priority: str) -> dict[str, str]:
    return {"X-Priority": priority}


async def test_critical_overtakes_and_best_effort_is_turned_away(make_world: WorldMaker) -> None:
    """One at a time: of those that wait the critical one goes first; a best_effort one that has
    waited for its target gets a quick 503 that says when to come again, and costs no call."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        made = make_world(
            **limited(upstream, max_concurrency=1), priorities={"best_effort": {"target_ms": 300}}
        )
        world = await stack.enter_async_context(made)
        gated = Gated(upstream)
        first = asyncio.create_task(world.ask("the first"))
        await world.until(lambda: gated.texts == ["the first"])
        normal = [asyncio.create_task(world.ask(f"normal {n}")) for n in range(3)]
        shed = await world.ask("background", headers=at("best_effort"))
        critical = asyncio.create_task(world.ask("critical", headers=at("Critical")))
        typo = asyncio.create_task(world.ask("typo", headers=at("urgent!")))
        await queued(world, 5)
        gated.gate.set()
        answers = await asyncio.gather(first, *normal, critical, typo)
        told = await world.stats("priority")

    assert (shed.status, shed.reason) == (503, "shed")
    assert int(shed.headers["retry-after"]) >= 1
    assert "x-should-retry" not in shed.headers  # nobody has tried yet
    assert shed.json["error"]["message"]
    assert [answer.status for answer in answers] == [200] * 6
    assert gated.texts[:2] == ["the first", "critical"]
    assert sorted(gated.texts[2:]) == ["normal 0", "normal 1", "normal 2", "typo"]
    assert not any("x-priority" in seen.headers for seen in upstream.seen)
    assert told["errors"] == told["upstream_attempts"]["shed"] == 1
    assert told["upstream_attempts"]["calls"] == len(upstream.seen)
    rows = {row["priority"]: row for row in told["by"] if row["model"] is None}
    assert [(name, row["requests"]) for name, row in rows.items()] == [
        ("critical", 1),
        ("normal", 5),
        ("best_effort", 1),
    ]
    assert (rows["best_effort"]["target_ms"], rows["best_effort"]["share_within"]) == (300, 0.0)


async def test_a_stream_holds_its_place_to_its_end(make_world: WorldMaker) -> None:
    """I8: a place is held while bytes come, and given back when the client hangs up."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        world = await stack.enter_async_context(make_world(**limited(upstream, max_concurrency=1)))

        def slowly(seen: Seen) -> Reply:
            reply = echo(seen)
            reply.pause = 5.0 if seen.json.get("stream") else 0.0
            return reply

        upstream.script = slowly
        async with Line(world.base) as line:
            line.send(post(chat("a long stream of many words to be cut short", stream=True)))
            await line.head()
            after = asyncio.create_task(world.ask("the next"))
            await asyncio.sleep(0.1)
            assert len(upstream.seen) == 1
            line.hang_up()
            assert (await asyncio.wait_for(after, 60)).status == 200
        assert upstream.seen[0].aborted_at is not None


async def test_who_hangs_up_while_waiting_is_out_of_the_queue(make_world: WorldMaker) -> None:
    """I8: nothing is asked for them, and those behind them move up."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        world = await stack.enter_async_context(make_world(**limited(upstream, max_concurrency=1)))
        gated = Gated(upstream)
        first = asyncio.create_task(world.ask("the first"))
        await world.until(lambda: gated.texts == ["the first"])
        lines = [await stack.enter_async_context(Line(world.base)) for _ in range(5)]
        for number, line in enumerate(lines):
            line.send(post(chat(f"gone {number}")))
        await queued(world, 5)
        last = asyncio.create_task(world.ask("the last"))
        await queued(world, 6)
        for line in lines:
            line.hang_up()

        async def counted() -> bool:
            return bool((await world.stats())["requests"] == 5)

        await world.until(counted)
        gated.gate.set()
        assert [each.status for each in await asyncio.gather(first, last)] == [200, 200]
        assert gated.texts == ["the first", "the last"]


async def test_hits_need_no_place(make_world: WorldMaker) -> None:
    """A provider that is full to the brim keeps nobody from an answer that is kept here."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        world = await stack.enter_async_context(make_world(**limited(upstream, max_concurrency=1)))
        await world.ask("What is the capital of France?")
        gated = Gated(upstream)
        busy = asyncio.create_task(world.ask("Something else entirely"))
        await world.until(lambda: len(gated.texts) == 2)
        hit = await asyncio.wait_for(
            world.ask("What is the capital of France?", headers=at("best_effort")), 60
        )
        assert hit.kind == "HIT"
        gated.gate.set()
        assert (await busy).status == 200


@of_three
async def test_one_question_in_two_classes_does_not_wait_for_the_lighter(
    make_world: WorldMaker,
) -> None:
    """A critical request never shares the fate of a best_effort call that waits in the queue."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        made = make_world(
            **limited(upstream, max_concurrency=1), priorities={"best_effort": {"target_ms": 200}}
        )
        world = await stack.enter_async_context(made)
        gated = Gated(upstream)
        first = asyncio.create_task(world.ask("the first"))
        await world.until(lambda: gated.texts == ["the first"])
        light = asyncio.create_task(world.ask("the same", headers=at("best_effort")))
        await queued(world, 1)
        heavy = asyncio.create_task(world.ask("the same", headers=at("critical")))
        assert (await light).status == 503
        gated.gate.set()
        assert [each.status for each in await asyncio.gather(first, heavy)] == [200, 200]


@of_three
async def test_the_rate_is_kept(make_world: WorldMaker) -> None:
    """Five a second: nine calls take 0.8 seconds at least, whatever comes at once, and those that
    are passed through count; lists and look-ups neither count nor wait."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        world = await stack.enter_async_context(make_world(**limited(upstream, rate="5/s")))
        loop = asyncio.get_running_loop()
        body = b'{"model": "gpt-4o-mini", "input": "x"}'
        named = {"content-type": "application/json", "authorization": "Bearer sk-one"}
        began = loop.time()
        calls = [
            *(asyncio.create_task(world.ask(f"question {number}")) for number in range(4)),
            *(
                asyncio.create_task(world.send("POST", "/v1/moderations", body, named))
                for _ in range(5)
            ),
        ]
        await world.until(lambda: len(upstream.seen) >= 5)
        for _ in range(3):
            assert (await world.send("GET", "/one/v1/files", None, named)).status == 200
        assert not all(call.done() for call in calls)
        await asyncio.gather(*calls)
        assert loop.time() - began >= 4 / 5 - 0.01
        assert (await world.stats())["upstream_attempts"]["calls"] == len(upstream.seen) == 12


async def test_without_limits_nobody_is_classed_and_nobody_waits(world: World) -> None:
    """Nothing configured, nothing counted; and who names a class is measured all the same."""
    await world.ask("What is the capital of France?")
    assert (await world.stats("priority"))["by"] == []
    await world.ask("What is the capital of France?", headers=at("critical"))
    first, second = (await world.stats("priority"))["by"]
    assert (first["priority"], first["model"], first["requests"]) == ("critical", None, 1)
    assert (second["model"], second["share_within"]) == ("gpt-4o-mini", first["share_within"])


@of_three
async def test_passed_through_ones_queue_and_are_measured_too(make_world: WorldMaker) -> None:
    """Whatever protocol they speak: turned away with the provider's limit, counted in their class,
    and the header stays here."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        made = make_world(
            **limited(upstream, max_concurrency=1), priorities={"best_effort": {"target_ms": 400}}
        )
        world = await stack.enter_async_context(made)
        gated = Gated(upstream)
        first = asyncio.create_task(world.ask("the first"))
        await world.until(lambda: gated.texts == ["the first"])
        body = b'{"model": "gpt-4o-mini", "input": "x"}'
        named = {"content-type": "application/json", **at("best_effort")}
        shed = await world.send("POST", "/v1/moderations", body, named)
        assert (shed.status, shed.reason) == (503, "shed")
        assert int(shed.headers["retry-after"]) >= 1
        gated.gate.set()
        await first
        assert (await world.send("POST", "/v1/moderations", body, named)).status == 200
        assert "x-priority" not in upstream.seen[-1].headers
        rows = (await world.stats("priority"))["by"]
    (row,) = [row for row in rows if row["priority"] == "best_effort" and row["model"] is None]
    assert (row["requests"], row["share_within"]) == (2, 0.5)


async def test_a_crowded_provider_serves_critical_ones_first(make_world: WorldMaker) -> None:
    """Four at a time and three times as many asked for: critical ones begin sooner than normal
    ones, these sooner than best_effort, and each class has its share."""
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(scripted_upstream())
        made = make_world(
            **limited(upstream, max_concurrency=4),
            priorities={"best_effort": {"target_ms": 60_000}},
        )
        world = await stack.enter_async_context(made)

        def slowly(seen: Seen) -> Reply:
            reply = echo(seen)
            reply.delay = 0.05
            return reply

        upstream.script = slowly
        dice = random.Random(3)
        names = ["critical"] * 30 + ["normal"] * 30 + ["best_effort"] * 30
        dice.shuffle(names)
        answers = await asyncio.gather(
            *(world.ask(f"{name} {n}", headers=at(name)) for n, name in enumerate(names))
        )
        told = await world.stats("priority")
    assert {answer.status for answer in answers} == {200}
    median = {
        row["priority"]: row["latency_ms"]["p50"] for row in told["by"] if row["model"] is None
    }
    assert median["critical"] < median["normal"] < median["best_effort"]
