"""What the ledger promises: every request counted once, and money that an auditor would find too.

The auditor here knows only what upstream wrote down and what clients got, and prices it with the
public price table itself.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from genai_prices import Usage as Bill
from genai_prices import calc_price

from tests.conftest import Answered, World, WorldMaker
from tests.rawhttp import Line, chat, post
from tests.scripted import Reply, Seen, completion, echo, streamed, whole

pytestmark = pytest.mark.live

MODELS = ("gpt-4o-mini", "gpt-4.1", "o4-mini")
TOPICS = ("France", "Spain", "Italy", "Norway", "Japan", "Peru", "Kenya", "Chile", "Cuba", "Egypt")


def script(seen: Seen) -> Reply | Any:
    """Answers of different lengths, some cached input, some errors, and some that take a while."""
    if seen.method != "POST":
        return echo(seen)
    dice = random.Random(seen.number)
    text = seen.text
    if "forbidden" in text:
        return Reply(status=429, parts=(b'{"error":{"message":"slow down"}}',))
    if "cut" in text:
        reply = streamed("this will not end", seen)
        seen.usage = {}
        return Reply(parts=reply.parts[:3], headers=reply.headers, cut=True)
    seen.answered = f"answer {seen.number} " + "word " * dice.randrange(40)
    if seen.json.get("stream"):
        reply = streamed(seen.answered, seen)
        if "slow" in text:
            reply.pause = 0.1
        return reply
    if not seen.path.endswith("/chat/completions"):
        return echo(seen)
    usage = completion(seen.answered, seen)["usage"]
    if dice.random() < 0.5:
        usage = usage | {"prompt_tokens_details": {"cached_tokens": usage["prompt_tokens"] // 2}}
    reply = whole(seen.answered, seen, usage=usage)
    if "slow" in text:  # and those that nobody waits for are never answered
        reply.delay = 60 if "Nor for" in text else 0.15
    return reply


def priced(usage: dict[str, Any], model: str) -> float:
    bill = Bill(
        input_tokens=usage["prompt_tokens"],
        output_tokens=usage["completion_tokens"],
        cache_read_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
    )
    return float(calc_price(bill, model, provider_id="openai").total_price)


class Auditor:
    """What clients got, request by request."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.kinds: Counter[str] = Counter()
        self.saved: list[tuple[str, str]] = []  # the answer's own token and its model
        self.left = 0  # clients that hung up

    async def ask(self, text: str, model: str = MODELS[0], **fields: Any) -> Answered:
        answered = await self.world.ask(text, model=model, **fields)
        shared = "x-cache-collapsed" in answered.headers
        if answered.kind == "HIT":
            self.kinds["hit." + answered.tier] += 1
        elif answered.status == 400 or answered.reason == "upstream":
            self.kinds["error"] += 1
        else:
            self.kinds["bypass" if answered.kind == "BYPASS" else "miss"] += 1
            self.kinds["collapsed"] += shared
        if answered.kind == "HIT" or shared:
            self.saved.append((answered.text, model))
        return answered

    async def leave(self, text: str, *, stream: bool) -> None:
        async with Line(self.world.base) as line:
            line.send(post(chat(text, stream=stream), key="sk-one"))
            if stream:
                await line.head()
            calls = self.world.upstream.calls
            await self.world.until(
                lambda: any(text in seen.body.decode() for seen in self.world.upstream.seen)
            )
            assert calls <= self.world.upstream.calls
            line.hang_up()
        self.kinds["miss"] += 1
        self.left += 1


async def test_a_mixed_run_adds_up_to_the_request_and_to_the_cent(make_world: WorldMaker) -> None:
    """I12: hits, misses, bypasses and errors are all there is; tokens saved and spent are what
    upstream's own log says, and dollars within 0.1 %."""
    dice = random.Random(11)
    async with make_world() as world:
        world.upstream.script = script
        auditor = Auditor(world)
        await mixed_run(auditor, dice)
        await world.until(lambda: all(seen.ended.is_set() for seen in world.upstream.seen))
        asked = auditor.kinds.total() - auditor.kinds["collapsed"]
        assert asked >= 300

        async def all_counted() -> bool:
            return bool((await world.stats())["requests"] >= asked)

        await world.until(all_counted)
        told = await world.stats()
        by_model = (await world.stats("model"))["by"]

    hits, bypassed = sum(told["hits"].values()), sum(told["bypasses"].values())
    assert told["requests"] == asked
    assert hits + told["misses"] + bypassed + told["errors"] == told["requests"]
    kinds = auditor.kinds
    assert told["hits"] == {"exact": kinds["hit.exact"], "semantic": kinds["hit.semantic"]}
    assert (told["misses"], bypassed) == (kinds["miss"], kinds["bypass"])
    assert (told["errors"], told["collapsed"]) == (kinds["error"], kinds["collapsed"])
    for kind in ("hit.exact", "hit.semantic", "miss", "bypass", "error", "collapsed"):
        assert kinds[kind] > 0, kind
    assert auditor.left > 0

    # Every call is counted once, those that clients left included.
    assert told["upstream_attempts"]["calls"] == len(world.upstream.seen)
    assert told["upstream_attempts"]["retries"] == 0

    # What was spent: all that upstream answered to its end, bypasses included.
    billed = [
        seen
        for seen in world.upstream.seen
        if seen.usage and seen.aborted_at is None and seen.method == "POST"
    ]
    assert told["tokens_spent"] == {
        "input": sum(seen.usage["prompt_tokens"] for seen in billed),
        "output": sum(seen.usage["completion_tokens"] for seen in billed),
    }
    spent = sum(priced(seen.usage, seen.json["model"]) for seen in billed)
    assert told["usd_spent"] == pytest.approx(spent, rel=1e-3)
    assert spent > 0

    # What was saved: what each answer served again had cost when it was made.
    made = {seen.answered: seen for seen in billed}
    sources = [(made[text], model) for text, model in auditor.saved]
    assert told["tokens_saved"] == {
        "input": sum(seen.usage["prompt_tokens"] for seen, _ in sources),
        "output": sum(seen.usage["completion_tokens"] for seen, _ in sources),
    }
    saved = sum(priced(seen.usage, model) for seen, model in sources)
    assert told["usd_saved"] == pytest.approx(saved, rel=1e-3)
    assert saved > 0

    assert sum(group["requests"] for group in by_model) == told["requests"]
    assert sum(group["usd_spent"] or 0 for group in by_model) == pytest.approx(told["usd_spent"])


async def mixed_run(auditor: Auditor, dice: random.Random) -> None:
    """Over three hundred requests, one after the other and at once."""
    world = auditor.world
    for topic in TOPICS:
        for model in MODELS:
            await auditor.ask(f"What is the capital of {topic}?", model)
    for _ in range(120):
        text = f"What is the capital of {dice.choice(TOPICS)}?"
        await auditor.ask(text, dice.choice(MODELS), stream=dice.random() < 0.5)
    for topic in TOPICS:
        await auditor.ask(f"What's the capital city of {topic}?")
        await auditor.ask(f"What happens in {topic} today?", stream=dice.random() < 0.5)
        await auditor.ask(f"A poem on {topic}", headers={"cache-control": "no-store"})
        await auditor.ask(f"What is the capital of {topic}?", headers={"cache-control": "no-cache"})
        await auditor.ask(f"A forbidden word on {topic}")
        await auditor.ask(f"What is the capital of {topic}?", temperature=9)
        answered = await world.send("GET", f"/v1/models/{topic}")
        auditor.kinds["bypass" if answered.kind == "BYPASS" else "?"] += 1
        answered = await world.send("POST", "/v1/chat/completions", b'{"model":')
        auditor.kinds["error" if answered.status == 400 else "?"] += 1
        only = {"cache-control": "only-if-cached"}
        await auditor.ask(f"Never asked before: {topic}", headers=only)
        async with Line(world.base) as line:
            line.send(post(chat(f"A story of {topic}, cut", stream=True), key="sk-one"))
            assert not (await line.answer()).whole
        auditor.kinds["miss"] += 1
    for number in range(4):
        for stream in (False, True):
            text = f"A slow question, number {number}{'s' if stream else ''}"
            await asyncio.gather(*[auditor.ask(text, stream=stream) for _ in range(8)])
    for number in range(5):
        await auditor.leave(f"Nobody waits for this slow one, {number}", stream=True)
        await auditor.leave(f"Nor for that slow one, {number}", stream=False)
