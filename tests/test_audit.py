"""Audits, reports and explanations, end to end."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from tests.conftest import Answered, World, WorldMaker
from tests.scripted import Reply, Seen, whole

pytestmark = pytest.mark.live

FRANCE = "What is the capital of France?"
REWORDED = "What's the capital city of France?"


async def admin(world: World, path: str, body: Any) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {world.token}", "content-type": "application/json"}
    told = await world.send("POST", path, orjson.dumps(body), headers, base=world.admin)
    assert told.status == 200, told.body
    return told.json


async def explained(world: World, text: str, key: str = "sk-one", **fields: Any) -> dict[str, Any]:
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": text}]} | fields
    headers = {"authorization": f"Bearer {key}"}
    return await admin(world, "/explain", {"body": body, "headers": headers})


def constant(seen: Seen) -> Reply:
    return whole("Paris is the capital of France.", seen)


async def test_a_right_hit_is_audited_and_its_cost_is_counted(make_world: WorldMaker) -> None:
    """The audit asks upstream off the client's path and is no request of its own (I12)."""
    async with make_world(audit_share=1.0) as world:
        world.upstream.script = constant
        await world.ask(FRANCE)
        hit = await world.ask(REWORDED)
        assert hit.tier == "semantic"
        await world.until(lambda: world.upstream.calls == 2)

        async def audited() -> bool:
            return bool((await world.stats())["audits"]["audited"])

        await world.until(audited)
        said = await world.stats()
        assert said["audits"] == {"audited": 1, "wrong": 0, "rate": 0.0, "low": 0.0, "high": 0.975}
        assert said["requests"] == 2
        assert said["upstream_own"]["calls"] == {"audit": 1}
        assert said["upstream_own"]["usd"] > 0


async def test_a_judge_decides_where_the_words_differ(make_world: WorldMaker) -> None:
    """Its yes makes a reworded answer right, and its own cost has a row of its own."""

    def script(seen: Seen) -> Reply:
        if "single word yes or no" in seen.text:
            return whole("Yes.", seen)
        return whole(f"Paris, in the wording number {seen.number * 'x'}.", seen)

    async with make_world(audit_share=0, judge_model="gpt-4o") as world:
        world.upstream.script = script
        await world.ask(FRANCE)
        assert (await world.ask(REWORDED)).tier == "semantic"
        assert (await admin(world, "/audit", {"n": 5}))["right"] == 1
        assert (await world.stats())["upstream_own"]["calls"] == {"audit": 1, "judge": 1}
        assert world.upstream.seen[-1].key == "sk-one"


async def test_exact_hits_are_never_audited(make_world: WorldMaker) -> None:
    """They cannot be wrong in the way that audits look for."""
    async with make_world(audit_share=1.0) as world:
        for _ in range(5):
            await world.ask(FRANCE)
        assert (await admin(world, "/audit", {"n": 10}))["audited"] == 0
        assert world.upstream.calls == 1


async def test_a_wrong_hit_raises_the_floor_of_that_entry(make_world: WorldMaker) -> None:
    """What an audit showed to be wrong is not served again to such a prompt."""
    async with make_world(audit_share=0) as world:
        await world.ask(FRANCE)  # the echo answers each prompt differently
        assert (await world.ask(REWORDED)).tier == "semantic"
        assert (await admin(world, "/audit", {"n": 5}))["wrong"] == 1
        assert (await world.ask(REWORDED)).kind == "MISS"
        assert (await world.stats())["audits"]["wrong"] == 1


async def test_two_wrong_hits_tighten_the_threshold(make_world: WorldMaker) -> None:
    """The policy tightens by itself once the bound passes the budget."""
    async with make_world(audit_share=0) as world:
        await world.ask(FRANCE)
        await world.ask("How do I reset my password?")
        for text in (REWORDED, "How can I reset my password?"):
            assert (await world.ask(text)).tier == "semantic"
        await admin(world, "/audit", {"n": 5})
        later = await world.ask("How do I bake a sourdough bread?")
        assert float(later.headers["x-cache-threshold"]) > 0.92


async def test_a_reported_hit_is_never_served_again(world: World) -> None:
    """Not the pair, nor a prompt as near, nor after the answer was stored anew."""
    await world.ask(FRANCE)
    hit = await world.ask(REWORDED)
    said = await admin(world, "/bad", {"entry": hit.headers["x-cache-entry"], "prompt": REWORDED})
    assert said["found"] is True
    assert (await world.ask(FRANCE)).kind == "MISS"  # purged, and stored anew by this
    assert (await world.ask(REWORDED)).kind == "MISS"
    assert (await world.ask(FRANCE)).tier == "exact"


async def test_a_miss_is_explained_by_the_guard_that_objected(world: World) -> None:
    """The reason, the neighbour and the one thing that would change it."""
    await world.ask("How do I turn on dark mode?")
    calls = world.upstream.calls
    said = await explained(world, "How do I turn off dark mode?")
    assert (said["verdict"], said["reason"]) == ("miss", "guard")
    assert said["neighbours"][0]["guards"]["antonyms"] is True
    assert "antonyms" in said["change"]
    assert world.upstream.calls == calls


async def test_a_miss_that_should_have_hit_names_the_field_that_differs(world: World) -> None:
    """The same question under another temperature lies in another partition."""
    await world.ask(FRANCE, temperature=0.2)
    said = await explained(world, FRANCE, temperature=0.3)
    assert said["verdict"] == "miss"
    assert said["differs"] == ["temperature"]


async def test_an_explanation_shows_no_prompt(world: World) -> None:
    """Not even the operator's page repeats what users wrote (I9)."""
    await world.ask("My canary is called Zebulon, what does it eat?")
    said = await explained(world, "My canary is called Zebulon, what does it drink?")
    assert "Zebulon" not in orjson.dumps(said).decode()


async def test_shadow_mode_reports_what_each_threshold_would_have_served(
    make_world: WorldMaker,
) -> None:
    """Answers come from upstream; the hit and wrong rates that would have been are counted."""
    async with make_world(shadow=True) as world:
        world.upstream.script = constant
        asked: list[Answered] = [await world.ask(FRANCE), await world.ask(REWORDED)]
        assert [answer.kind for answer in asked] == ["SHADOW", "SHADOW"]

        async def labelled() -> bool:
            rows = (await world.stats())["shadow"]
            return any(row["hits"] for row in rows)

        await world.until(labelled)
        rows = {row["threshold"]: row for row in (await world.stats())["shadow"]}
        assert (rows[0.92]["hits"], rows[0.92]["wrong"], rows[0.92]["hit_rate"]) == (1, 0, 0.5)
        assert rows[0.97]["hits"] == 0
