"""What hanging up promises: upstream hears of it, nothing half is kept, and nobody else notices."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest

from cache_proxy.flights import Flights
from cache_proxy.passage import Landing
from cache_proxy.proxy import Proxy
from tests.conftest import World, WorldMaker
from tests.rawhttp import Line, chat, post
from tests.scripted import Reply, Script, Seen, echo, streamed, whole
from tests.stopwatch import awake

pytestmark = pytest.mark.live

LONG = "one two three four five six seven eight nine ten " * 20


async def dawdle(seen: Seen) -> Reply:
    """Thinks for longer than any test lasts."""
    reply = echo(seen)
    reply.delay = 60
    return reply


def trickle(seen: Seen) -> Reply:
    """Streams a word at a time, for longer than any test lasts."""
    seen.answered = f"{LONG} {seen.number}"
    reply = streamed(seen.answered, seen)
    reply.pause = 0.1
    return reply


def half(seen: Seen) -> Reply:
    """Not a stream: the head and half of the body, and then nothing for a long time."""
    body = whole(LONG, seen).parts[0]
    return Reply(parts=(body[:100], body[100:]), pause=60)


def flights(world: World) -> Flights[Landing]:
    """The calls that the sidecar has in the air."""
    proxy: Proxy = world.sidecar.app._handlers["chat"].__self__  # type: ignore[attr-defined]
    return proxy.parts.flights


def aboard(world: World) -> int:
    return sum(flight.aboard for flight in flights(world)._flights.values())


async def aborted(world: World, started: float, number: int = 0) -> None:
    """Upstream saw the caller go within a second of `started`."""
    seen = world.upstream.seen[number]
    await world.until(lambda: seen.aborted_at is not None)
    assert awake() - started <= 1.0


@pytest.mark.parametrize(
    ("script", "stream", "headed"),
    [
        (dawdle, True, False),
        (dawdle, False, False),
        (trickle, True, True),
        (half, False, True),
    ],
    ids=["stream before its first byte", "answer before its head", "mid-stream", "mid-answer"],
)
async def test_a_client_that_hangs_up_ends_the_upstream_work(
    world: World, script: Script, stream: bool, headed: bool
) -> None:
    """I8, I4: in all windows, with a FIN or a reset, within a second; and nothing is stored."""
    world.upstream.script = script
    for number, rudely in enumerate((False, True)):
        async with Line(world.base) as line:
            line.send(post(chat("Why is the sky blue?", stream=stream)))
            if headed:
                await line.head()
            await world.until(lambda calls=number + 1: world.upstream.calls == calls)
            await asyncio.sleep(0.05)
            line.hang_up(rudely=rudely)
            await aborted(world, awake(), number)

    world.upstream.script = echo
    again = await world.ask("Why is the sky blue?", key="sk-raw")
    assert (again.status, again.kind) == (200, "MISS")
    assert len(flights(world)) == 0
    counted = await world.stats()
    assert (counted["requests"], counted["misses"], counted["stored"]) == (3, 3, 1)


@pytest.mark.parametrize("path", ["/v1/models", "/v1/files"])
async def test_a_pass_through_that_is_hung_up_on_ends_too(world: World, path: str) -> None:
    """I8 holds for what is not cached as well, with a body and without."""
    world.upstream.script = dawdle
    async with Line(world.base) as line:
        body = b"" if path == "/v1/models" else b"file"
        request = post(body, path=path)
        line.send(request if body else request.replace(b"POST", b"GET", 1))
        await world.until(lambda: world.upstream.calls == 1)
        await asyncio.sleep(0.05)
        line.hang_up()
        await aborted(world, awake())


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
async def test_the_one_who_began_a_shared_call_may_leave(world: World, stream: bool) -> None:
    """I8: those who joined are served to the end, by the same one upstream call."""
    await world.ask("A first question, so that upstream has accepted the key", key="sk-raw")

    async def slowly(seen: Seen) -> Reply:
        seen.answered = f"shared {seen.number}"
        if stream:
            reply = streamed("shared " * 12 + str(seen.number), seen)
            reply.pause = 0.05
            return reply
        await left.wait()
        return whole(seen.answered, seen)

    left = asyncio.Event()
    world.upstream.script = slowly
    request = post(chat("Who discovered penicillin?", stream=stream))
    async with Line(world.base) as leader:
        leader.send(request)
        await world.until(lambda: world.upstream.calls == 2)
        followers = [Line(world.base) for _ in range(5)]
        for follower in followers:
            await follower.__aenter__()
            follower.send(request)
        await world.until(lambda: aboard(world) == 6)
        leader.hang_up()
        left.set()
        answers = [await follower.answer() for follower in followers]
        for follower in followers:
            follower.hang_up()

    assert {told.status for told in answers} == {200}
    assert all(told.whole for told in answers)
    assert len({told.body for told in answers}) == 1
    assert b"shared" in answers[0].body
    assert world.upstream.calls == 2
    assert world.upstream.seen[1].aborted_at is None
    kept = await world.ask("Who discovered penicillin?", key="sk-raw")
    assert (kept.kind, kept.tier) == ("HIT", "exact")


async def test_three_hundred_that_hang_up_cost_the_next_ones_nothing(
    make_world: WorldMaker,
) -> None:
    """I8, I7: no upstream slot is lost, no file handle kept, no half answer stored; with no more
    upstream connections than there are slots, one lost slot would show."""
    async with make_world(max_connections=20) as world:

        async def stay(number: int) -> tuple[int, str, str]:
            answered = await world.ask(f"A new question with number {number}", key="sk-raw")
            return answered.status, answered.kind, answered.text.partition("<")[2]

        await asyncio.gather(*map(stay, range(1_000, 1_050)))
        before = open_files()  # with the connections of fifty at once kept alive

        async def mixed(seen: Seen) -> Reply:
            kind = seen.number % 4
            if kind == 0:
                return await dawdle(seen)
            return (echo, trickle, half)[kind - 1](seen)

        world.upstream.script = mixed
        dice = random.Random(5)
        text = [f"Question {n % 60} of many, please?" for n in range(300)]  # some share a call

        async def leave(number: int) -> None:
            async with Line(world.base) as line:
                line.send(post(chat(text[number], stream=dice.random() < 0.5)))
                await asyncio.sleep(dice.random() * 0.12)
                line.hang_up(rudely=dice.random() < 0.5)

        for start in range(0, 300, 50):
            await asyncio.gather(*map(leave, range(start, start + 50)))
        await world.until(lambda: len(flights(world)) == 0)
        await world.until(lambda: all(seen.ended.is_set() for seen in world.upstream.seen))
        world.upstream.script = echo
        calls = world.upstream.calls

        answers = await asyncio.gather(*map(stay, range(50)))
        assert answers == [
            (200, "MISS", f"A new question with number {n}> for sk-raw") for n in range(50)
        ]
        assert world.upstream.calls == calls + 50
        assert len(flights(world)) == 0
        await world.until(lambda: open_files() <= before + 5)

        # Whatever of the three hundred was answered whole was stored whole, and nothing else was.
        for number in range(60):
            answered = await world.ask(text[number], key="sk-raw")
            assert text[number] in answered.text or answered.text.startswith("one two three")
            if answered.text.startswith("one two three"):
                assert answered.text.split()[:-1] == LONG.split()
        counted = await world.stats()
        kinds = sum(counted["hits"].values()) + counted["misses"] + counted["errors"]
        assert kinds + sum(counted["bypasses"].values()) == counted["requests"]
        assert counted["requests"] <= 50 + 300 + 50 + 60


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize("known", [True, False], ids=["accepted key", "fresh key"])
async def test_a_hundred_equal_questions_at_once_ask_upstream_once(
    world: World, stream: bool, known: bool
) -> None:
    """A stampede costs one call; a key that upstream has yet to judge shares with itself alone."""
    if known:
        await world.ask("Something else, so that upstream has accepted the key")
    before = world.upstream.calls

    async def once_all_wait(seen: Seen) -> Reply:
        await world.until(lambda: aboard(world) == 100)
        return echo(seen)

    world.upstream.script = once_all_wait
    answers = await asyncio.gather(
        *[world.ask("How tall is Mount Everest?", stream=stream) for _ in range(100)]
    )

    assert world.upstream.calls == before + 1
    assert {answered.status for answered in answers} == {200}
    assert len({answered.text for answered in answers}) == 1
    assert {answered.kind for answered in answers} == {"MISS"}
    assert sum("x-cache-collapsed" in answered.headers for answered in answers) == 99
    assert (await world.stats())["collapsed"] == 99


async def test_two_fresh_keys_do_not_share_a_call(world: World) -> None:
    """I3: what upstream says to one credential is no answer for another that it has not judged."""

    async def soon(seen: Seen) -> Reply:
        await asyncio.sleep(0.2)
        return echo(seen)

    world.upstream.script = soon
    answers = await asyncio.gather(
        world.ask("How deep is the sea?", key="sk-first"),
        world.ask("How deep is the sea?", key="sk-second"),
    )
    assert world.upstream.calls == 2
    assert [a.text.rpartition(" ")[2] for a in answers] == ["sk-first", "sk-second"]


@pytest.mark.parametrize("control", ["no-cache", "no-store"])
async def test_who_asks_for_a_fresh_answer_shares_with_nobody(world: World, control: str) -> None:
    """Best-of-n and retries want as many answers as they ask for."""
    await world.ask("Something else, so that upstream has accepted the key")

    async def soon(seen: Seen) -> Reply:
        await asyncio.sleep(0.2)
        return echo(seen)

    world.upstream.script = soon
    answers = await asyncio.gather(
        *[world.ask("Write me a haiku", headers={"cache-control": control}) for _ in range(5)]
    )
    assert world.upstream.calls == 6
    assert len({answered.text for answered in answers}) == 5
