"""What holds when upstream is late, fails or is dead: bounded time, hits served, another model's
answer under its own name, and one honest error.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson
import pytest
from openai import APIStatusError, AsyncOpenAI

from cache_proxy.errors import UpstreamUnavailable
from cache_proxy.upstream.attempts import Attempts
from cache_proxy.upstream.client import Upstream
from cache_proxy.upstream.deadlines import Deadlines, Learnt
from cache_proxy.upstream.providers import single
from cache_proxy.upstream.relay import Errand, Relay
from cache_proxy.upstream.retry import Retrying
from tests.conftest import Answered, World, WorldMaker
from tests.scripted import Reply, ScriptedUpstream, Seen, echo, scripted_upstream, streamed
from tests.stopwatch import awake, of_three
from tests.test_cancels import aboard

pytestmark = pytest.mark.live

QUESTION = "What is the capital of France?"
ASKED, QUICK, CHEAP = "gpt-4o-mini", "gpt-4o", "gpt-4.1"
CHAIN = {ASKED: {"timeout": [QUICK], "error": [CHEAP]}}
ONCE = {"attempts": 1}  # what retries do is told elsewhere


def by_model(**scripts: Callable[[Seen], Any]) -> Callable[[Seen], Any]:
    """A script for some models; the others echo."""

    def script(seen: Seen) -> Any:
        name = seen.json.get("model", "").replace("-", "_").replace(".", "_")
        return scripts.get(name, echo)(seen)

    return script


def failing(status: int = 503, body: bytes = b'{"error":{"message":"sorry"}}') -> Any:
    return lambda seen: Reply(status, (body,))


def late(seconds: float) -> Any:
    async def script(seen: Seen) -> Reply:
        await asyncio.sleep(seconds)
        return echo(seen)

    return script


def models(world: World | ScriptedUpstream) -> list[str]:
    upstream = world.upstream if isinstance(world, World) else world
    return [seen.json["model"] for seen in upstream.seen]


def spoken(answered: Answered) -> tuple[int, str, str]:
    return answered.status, answered.kind, answered.headers.get("x-upstream-model", "")


async def stored(world: World, **fields: Any) -> Answered:
    """Ask until it is a hit."""
    told: list[Answered] = []

    async def hit() -> bool:
        told.append(await world.ask(QUESTION, **fields))
        return told[-1].kind == "HIT"

    await world.until(hit)
    return told[-1]


# Fallback ---------------------------------------------------------------------------------------


async def test_another_model_answers_for_one_that_fails_and_is_named(
    make_world: WorldMaker,
) -> None:
    """The client gets the cheaper model's answer, and the header says whose it is."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing())
        answered = await world.ask(QUESTION)
        assert spoken(answered) == (200, "MISS", CHEAP)
        assert answered.json["model"].startswith(CHEAP)
        assert models(world) == [ASKED, CHEAP]


async def test_an_answer_is_kept_under_the_name_of_the_model_that_spoke(
    make_world: WorldMaker,
) -> None:
    """I2: who asks for the fallback's model finds it; who asks for the failed one never does."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing())
        first = await world.ask(QUESTION)
        world.upstream.script = echo
        again = await world.ask(QUESTION)
        assert (again.kind, again.json["model"]) == ("MISS", ASKED + "-2024-07-18")
        direct = await world.ask(QUESTION, model=CHEAP)
        assert (direct.kind, direct.text) == ("HIT", first.text)
        assert (await world.ask(QUESTION)).text == again.text


async def test_an_answer_costs_what_the_model_that_spoke_charges(make_world: WorldMaker) -> None:
    """The dollars follow the answer, not the question."""
    spent = []
    for flags, fields in (({"fallback": CHAIN}, {}), ({}, {"model": CHEAP})):
        async with make_world(retry=ONCE, **flags) as world:
            world.upstream.script = by_model(gpt_4o_mini=failing())
            answered = await world.ask(QUESTION, **fields)
            assert answered.status == 200
            spent.append((await world.stats())["usd_spent"])
    assert spent[0] == spent[1] > 0


async def test_a_late_model_gives_way_to_the_quicker_one_in_time(make_world: WorldMaker) -> None:
    """I6: the chain is chosen by what went wrong, and the whole stays within the total."""
    async with make_world(
        fallback=CHAIN, retry=ONCE, deadlines={"total_seconds": 30, "models": {ASKED: 0.4}}
    ) as world:
        world.upstream.script = by_model(gpt_4o_mini=late(60))
        began = time.monotonic(), awake()
        assert spoken(await world.ask(QUESTION)) == (200, "MISS", QUICK)
        assert time.monotonic() - began[0] >= 0.4
        assert awake() - began[1] < 1.5
        await world.until(lambda: world.upstream.seen[0].aborted_at is not None)


@of_three
async def test_without_a_base_of_its_own_a_model_leaves_its_fallback_half_the_time(
    make_world: WorldMaker,
) -> None:
    """I6: nothing but the client's own patience is known."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=late(60))
        hint = {"x-stainless-read-timeout": "2.0"}
        began = time.monotonic()
        assert spoken(await world.ask(QUESTION, headers=hint)) == (200, "MISS", QUICK)
        assert 0.9 <= time.monotonic() - began < 2.0


async def test_when_all_fail_the_first_error_comes_back_once(make_world: WorldMaker) -> None:
    """Byte for byte, and SDKs are told not to begin again."""
    chain = {ASKED: {"error": [QUICK, CHEAP]}}
    async with make_world(fallback=chain, retry=ONCE) as world:
        world.upstream.script = by_model(
            gpt_4o_mini=failing(503, b'{"error":{"message":"the first"}}'),
            gpt_4o=failing(500, b'{"error":{"message":"the second"}}'),
            gpt_4_1=failing(529, b'{"error":{"message":"the third"}}'),
        )
        answered = await world.ask(QUESTION)
        assert (answered.status, answered.json["error"]["message"]) == (503, "the first")
        assert answered.headers["x-should-retry"] == "false"
        assert answered.headers["x-upstream-attempts"] == "3"
        assert "x-upstream-model" not in answered.headers
        assert models(world) == [ASKED, QUICK, CHEAP]


@of_three
async def test_when_all_are_late_the_whole_is_still_bounded(make_world: WorldMaker) -> None:
    """I6: one deadline for all of them together, and the error of the first."""
    chain = {ASKED: {"timeout": [QUICK, CHEAP]}}
    async with make_world(fallback=chain, retry=ONCE, deadlines={"total_seconds": 1}) as world:
        world.upstream.script = late(60)
        began = awake()
        answered = await world.ask(QUESTION)
        assert awake() - began < 1.4
        assert (answered.status, answered.headers["x-should-retry"]) == (504, "false")
        assert models(world) == [ASKED, QUICK, CHEAP]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
async def test_a_refusal_is_not_overruled_by_another_model(
    make_world: WorldMaker, status: int
) -> None:
    """What is wrong with the request or the key is the client's to hear."""
    async with make_world(fallback=CHAIN) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing(status))
        assert (await world.ask(QUESTION)).status == status
        assert models(world) == [ASKED]


@pytest.fixture
async def other() -> AsyncIterator[ScriptedUpstream]:
    """Another provider."""
    async with scripted_upstream() as upstream:
        yield upstream


def two_providers(other: ScriptedUpstream, **more: Any) -> dict[str, Any]:
    return {
        "providers": {"backup": {"base_url": other.base_url, "protocol": "openai"} | more},
        "fallback": {ASKED: {"error": ["backup/kept-model"]}},
        "retry": ONCE,
    }


async def test_a_key_stays_with_its_provider_when_another_one_answers(
    make_world: WorldMaker, other: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other provider gets its own key, or none, and never the client's."""
    monkeypatch.setenv("BACKUP_KEY", "sk-backup-own")
    for more, expected in (({"api_key_env": "BACKUP_KEY"}, "sk-backup-own"), ({}, "")):
        async with make_world(**two_providers(other, **more)) as world:
            world.upstream.script = failing()
            answered = await world.ask(QUESTION, key="sk-clients-secret")
            assert spoken(answered) == (200, "MISS", "kept-model")
            assert answered.headers["x-upstream-provider"] == "backup"
            seen = other.seen[-1]
            assert (seen.key, seen.json["model"]) == (expected, "kept-model")
            assert "sk-clients-secret" not in repr(seen)
            assert world.upstream.seen[-1].key == "sk-clients-secret"


async def test_another_providers_answer_is_kept_under_that_provider(
    make_world: WorldMaker, other: ScriptedUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """I2: found by its prefixed name alone; and it says nothing about the client's key at the
    first provider."""
    monkeypatch.setenv("BACKUP_KEY", "sk-backup-own")
    async with make_world(**two_providers(other, api_key_env="BACKUP_KEY")) as world:
        world.upstream.script = failing()
        first = await world.ask(QUESTION)
        world.upstream.script = echo
        assert (await world.ask(QUESTION)).reason == "unaccepted"
        assert (await world.ask(QUESTION, model="kept-model")).kind == "MISS"
        direct = await world.ask(QUESTION, model="backup/kept-model")
        assert (direct.kind, direct.text) == ("HIT", first.text)


async def test_a_fallback_is_asked_as_the_client_asked(make_world: WorldMaker) -> None:
    """Everything but the model goes on as it came; nothing is known of the client's own chain."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing())
        await world.ask(QUESTION, temperature=0.5, seed=7, unknown={"deep": [1]})
        first, second = (seen.json for seen in world.upstream.seen)
        assert second == first | {"model": CHEAP}


async def test_requests_that_share_a_call_share_its_fallback(make_world: WorldMaker) -> None:
    """Each is told who spoke."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:

        async def once_all_wait(seen: Seen) -> Reply:
            await world.until(lambda: aboard(world) == 5)
            return echo(seen)

        world.upstream.script = by_model(gpt_4o_mini=failing(), gpt_4_1=once_all_wait)
        answers = await asyncio.gather(*(world.ask(QUESTION, seed=1) for _ in range(5)))
        assert {spoken(answered) for answered in answers} == {(200, "MISS", CHEAP)}
        assert len({answered.text for answered in answers}) == 1
        assert len(models(world)) <= 4  # the first of a credential flies alone


async def test_an_embedding_is_never_another_models(make_world: WorldMaker) -> None:
    """Vectors of two models mean nothing to each other."""
    chain = {"text-embedding-3-small": {"error": ["text-embedding-3-large"]}}
    async with make_world(fallback=chain, retry=ONCE) as world:
        world.upstream.script = failing()
        body = orjson.dumps({"model": "text-embedding-3-small", "input": "a"})
        headers = {"content-type": "application/json", "authorization": "Bearer sk-one"}
        assert (await world.send("POST", "/v1/embeddings", body, headers)).status == 503
        assert world.upstream.calls == 1


async def test_a_client_that_leaves_ends_the_fallback_too(make_world: WorldMaker) -> None:
    """I8."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing(), gpt_4_1=late(20))
        asking = asyncio.create_task(world.ask(QUESTION))
        await world.until(lambda: len(world.upstream.seen) == 2)
        asking.cancel()
        await world.until(lambda: world.upstream.seen[1].aborted_at is not None)


# Streams ----------------------------------------------------------------------------------------


async def test_a_stream_falls_back_before_its_first_byte(make_world: WorldMaker) -> None:
    """The SDK sees one good stream, with the usage that only the proxy asked for taken out."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing())
        answered = await world.ask(QUESTION, stream=True)
        assert spoken(answered) == (200, "MISS", CHEAP)
        assert answered.text == world.upstream.seen[-1].answered
        assert world.upstream.seen[-1].json["stream_options"] == {"include_usage": True}
        assert b'"usage":{' not in answered.body
        assert (await stored(world, model=CHEAP)).text == answered.text


@of_three
async def test_a_stream_that_says_nothing_gives_way_too(make_world: WorldMaker) -> None:
    """A head alone is no answer yet."""

    def mute(seen: Seen) -> Reply:
        reply = streamed("too late", seen)
        return Reply(200, (b"", *reply.parts), reply.headers, pause=60)

    async with make_world(fallback=CHAIN, retry=ONCE, deadlines={"first_byte_seconds": 1}) as world:
        world.upstream.script = by_model(gpt_4o_mini=mute)
        began = awake()
        assert spoken(await world.ask(QUESTION, stream=True)) == (200, "MISS", QUICK)
        assert awake() - began < 1.9


async def test_a_stream_that_breaks_off_is_not_replaced(make_world: WorldMaker) -> None:
    """I5: the client sees the cut, nobody is asked in its stead, nothing is kept."""

    def cut(seen: Seen) -> Reply:
        reply = streamed("an answer that will not be whole", seen)
        return Reply(200, reply.parts[:4], reply.headers, pause=0.05, cut=True)

    async with make_world(fallback=CHAIN) as world:
        world.upstream.script = cut
        with pytest.raises(UpstreamUnavailable, match="broke off"):
            await world.ask(QUESTION, stream=True)
        assert models(world) == [ASKED]
        assert (await world.stats())["stored"] == 0


async def test_a_stream_that_falls_silent_is_cut(make_world: WorldMaker) -> None:
    """The limit between bytes is for streams, however long the first byte may take."""

    def stalls(seen: Seen) -> Reply:
        reply = streamed("one two three", seen)
        return Reply(200, reply.parts, reply.headers, pause=60)

    async with make_world(
        deadlines={"first_byte_seconds": 30, "idle_seconds": 0.4}, retry=ONCE
    ) as world:
        world.upstream.script = stalls
        began = awake()
        with pytest.raises(UpstreamUnavailable, match="broke off"):
            await world.ask(QUESTION, stream=True)
        assert awake() - began < 2
        await world.until(lambda: world.upstream.seen[0].aborted_at is not None)


# Deadlines --------------------------------------------------------------------------------------


async def test_an_overdue_answer_is_a_504_that_sdks_do_not_repeat(make_world: WorldMaker) -> None:
    """I6: base + 50 ms a token, in the protocol's shape."""
    async with make_world(deadlines={"total_seconds": 30, "models": {"gpt-*": 0.2}}) as world:
        world.upstream.script = late(60)
        async with AsyncOpenAI(base_url=world.base, api_key="sk-one") as client:
            began = time.monotonic(), awake()
            with pytest.raises(APIStatusError) as told:
                await client.chat.completions.create(
                    model=ASKED, messages=[{"role": "user", "content": QUESTION}], max_tokens=10
                )
            assert time.monotonic() - began[0] >= 0.7
            assert awake() - began[1] < 2
        assert told.value.status_code == 504
        assert told.value.body["code"] == "upstream_unavailable"
        assert world.upstream.calls == 1


async def test_an_answer_that_trickles_in_too_late_is_a_504_as_well(
    make_world: WorldMaker,
) -> None:
    """The deadline is for the last byte: nobody can use a part of what is no stream."""

    def trickle(seen: Seen) -> Reply:
        whole = echo(seen).parts[0]
        return Reply(200, tuple(whole[n : n + 1] for n in range(len(whole))), pause=0.05)

    async with make_world(deadlines={"total_seconds": 0.5}, retry=ONCE) as world:
        world.upstream.script = trickle
        began = awake()
        answered = await world.ask(QUESTION)
        assert (answered.status, answered.headers["x-should-retry"]) == (504, "false")
        assert awake() - began < 2
        await world.until(lambda: world.upstream.seen[0].aborted_at is not None)


async def test_nobody_waits_longer_than_the_client_itself_would(make_world: WorldMaker) -> None:
    """Set or unset, its own time-out is the upper bound."""
    hint = {"x-stainless-read-timeout": "0.5"}
    for flags in ({}, {"deadlines": {"total_seconds": 30}}):
        async with make_world(retry=ONCE, **flags) as world:
            world.upstream.script = late(60)
            began = awake()
            assert (await world.ask(QUESTION, headers=hint)).status == 504
            assert awake() - began < 2


async def test_a_long_answer_that_keeps_coming_is_not_cut(make_world: WorldMaker) -> None:
    """Streams have no total."""

    def slowly(seen: Seen) -> Reply:
        reply = streamed("one two three four five six", seen)
        return Reply(200, reply.parts, reply.headers, pause=0.2)

    limits = {"total_seconds": 0.5, "first_byte_seconds": 30, "idle_seconds": 30}
    async with make_world(deadlines=limits) as world:
        world.upstream.script = slowly
        answered = await world.ask(QUESTION, stream=True)
        assert answered.text == "one two three four five six"


async def test_learnt_limits_come_from_answers_and_cut_what_hangs(other: ScriptedUpstream) -> None:
    """After quick answers nobody waits a minute for one that hangs; the next one has the minute."""
    pool = Upstream(max_connections=5, connect_seconds=5)
    router, loop = single(other.base_url), asyncio.get_running_loop()
    attempts = Attempts(
        pools={"": pool},
        turnstiles={},
        count=lambda why, route: None,
        retrying=Retrying(1),
        learnt=Learnt(fewest=5, floor=0.5),
        now=loop.time,
        clock=time.time,
        sleep=asyncio.sleep,
        dice=random.random,
    )
    relay = Relay(
        attempts=attempts,
        pools={"": pool},
        count=lambda why, route: None,
        deadlines=Deadlines(total=60),
        chains={},
        router=router,
        now=loop.time,
    )

    async def answered() -> float:
        body = orjson.dumps({"model": ASKED, "messages": [{"role": "user", "content": "?"}]})
        route, _ = router.route(b"/v1/chat/completions", [], orjson.loads(body))
        errand = Errand(route, b"", [], body, None, b"", None)
        began = time.monotonic()
        completion = await relay.send(errand)
        await completion.close()
        return time.monotonic() - began

    for _ in range(5):
        await answered()
    other.script = late(50)
    with pytest.raises(UpstreamUnavailable, match="in time") as told:
        await answered()
    assert (told.value.status_hint, told.value.retry) == (504, False)
    other.script = late(2)
    assert await answered() >= 2
    await relay.close()


# Breaker ----------------------------------------------------------------------------------------


async def shut(world: World, **fields: Any) -> None:
    """Ask until the breaker is open, which takes failures for a second."""
    asked = itertools.count()

    async def refused() -> bool:
        answered = await world.ask(f"Who was the {next(asked)}th pope?", **fields)
        return bool(answered.reason == "open")

    await world.until(refused)


@pytest.fixture
def closed_port() -> str:
    """A base URL at which nobody listens."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listening.getsockname()[1]}/v1"


async def test_misses_of_a_dead_upstream_fail_soon_and_then_at_once(
    make_world: WorldMaker, closed_port: str
) -> None:
    """G22: within 2 s each, and within 20 ms once the breaker is open, with Retry-After."""
    async with make_world(upstream=closed_port, model="none") as world:
        slowest, asked = 0.0, itertools.count()

        async def refused() -> bool:
            nonlocal slowest
            began = awake()
            answered = await world.ask(f"Who was the {next(asked)}th pope?")
            slowest = max(slowest, awake() - began)
            return bool(answered.reason == "open")

        await world.until(refused)
        assert slowest < 2
        seconds = []
        for n in range(20):
            began = time.perf_counter()
            answered = await world.ask(f"Who was the {n}th king of Norway?")
            seconds.append(time.perf_counter() - began)
            if answered.reason == "open":
                assert answered.status == 503
                assert int(answered.headers["retry-after"]) >= 1
        # A quarter of them: the rest have the other work of the machine in them.
        assert sorted(seconds)[5] < 0.02


async def test_an_open_breaker_refuses_before_the_queue(
    make_world: WorldMaker, closed_port: str
) -> None:
    """Nobody waits for a turn that leads to nothing."""
    main = {"base_url": closed_port, "protocol": "openai", "rate": "5/s"}
    async with make_world(providers={"main": main}, model="none", retry=ONCE) as world:
        await shut(world, model="main/m")
        began = awake()
        texts = [f"Who was the {n}th king of Norway?" for n in range(20)]
        answers = await asyncio.gather(*(world.ask(text, model="main/m") for text in texts))
        assert awake() - began < 2
        assert [answered.reason for answered in answers].count("open") >= 15


@of_three
async def test_hits_are_served_while_the_breaker_is_open_and_one_probe_closes_it(
    make_world: WorldMaker,
) -> None:
    """G22: the cache outlives upstream; and upstream sees one call when the pause is over."""
    async with make_world(retry=ONCE) as world:
        known = await stored(world)
        world.upstream.script = failing()
        await shut(world)
        called = world.upstream.calls
        assert (await world.ask(QUESTION)).text == known.text
        assert (await world.ask(QUESTION)).kind == "HIT"
        assert world.upstream.calls == called

        asked: list[asyncio.Task[Answered]] = []

        async def once_the_others_are_refused(seen: Seen) -> Reply:
            await world.until(lambda: sum(task.done() for task in asked) == 9)
            return echo(seen)

        world.upstream.script = once_the_others_are_refused
        await asyncio.sleep(1.05)  # the first pause
        for n in range(10):
            asked.append(asyncio.create_task(world.ask(f"Who was the {n}th emperor?")))
        answers = await asyncio.gather(*asked)
        assert sorted(answered.status for answered in answers) == [200] + [503] * 9
        assert world.upstream.calls == called + 1
        world.upstream.script = echo
        assert (await world.ask("Who was the last emperor?")).status == 200


async def test_an_open_breaker_leads_straight_to_the_fallback(make_world: WorldMaker) -> None:
    """Nobody pays for finding out again."""
    async with make_world(fallback=CHAIN, retry=ONCE) as world:
        world.upstream.script = by_model(gpt_4o_mini=failing())
        asked: list[Answered] = []

        async def straight() -> bool:
            called = models(world).count(ASKED)
            asked.append(await world.ask(f"Who was the {len(asked)}th pope?"))
            return models(world).count(ASKED) == called

        await world.until(straight)
        assert {spoken(answered) for answered in asked} == {(200, "MISS", CHEAP)}
        assert models(world).count(CHEAP) == len(asked)


async def test_refusals_and_rate_limits_never_open_the_breaker(make_world: WorldMaker) -> None:
    """One client's bad key or quota is nobody else's outage."""
    async with make_world(retry=ONCE) as world:
        for status in (401, 429, 400):
            world.upstream.script = failing(status)
            for n in range(8):
                answered = await world.ask(f"Who was the {n}th pope of {status}?")
                assert answered.status == status


async def test_an_impatient_client_does_not_open_the_breaker_for_others(
    make_world: WorldMaker,
) -> None:
    """Its own short time-outs say nothing about upstream."""
    async with make_world(retry=ONCE) as world:
        world.upstream.script = late(60)
        hint = {"x-stainless-read-timeout": "0.05"}
        began, asked = time.monotonic(), 0
        while time.monotonic() - began < 1.3 or asked < 8:
            asked += 1
            answered = await world.ask(f"Who was the {asked}th pope?", headers=hint)
            assert (answered.status, answered.reason) == (504, "upstream")
        world.upstream.script = echo
        assert (await world.ask(QUESTION)).status == 200


# Stale answers ----------------------------------------------------------------------------------


async def expired(world: World, **fields: Any) -> Answered:
    """An answer that was stored and has expired since."""
    known = await world.ask(QUESTION, **fields)
    await world.sidecar.memory.settle(60)
    kept = int(time.time())
    await world.until(lambda: time.time() >= kept + 2)
    return known


async def test_an_expired_answer_is_served_when_upstream_fails_and_says_so(
    make_world: WorldMaker,
) -> None:
    """RFC 5861, I1, I12: a hit of its own kind, in either form."""
    async with make_world(ttl="1s", stale_if_error="1h", retry=ONCE) as world:
        known = await expired(world)
        world.upstream.script = failing()
        answered = await world.ask(QUESTION)
        assert (answered.kind, answered.text) == ("HIT", known.text)
        assert answered.reason == "stale_if_error"
        status = answered.headers["cache-status"]
        assert status.startswith("cache-proxy; hit; ttl=-")
        assert status.endswith('; detail="stale"')
        assert int(answered.headers["age"]) >= 2
        assert (await world.ask(QUESTION, stream=True)).text == known.text
        stats = await world.stats()
        assert (stats["hits"]["exact"], stats["misses"], stats["errors"]) == (2, 1, 0)


async def test_an_expired_answer_is_not_served_while_upstream_answers(
    make_world: WorldMaker,
) -> None:
    """Stale is for failures; what comes instead is stored anew."""
    async with make_world(ttl="1s", stale_if_error="1h") as world:
        known = await expired(world)
        fresh = await world.ask(QUESTION)
        assert (fresh.kind, fresh.status) == ("MISS", 200)
        assert fresh.text != known.text
        assert (await stored(world)).text == fresh.text


@pytest.mark.parametrize(
    ("flags", "headers", "key"),
    [
        ({}, {}, "sk-one"),
        ({"stale_if_error": "1h"}, {"cache-control": "no-cache"}, "sk-one"),
        ({"stale_if_error": "1h"}, {"cache-control": "max-age=1"}, "sk-one"),
        ({"stale_if_error": "1h"}, {"x-cache-mode": "shadow"}, "sk-one"),
        ({"stale_if_error": "1h"}, {}, "sk-stranger"),
    ],
    ids=["off", "no-cache", "max-age", "shadow", "another key"],
)
async def test_an_expired_answer_is_not_served_to_who_may_not_have_it(
    make_world: WorldMaker, flags: dict[str, str], headers: dict[str, str], key: str
) -> None:
    """Off by default; callers may tighten; nobody gets somebody else's."""
    async with make_world(ttl="1s", retry=ONCE, **flags) as world:
        await expired(world)
        world.upstream.script = failing()
        answered = await world.ask(QUESTION, headers=headers, key=key)
        assert (answered.status, answered.kind != "HIT") == (503, True)


async def test_a_dead_upstreams_expired_answers_are_served_at_once(
    make_world: WorldMaker,
) -> None:
    """Once the breaker is open nobody waits to find out."""
    async with make_world(ttl="1s", stale_if_error="1h", retry=ONCE) as world:
        known = await expired(world)
        world.upstream.script = failing()
        await shut(world)
        took = []
        for _ in range(5):
            began = time.perf_counter()
            answered = await world.ask(QUESTION)
            took.append(time.perf_counter() - began)
            assert (answered.kind, answered.text) == ("HIT", known.text)
        assert min(took) < 0.1
