"""Audits, reports and explanations, end to end."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import orjson
import pytest

import embeddings
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


async def test_the_neighbourhood_of_a_reported_hit_is_not_served_either(
    make_world: WorldMaker,
) -> None:
    """Its floor lies on the scale of the score, which lifts this pair above its bare cosine."""
    async with make_world(threshold=0.8) as world:
        stored, asked = "What is DNA for?", "What is deoxyribonucleic acid for?"
        await world.ask(stored)
        hit = await world.ask(asked)
        assert hit.tier == "semantic"
        bad = {"entry": hit.headers["x-cache-entry"], "prompt": asked}
        said = await admin(world, "/bad", bad)
        assert said["floor"] >= float(hit.headers["x-cache-similarity"])
        await world.ask(stored)
        assert (await world.ask(asked)).headers["x-cache-veto"] == "floor"


async def test_reports_of_what_is_not_stored_cost_no_hits(world: World) -> None:
    """A mistyped entry is no evidence: nothing is learnt from it about any score."""
    await world.ask(FRANCE)
    for digit in "abc":
        said = await admin(world, "/bad", {"entry": digit * 40})
        assert said == {"entry": digit * 40, "found": False, "floor": None}
    assert (await world.ask(REWORDED)).tier == "semantic"


async def test_reports_count_towards_the_threshold_also_after_a_restart(
    make_world: WorldMaker,
) -> None:
    """Two wrong hits are a pattern, whoever found them; only for the model that they were of."""
    asked = (REWORDED, "How can I reset my password?")
    async with make_world(key_prefix="reported") as world:
        await world.ask(FRANCE)
        await world.ask("How do I reset my password?")
        for text in asked:
            hit = await world.ask(text)
            body = {"entry": hit.headers["x-cache-entry"], "prompt": text}
            assert (await admin(world, "/bad", body))["found"]
        assert (await world.stats())["tightened"] == 0.96
    async with make_world(key_prefix="reported") as world:
        later = await world.ask("How do I bake a sourdough bread?")
        assert float(later.headers["x-cache-threshold"]) == 0.96
        said = await explained(world, "How do I bake a sourdough bread?")
        assert said["threshold_rests_on"] == "wrong hits, which raised it from 0.920"
        other = await world.ask("How do I bake a sourdough bread?", model="gpt-4o")
        assert float(other.headers["x-cache-threshold"]) == 0.92


async def test_one_hit_is_audited_once(make_world: WorldMaker) -> None:
    """Asked twice it would be one piece of evidence counted as two."""
    async with make_world() as world:
        world.upstream.script = constant
        await world.ask(FRANCE)
        await world.ask(REWORDED)
        assert (await admin(world, "/audit", {"n": 9}))["audited"] == 1
        assert (await admin(world, "/audit", {"n": 9}))["audited"] == 0
        assert (await world.stats())["audits"]["audited"] == 1


async def test_one_hit_is_audited_once_also_by_two_at_a_time(make_world: WorldMaker) -> None:
    """Two operators and the sampling, all while upstream thinks: one call, one label; and the hit
    that was served again meanwhile is the same evidence."""
    async with make_world(audit_share=1.0) as world:
        world.upstream.script = constant
        await world.ask(FRANCE)
        thought = asyncio.Event()

        async def thinking(seen: Seen) -> Reply:
            await thought.wait()
            return constant(seen)

        world.upstream.script = thinking
        await world.ask(REWORDED)
        await world.until(lambda: world.upstream.calls == 2)
        await world.ask(REWORDED)
        both = [asyncio.create_task(admin(world, "/audit", {"n": 9})) for _ in range(2)]
        await asyncio.sleep(0.2)
        thought.set()
        assert [told["audited"] for told in await asyncio.gather(*both)] == [0, 0]

        async def audited() -> bool:
            return bool((await world.stats())["audits"]["audited"])

        await world.until(audited)
        assert (await admin(world, "/audit", {"n": 9}))["audited"] == 0
        assert (await world.stats())["audits"]["audited"] == 1
        assert world.upstream.calls == 2


async def test_an_answer_that_was_cut_by_its_length_is_no_evidence(make_world: WorldMaker) -> None:
    """Half of the same words says nothing about the whole; what was served is never cut."""
    async with make_world() as world:
        world.upstream.script = constant
        await world.ask(FRANCE)
        assert (await world.ask(REWORDED)).tier == "semantic"

        def cut(seen: Seen) -> Reply:
            choice = {"index": 0, "message": {"role": "assistant", "content": "Not 1 but 2"}}
            return whole("", seen, choices=[choice | {"finish_reason": "length"}])

        world.upstream.script = cut
        said = await admin(world, "/audit", {"n": 5})
        assert (said["unclear"], said["audited"]) == (1, 0)
        assert (await world.ask(REWORDED)).tier == "semantic"
        assert (await world.stats())["upstream_own"]["calls"] == {"audit": 1}


async def test_answers_that_cannot_be_compared_are_no_evidence(make_world: WorldMaker) -> None:
    """What does not fit the encoder's window is neither right nor wrong, and is paid for."""

    def script(seen: Seen) -> Reply:
        return whole("一二三" * 200 + "x" * seen.number, seen)

    async with make_world() as world:
        world.upstream.script = script
        await world.ask(FRANCE)
        assert (await world.ask(REWORDED)).tier == "semantic"
        said = await admin(world, "/audit", {"n": 5})
        assert (said["unclear"], said["audited"], said["bound"]) == (1, 0, None)
        stats = await world.stats()
        assert stats["audits"]["audited"] == 0
        assert stats["upstream_own"]["calls"] == {"audit": 1}


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


async def test_a_question_in_other_words_names_the_field_of_the_nearest_partition(
    world: World,
) -> None:
    """Never asked here, and nothing is stored here: what keeps it from the answers there are."""
    await world.ask(FRANCE, temperature=0.2, max_tokens=50)
    said = await explained(world, REWORDED, temperature=0.3, max_tokens=50)
    assert (said["reason"], said["asked_before"]) == ("no_entry", False)
    assert said["differs"] == ["temperature"]
    stranger = await explained(world, FRANCE, key="sk-two", temperature=0.2, max_tokens=50)
    assert (stranger["reason"], stranger["differs"]) == ("unaccepted", ["credential"])


async def test_an_explanation_goes_by_the_request_headers_too(world: World) -> None:
    """`no-cache` and `max-age` as the proxy takes them; in shadow mode a hit is told as such."""
    await world.ask(FRANCE)
    body = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": FRANCE}]}

    async def verdict(**headers: str) -> tuple[str, str]:
        sent = {"authorization": "Bearer sk-one"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        said = await admin(world, "/explain", {"body": body, "headers": sent})
        return said["verdict"], said["reason"]

    assert await verdict() == ("hit", "")
    assert await verdict(cache_control="no-cache") == ("miss", "no_cache")
    assert await verdict(x_cache_mode="shadow") == ("shadow", "shadow")


async def test_an_explanation_says_which_neighbours_hold_the_same_answer(world: World) -> None:
    """And what the threshold rests on."""
    world.upstream.script = constant
    await world.ask(FRANCE)
    await world.ask("How do I bake a sourdough bread?")
    said = await explained(world, REWORDED)
    assert [near["agrees"] for near in said["neighbours"]] == [True, True]
    assert "benchmarks.accuracy" in said["threshold_rests_on"]


async def test_a_refused_admin_request_repeats_nothing_that_was_sent(world: World) -> None:
    """I9: what was sent may be a prompt."""
    headers = {"authorization": f"Bearer {world.token}", "content-type": "application/json"}
    for path, body in (
        ("/bad", {"entry": "my canary Zebulon"}),
        ("/bad", {"entry": "a" * 40, "prompt": {"Zebulon": 1}}),
        ("/explain", {"body": ["Zebulon"]}),
        ("/audit", {"n": "Zebulon"}),
    ):
        told = await world.send("POST", path, orjson.dumps(body), headers, base=world.admin)
        assert told.status == 422
        assert isinstance(told.json["detail"], str)
        assert "Zebulon" not in told.body.decode()


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
        await world.ask(FRANCE)  # an exact hit at any threshold
        rows = {row["threshold"]: row for row in (await world.stats())["shadow"]}
        assert (rows[0.92]["hits"], rows[0.92]["semantic"]) == (2, 1)
        assert rows[0.97]["hits"] == 1
        assert rows[0.92]["hit_rate"] == pytest.approx(2 / 3, abs=1e-6)


async def test_one_model_can_be_put_in_shadow_mode(make_world: WorldMaker) -> None:
    """Its requests are only looked up; those of others are served."""
    async with make_world(shadow_models=["gpt-4*"]) as world:
        for model, kind in (("gpt-4o", "SHADOW"), ("o3-mini", "HIT")):
            await world.ask(FRANCE, model=model)
            assert (await world.ask(FRANCE, model=model)).kind == kind
            assert (await world.ask(REWORDED, model=model)).kind == kind


async def test_an_encoder_that_nobody_calibrated_only_reports(
    make_world: WorldMaker, tmp_path: Path
) -> None:
    """It looks up by a threshold from its background, serves exact hits only, and the report
    counts its misses; a threshold that is set makes it serve."""
    folder = tmp_path / "unknown"
    shutil.copytree(Path(embeddings.__file__).parent / "minilm", folder)
    async with make_world(model=str(folder)) as world:
        world.upstream.script = constant
        await world.ask(FRANCE)
        assert (await world.ask(FRANCE)).tier == "exact"
        near, far = await world.ask(REWORDED), await world.ask("How is bread baked?")
        assert (near.kind, near.reason) == ("SHADOW", "shadow")
        assert (far.kind, far.reason) == ("SHADOW", "below_threshold")
        assert 0.5 < float(near.headers["x-cache-threshold"]) < 0.956

        async def labelled() -> bool:
            return any(row["semantic"] for row in (await world.stats())["shadow"])

        await world.until(labelled)
        rows = {row["threshold"]: row for row in (await world.stats())["shadow"]}
        assert (rows[0.9]["requests"], rows[0.9]["hits"]) == (3, 1)
        said = await explained(world, "What is the capital town of France?")
        assert "background" in said["threshold_rests_on"]
    async with make_world(model=str(folder), threshold=0.9) as world:
        await world.ask(FRANCE)
        assert (await world.ask(REWORDED)).tier == "semantic"
