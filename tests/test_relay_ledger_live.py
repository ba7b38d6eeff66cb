"""The ledger against upstream's own log: every call, token and cent, whatever went wrong."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.conftest import Answered, World, WorldMaker
from tests.rawhttp import Line, chat, post
from tests.scripted import Reply, Seen, echo, scripted_upstream, streamed, whole
from tests.test_ledger_live import priced

pytestmark = pytest.mark.live

BUSY = Reply(status=503, parts=(b'{"error":{"message":"overloaded"}}',))
RETRIES = {"attempts": 3, "budget": 1.0}


def bill(seen: Iterable[Seen]) -> tuple[dict[str, int], float]:
    """Tokens and dollars of all that this upstream answered to its end."""
    paid = [each for each in seen if each.usage and each.aborted_at is None]
    tokens = {
        "input": sum(each.usage["prompt_tokens"] for each in paid),
        "output": sum(each.usage.get("completion_tokens", 0) for each in paid),
    }
    return tokens, sum(priced(each.usage, each.json["model"]) for each in paid)


class Flaky:
    """Fails the first calls of prompts that say so; each prompt asks anew."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def __call__(self, seen: Seen) -> Reply:
        if seen.method != "POST":
            return echo(seen)
        self.asked[seen.text] += 1
        text, nth = seen.text, self.asked[seen.text]
        if "once down" in text and nth == 1:
            return BUSY
        if "always down" in text:
            return BUSY
        if "limited" in text and nth == 1:
            told = (("content-type", "application/json"), ("retry-after-ms", "30"))
            return Reply(status=429, parts=(b'{"error":{"message":"slow down"}}',), headers=told)
        if "cut" in text:
            reply = streamed("this will not end", seen)
            seen.usage = {}
            return Reply(parts=reply.parts[:3], headers=reply.headers, cut=True)
        seen.answered = f"answer {seen.number} " + "word " * (seen.number % 17)
        reply = (streamed if seen.json.get("stream") else whole)(seen.answered, seen)
        reply.delay = 0.2 if "slow" in text else 0.0
        return reply


async def everything(world: World, model: str) -> None:
    """Some sixty requests: good ones, shared ones, streams, and all kinds of trouble."""

    async def ask(text: str, **fields: Any) -> Answered:
        return await world.ask(text, model=model, **fields)

    for number in range(3):
        for stream in (False, True):
            # Three failures in a row and less than half in all: the breaker stays shut.
            for kind in ("fine", "once down", "limited", "always down", "plain", "simple"):
                await ask(f"{kind}{', streamed' * stream}, number {number}", stream=stream)
    for _ in range(6):
        await ask("fine, number 0")
        await ask("fine, streamed, number 0", stream=True)
    for stream in (False, True):
        text = f"slow and once down {stream}"
        await asyncio.gather(*(ask(text, stream=stream) for _ in range(5)))
    async with Line(world.base) as line:
        line.send(post(chat("cut", stream=True, model=model), key="sk-one"))
        assert not (await line.answer()).whole


async def test_calls_tokens_and_money_are_those_of_upstreams_log(make_world: WorldMaker) -> None:
    """I12 with retries: one request is one outcome however often upstream was asked for it, and
    the calls are counted apart. The proxy's ledger is upstream's log, exactly."""
    async with make_world(retry=RETRIES) as world:
        script = world.upstream.script = Flaky()
        await everything(world, "gpt-4o-mini")
        await world.send("GET", "/v1/models/some")
        seen = world.upstream.seen
        await world.until(lambda: all(each.ended.is_set() for each in seen))
        told = await world.stats()
        (row,) = (await world.stats("provider"))["by"]

    tokens, dollars = bill(seen)
    assert told["upstream_attempts"]["calls"] == len(seen)
    again = sum(times - 1 for times in script.asked.values())
    assert told["upstream_attempts"]["retries"] == again > 10
    assert told["tokens_spent"] == tokens
    assert told["usd_spent"] == pytest.approx(dollars, rel=1e-6)
    assert dollars > 0
    assert told["collapsed"] == 8
    asked = 36 + 12 + 10 + 1 + 1
    assert told["requests"] == asked
    hits, bypassed = sum(told["hits"].values()), sum(told["bypasses"].values())
    assert hits + told["misses"] + bypassed + told["errors"] == asked
    assert (row["provider"], row["upstream_attempts"]) == ("upstream", told["upstream_attempts"])


async def test_a_stream_asked_for_again_without_usage_is_two_calls(
    make_world: WorldMaker,
) -> None:
    """A provider that refuses `stream_options` sees two calls the first time, and one after."""

    def script(seen: Seen) -> Reply:
        if "stream_options" in seen.json:
            return Reply(status=400, parts=(b'{"error":{"message":"unknown: stream_options"}}',))
        return echo(seen)

    async with make_world() as world:
        world.upstream.script = script
        for number in range(3):
            assert (await world.ask(f"question {number}", stream=True)).status == 200
        told = (await world.stats())["upstream_attempts"]
        assert (told["calls"], told["retries"]) == (len(world.upstream.seen), 1) == (4, 1)


async def test_each_provider_has_a_ledger_of_its_own(make_world: WorldMaker) -> None:
    """Two providers by model: calls, tokens and money of each are those of its own log."""
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(scripted_upstream()) for _ in range(2)]
        providers = {
            "one": {"base_url": one.base_url, "models": ["gpt-4o*"]},
            "two": {"base_url": two.base_url, "models": ["o4*"]},
        }
        made = make_world(providers=providers, upstream=one.base_url, retry=RETRIES)
        world = await stack.enter_async_context(made)
        for upstream in (one, two):
            upstream.script = Flaky()
        await asyncio.gather(everything(world, "gpt-4o-mini"), everything(world, "o4-mini"))
        logs = {"one": one.seen, "two": two.seen}
        for seen in logs.values():
            await world.until(lambda seen=seen: all(each.ended.is_set() for each in seen))
        document = await world.stats("provider")

    rows = {row["provider"]: row for row in document["by"]}
    assert set(rows) == set(logs)
    for name, seen in logs.items():
        row = rows[name]
        tokens, dollars = bill(seen)
        assert row["upstream_attempts"]["calls"] == len(seen) > 40
        assert row["tokens_spent"] == tokens
        assert row["usd_spent"] == pytest.approx(dollars, rel=1e-6)
        assert row["requests"] == 36 + 12 + 10 + 1
        assert row["latency_ms"]["p99"] >= 200
    for name in ("calls", "retries", "shed"):
        whole_sum = sum(row["upstream_attempts"][name] for row in rows.values())
        assert document["upstream_attempts"][name] == whole_sum
    assert document["usd_spent"] == pytest.approx(sum(row["usd_spent"] for row in rows.values()))


async def test_what_a_fallback_answered_is_the_fallbacks_bill(
    make_world: WorldMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls made in vain are the first provider's; tokens and money are those of the model and
    provider that answered, at its price, by its own log."""
    monkeypatch.setenv("TWO_KEY", "sk-two")
    async with AsyncExitStack() as stack:
        one, two = [await stack.enter_async_context(scripted_upstream()) for _ in range(2)]
        two_table = {"base_url": two.base_url, "models": ["gpt-4.1*"], "api_key_env": "TWO_KEY"}
        providers = {
            "one": {"base_url": one.base_url, "models": ["gpt-4o*"]},
            "two": two_table,
        }
        made = make_world(
            providers=providers,
            upstream=one.base_url,
            retry=RETRIES,
            fallback={"gpt-4o-mini": {"error": ["gpt-4.1"]}},
        )
        world = await stack.enter_async_context(made)
        one.script, two.script = Flaky(), Flaky()
        await world.ask("fine")
        answers = await asyncio.gather(*(world.ask("always down at both") for _ in range(2)))
        assert [answer.status for answer in answers] == [503, 503]
        two.script = echo
        for stream in (False, True):
            answers = await asyncio.gather(
                *(world.ask(f"always down, {stream}", stream=stream) for _ in range(3))
            )
            assert [answer.status for answer in answers] == [200] * 3
        told = await world.stats("provider")
        models = {row["model"]: row for row in (await world.stats("model"))["by"]}

    rows = {row["provider"]: row for row in told["by"]}
    for name, upstream in (("one", one), ("two", two)):
        tokens, dollars = bill(upstream.seen)
        assert rows[name]["upstream_attempts"]["calls"] == len(upstream.seen)
        assert rows[name]["tokens_spent"] == tokens
        assert rows[name]["usd_spent"] == pytest.approx(dollars, rel=1e-6)
    assert rows["two"]["upstream_attempts"]["fallbacks"] == 3
    assert rows["two"]["answered_for_others"] == 6
    assert told["requests"] == 9
    assert models["gpt-4.1"]["usd_spent"] == pytest.approx(rows["two"]["usd_spent"])
    assert models["gpt-4o-mini"]["usd_spent"] == pytest.approx(rows["one"]["usd_spent"])


async def test_audits_cost_money_with_the_cache_only(make_world: WorldMaker) -> None:
    """Every call is in the ledger, the audit's too; the bill with the cache holds all of them."""
    async with make_world(audit_share=1.0) as world:
        await world.ask("What is the capital of France?")
        assert (await world.ask("What's the capital city of France?")).tier == "semantic"

        async def audited() -> bool:
            return bool((await world.stats())["upstream_own"]["calls"].get("audit"))

        await world.until(audited)
        told = await world.stats()
        _, dollars = bill(world.upstream.seen)
    assert told["upstream_attempts"]["calls"] == len(world.upstream.seen) == 2
    assert told["roi"]["usd_with_cache"] == pytest.approx(dollars, rel=1e-6)
    without = told["usd_spent"] + told["usd_saved"]
    assert told["roi"]["usd_without_cache"] == pytest.approx(without)
    assert told["roi"]["saved_per_day"] is None
