"""Very long requests: they take their own time and nobody else's, and upstream judges them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import orjson
import pytest

from cache_proxy.protocols.chat import MOST_MESSAGES, MOST_PARTS
from tests.conftest import WorldMaker
from tests.scripted import Reply, Seen, echo, whole
from tests.stopwatch import of_three

pytestmark = pytest.mark.live

JSON = {"content-type": "application/json", "authorization": "Bearer sk-one"}
CHAT = "/v1/chat/completions"
TRIM = {"enabled": True}


def story(count: int) -> list[dict[str, Any]]:
    """So many messages, two to a turn, a question the last."""
    told = [{"role": "assistant" if n % 2 else "user", "content": "so"} for n in range(count - 1)]
    return [*told, {"role": "user", "content": "And then?"}]


def body(messages: list[dict[str, Any]]) -> bytes:
    return orjson.dumps({"model": "gpt-4o", "messages": messages})


@dataclass
class Watch:
    """Seconds: how long something took, and the longest for which the loop served nobody else."""

    longest: float = 0.0
    took: float = 0.0


@asynccontextmanager
async def watched() -> AsyncIterator[Watch]:
    watch = Watch()

    async def tick() -> None:
        before = time.perf_counter()
        while True:
            await asyncio.sleep(0.001)
            now = time.perf_counter()
            watch.longest, before = max(watch.longest, now - before), now

    task, started = asyncio.create_task(tick()), time.perf_counter()
    await asyncio.sleep(0)
    try:
        yield watch
    finally:
        watch.took = time.perf_counter() - started
        task.cancel()


def shortly(seen: Seen) -> Reply:
    """An answer that is kept, so that what was asked is also read for keeping."""
    return whole("Because.", seen)


@pytest.mark.parametrize(
    ("trim", "sent"),
    [
        (True, body(story(60_000))),
        (False, body([{"role": "user", "content": "Why is one wördy? " * 20_000}])),
    ],
    ids=["trimmed", "judged"],
)
@of_three
async def test_reading_a_long_request_holds_nobody_up(
    make_world: WorldMaker, trim: bool, sent: bytes
) -> None:
    """Parsed, trimmed and judged beside the loop, which a request on it would fill from end to
    end; compared with what it takes, as a busy machine slows both down."""
    async with make_world(model="none", trim={"enabled": trim}) as world:
        world.upstream.script = shortly
        await world.send("POST", CHAT, body(story(3)), JSON)
        async with watched() as watch:
            told = await world.send("POST", CHAT, sent, JSON)
        assert told.status == 200
        assert bool(told.headers.get("x-trimmed")) == trim
        assert watch.longest < watch.took / 2  # on the loop: two thirds at least


async def test_more_messages_than_anybody_takes_are_upstreams_to_judge(
    make_world: WorldMaker,
) -> None:
    """One more than the limit goes up byte for byte, uncached; as many as the limit are cached."""
    many = [{"role": "user", "content": [{"type": "text", "text": "so"}] * (MOST_PARTS - 1)}]
    question = {"role": "user", "content": [{"type": "text", "text": "And then?"}]}
    async with make_world(model="none") as world:
        for fits, too_many in (
            (story(MOST_MESSAGES), story(MOST_MESSAGES + 1)),
            ([*many, question], [*many, question, question]),
        ):
            assert (await world.send("POST", CHAT, body(fits), JSON)).kind == "MISS"
            sent = body(too_many)
            for _ in range(2):
                told = await world.send("POST", CHAT, sent, JSON)
                assert (told.status, told.kind, told.reason) == (200, "BYPASS", "unreadable")
                assert world.upstream.seen[-1].body == sent
        assert world.upstream.calls == 6


async def test_what_trimming_brings_below_the_limit_is_cached(make_world: WorldMaker) -> None:
    """The limit holds for what would be sent."""
    async with make_world(model="none", trim=TRIM | {"windows": {"gpt-4o": 2_000}}) as world:
        world.upstream.script = echo
        sent = body(story(MOST_MESSAGES * 2))
        kinds = [(await world.send("POST", CHAT, sent, JSON)).kind for _ in range(2)]
        assert kinds == ["MISS", "HIT"]
        assert len(world.upstream.seen[0].json["messages"]) < MOST_MESSAGES
