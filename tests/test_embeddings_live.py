"""Embeddings through the proxy: each input is looked up by itself, and only the unknown are asked.

Real sockets and the real Valkey; the vectors are the scripted upstream's own, so that each tells
which call it came from.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conftest import Answered, World, WorldMaker
from tests.scripted import Reply, Seen, echo, vectors

pytestmark = pytest.mark.live

HEADERS = {"content-type": "application/json", "authorization": "Bearer sk-one"}


async def embed(
    world: World, given: Any, headers: dict[str, str] | None = None, **fields: Any
) -> Answered:
    body = orjson.dumps({"model": "text-embedding-3-small", "input": given} | fields)
    return await world.send("POST", "/v1/embeddings", body, HEADERS | (headers or {}))


def vectors_of(answered: Answered) -> list[list[float]]:
    data = answered.json["data"]
    assert [item["index"] for item in data] == list(range(len(data)))
    return [item["embedding"] for item in data]


def told(text: str, call: int) -> list[float]:
    """The vector that the scripted upstream gives `text` in its call number `call`."""
    return [len(text) / 100, 0.5, call]


async def test_a_batch_of_a_hundred_with_ninety_known_asks_for_ten(make_world: WorldMaker) -> None:
    """Only the unknown inputs go upstream, in their order; the answer is whole and in the order of
    the request, and its usage is what all hundred cost."""
    texts = [f"sentence {n} " + "x" * n for n in range(100)]
    fresh = [3, 4, 17, 30, 31, 50, 68, 77, 98, 99]
    known = [n for n in range(100) if n not in fresh]
    async with make_world(model="none") as world:
        first = await embed(world, [texts[n] for n in reversed(known)])
        mixed = await embed(world, texts)
        again = await embed(world, texts)

        assert [a.kind for a in (first, mixed, again)] == ["MISS", "MISS", "HIT"]
        assert mixed.reason == "partial"
        assert world.upstream.seen[1].json["input"] == [texts[n] for n in fresh]
        assert world.upstream.calls == 2
        expected = [told(text, 2 if n in fresh else 1) for n, text in enumerate(texts)]
        assert vectors_of(mixed) == vectors_of(again) == expected
        spent = sum(seen.usage["prompt_tokens"] for seen in world.upstream.seen)
        assert mixed.json["usage"] == again.json["usage"]
        assert again.json["usage"] == {"prompt_tokens": spent, "total_tokens": spent}
        assert mixed.headers["content-length"] == str(len(mixed.body))


async def test_a_hit_is_the_answer_that_was_stored(make_world: WorldMaker) -> None:
    """Digits, model name and form are upstream's, whichever batch an input came in."""
    body = (
        b'{"object":"list","data":[{"object":"embedding","index":0,"embedding":[0.10,-1e-05,3.0]}],'
        b'"model":"text-embedding-3-small-v2","usage":{"prompt_tokens":2,"total_tokens":2}}'
    )
    async with make_world(model="none") as world:
        world.upstream.script = lambda seen: Reply(parts=(body,))
        miss, hit = await embed(world, "one"), await embed(world, ["one"])
        assert miss.body == body
        assert (hit.kind, hit.tier) == ("HIT", "exact")
        assert b"[0.10,-1e-05,3.0]" in hit.body
        assert hit.json == miss.json
        assert hit.headers["content-type"] == "application/json"
        assert len(hit.headers["x-cache-entry"]) == 40


async def test_an_order_of_its_own_is_put_right(make_world: WorldMaker) -> None:
    """Upstream may list vectors in any order; `index` says whose each is."""

    def shuffled(seen: Seen) -> Reply:
        document = orjson.loads(vectors(seen).parts[0])
        document["data"].reverse()
        return Reply(parts=(orjson.dumps(document),))

    async with make_world(model="none") as world:
        world.upstream.script = shuffled
        await embed(world, ["a", "bb", "ccc"])
        for text in ("a", "bb", "ccc"):
            assert vectors_of(await embed(world, text)) == [told(text, 1)]
        mixed = await embed(world, ["dddd", "a", "eeeee"])
        assert vectors_of(mixed) == [told("dddd", 2), told("a", 1), told("eeeee", 2)]


async def test_arrays_of_tokens_are_inputs_too(make_world: WorldMaker) -> None:
    """One array of tokens is one input, several are several, and tokens are not their spelling."""
    async with make_world(model="none") as world:
        one = await embed(world, [9906, 1917])
        both = await embed(world, [[9906, 1917], [1, 2, 3]])
        spelt = await embed(world, "[9906,1917]")
        assert [a.kind for a in (one, both, spelt)] == ["MISS", "MISS", "MISS"]
        assert world.upstream.seen[0].json["input"] == [9906, 1917]
        assert world.upstream.seen[1].json["input"] == [[1, 2, 3]]
        assert vectors_of(both)[0] == vectors_of(one)[0]
        assert world.upstream.calls == 3


async def test_what_shapes_a_vector_partitions(make_world: WorldMaker) -> None:
    """I2: dimensions, encoding, model and unknown fields are equal or it is another question."""
    async with make_world(model="none") as world:
        await embed(world, "hello")
        for fields in (
            {"dimensions": 256},
            {"dimensions": 512},
            {"encoding_format": "base64"},
            {"model": "text-embedding-3-large"},
            {"input_type": "query"},
        ):
            assert (await embed(world, "hello", **fields)).kind == "MISS"
            assert (await embed(world, "hello", **fields)).kind == "HIT"
        for spelling in ("hello ", "Hello", "hello\n"):
            assert (await embed(world, spelling)).kind == "MISS"
        stranger = {"authorization": "Bearer sk-two"}
        assert (await embed(world, "hello", stranger)).reason == "unaccepted"
        assert (await embed(world, "hello")).kind == "HIT"


async def test_an_input_given_twice_is_answered_twice(make_world: WorldMaker) -> None:
    """Duplicates in a batch each get their vector, asked or known, and the places stay right."""
    async with make_world(model="none") as world:
        first = await embed(world, ["a", "bb", "a"])
        assert vectors_of(first) == [told("a", 1), told("bb", 1), told("a", 1)]
        mixed = await embed(world, ["bb", "ccc", "a", "ccc", "a"])
        assert world.upstream.calls == 2
        assert set(world.upstream.seen[1].json["input"]) == {"ccc"}
        expected = [told("bb", 1), told("ccc", 2), told("a", 1), told("ccc", 2), told("a", 1)]
        assert vectors_of(mixed) == expected
        known = await embed(world, ["ccc", "a", "ccc"])
        assert (known.kind, world.upstream.calls) == ("HIT", 2)
        assert vectors_of(known) == [told("ccc", 2), told("a", 1), told("ccc", 2)]


async def test_directives_hold_for_embeddings(make_world: WorldMaker) -> None:
    """The same headers mean the same here: anew, past the cache, or only from it."""
    async with make_world(model="none") as world:
        nothing = await embed(world, "a", {"cache-control": "only-if-cached"})
        assert (nothing.status, nothing.headers["x-should-retry"]) == (504, "false")
        assert world.upstream.calls == 0
        await embed(world, "a")
        assert (await embed(world, "a", {"cache-control": "only-if-cached"})).kind == "HIT"
        partly = await embed(world, ["a", "b"], {"cache-control": "only-if-cached"})
        assert (partly.status, world.upstream.calls) == (504, 1)
        for headers, kind in (
            ({"cache-control": "no-store"}, "BYPASS"),
            ({"x-cache-mode": "off"}, "BYPASS"),
            ({"x-cache-namespace": "b"}, "MISS"),
            ({"cache-control": "no-cache"}, "REFRESH"),
        ):
            assert (await embed(world, "a", headers)).kind == kind
        assert vectors_of(await embed(world, "a")) == [told("a", world.upstream.calls)]
        assert all(
            not [name for name in seen.headers if name.startswith("x-cache")]
            for seen in world.upstream.seen
        )


async def test_shadow_only_tells(make_world: WorldMaker) -> None:
    """In shadow mode, by header or by setting, upstream answers although the vector is known."""
    async with make_world(model="none") as world:
        await embed(world, "a")
        shadow = await embed(world, "a", {"x-cache-mode": "shadow"})
        assert (shadow.kind, vectors_of(shadow)) == ("SHADOW", [told("a", 2)])
        partly = await embed(world, ["a", "bb"], {"x-cache-mode": "shadow"})
        assert vectors_of(partly) == [told("a", 3), told("bb", 3)]
    async with make_world(model="none", shadow=True) as world:
        kinds = [(await embed(world, "a")).kind for _ in range(2)]
        assert (kinds, world.upstream.calls) == (["SHADOW", "SHADOW"], 2)


def _without_usage(seen: Seen) -> Reply:
    document = orjson.loads(vectors(seen).parts[0])
    del document["usage"]
    return Reply(parts=(orjson.dumps(document),))


def _one_too_few(seen: Seen) -> Reply:
    document = orjson.loads(vectors(seen).parts[0])
    del document["data"][0]
    return Reply(parts=(orjson.dumps(document),))


def _with_members_of_its_own(seen: Seen) -> Reply:
    document = orjson.loads(vectors(seen).parts[0])
    for item in document["data"]:
        item["sparse"] = {"7": 0.5}
    return Reply(parts=(orjson.dumps(document),))


def _all_of_one_index(seen: Seen) -> Reply:
    document = orjson.loads(vectors(seen).parts[0])
    for item in document["data"]:
        item["index"] = 0
    return Reply(parts=(orjson.dumps(document),))


@pytest.mark.parametrize(
    "script",
    [
        _one_too_few,
        _with_members_of_its_own,
        _all_of_one_index,
        lambda seen: replace(vectors(seen), status=500),
        lambda seen: replace(vectors(seen), status=201),
        lambda seen: Reply(parts=(b'{"error":{"message":"busy"}}',)),
        lambda seen: Reply(parts=(b"<html>",)),
    ],
    ids=["one too few", "own members", "one index", "500", "201", "an error in a 200", "no JSON"],
)
async def test_only_a_good_answer_is_taken_apart_and_kept(
    make_world: WorldMaker, script: Any
) -> None:
    """I4: what is not exactly one vector an input is passed on as it is, and asked again."""
    async with make_world(model="none") as world:
        await embed(world, "so that the key is known to be good")
        world.upstream.script = script
        first = await embed(world, ["a", "bb"])
        second = await embed(world, ["a", "bb"])
        assert [a.kind for a in (first, second)] == ["MISS", "MISS"]
        assert world.upstream.calls == 3
        sent = script(world.upstream.seen[1])
        assert (first.status, first.body) == (sent.status, sent.parts[0])


async def test_a_partial_batch_that_fails_is_upstreams_own_error(make_world: WorldMaker) -> None:
    """Half an answer helps nobody: upstream's status, body and retry-after are the client's."""
    body = b'{"error":{"message":"slow down","type":"requests","param":null,"code":"rate"}}'
    async with make_world(model="none") as world:
        await embed(world, "a")
        world.upstream.script = lambda seen: Reply(
            429, (body,), (("content-type", "application/json"), ("retry-after", "3"))
        )
        failed = await embed(world, ["a", "bb"])
        assert (failed.status, failed.body) == (429, body)
        assert failed.headers["retry-after"] == "3"
        world.upstream.script = echo
        assert vectors_of(await embed(world, ["a", "bb"]))[0] == told("a", 1)


async def test_an_answer_without_usage_still_counts_as_known(make_world: WorldMaker) -> None:
    """Local servers name no usage: the vectors are kept all the same, and none is made up."""
    async with make_world(model="none") as world:
        world.upstream.script = _without_usage
        await embed(world, ["a", "bb"])
        hit = await embed(world, ["bb", "a"])
        assert hit.kind == "HIT"
        assert vectors_of(hit) == [told("bb", 1), told("a", 1)]
        assert "x-cache-saved-usd" not in hit.headers


async def test_what_is_saved_and_spent_adds_up(make_world: WorldMaker, tmp_path: Path) -> None:
    """I12: one request, one outcome; known inputs are tokens saved, asked ones tokens spent."""
    prices = tmp_path / "prices.toml"
    prices.write_text('[[price]]\nmodel = "text-embedding-3-*"\ninput = 0.02\n')
    async with make_world(model="none", prices=prices) as world:
        await embed(world, ["aaaa", "bbbbbb"])
        await embed(world, ["aaaa", "cc"])
        hit = await embed(world, ["cc", "bbbbbb"])
        assert float(hit.headers["x-cache-saved-usd"]) == pytest.approx(8 * 0.02 / 1e6)

        seen = await world.stats()
        spent = sum(s.usage["prompt_tokens"] for s in world.upstream.seen)
        assert (seen["requests"], seen["misses"], seen["hits"]["exact"]) == (3, 2, 1)
        assert seen["tokens_spent"]["input"] == spent == 12
        assert seen["tokens_saved"]["input"] == 4 + (2 + 6)
        assert seen["usd_spent"] == seen["usd_saved"] == pytest.approx(12 * 0.02 / 1e6)


async def test_what_the_cache_may_not_touch_is_spent_all_the_same(make_world: WorldMaker) -> None:
    """I12: a bypass and an answer that cannot be taken apart cost money, and it is counted."""
    async with make_world(model="none") as world:
        await embed(world, "aaaa", {"cache-control": "no-store"})
        world.upstream.script = _with_members_of_its_own
        await embed(world, "bbbbbb")
        spent = sum(s.usage["prompt_tokens"] for s in world.upstream.seen)
        assert (await world.stats())["tokens_spent"]["input"] == spent == 10


async def test_the_same_batch_at_once_is_one_call(make_world: WorldMaker) -> None:
    """Identical batches in flight share one call, and each gets its own whole answer."""
    async with make_world(model="none") as world:
        await embed(world, "a")
        world.upstream.script = lambda seen: replace(vectors(seen), delay=0.3)
        answers = await asyncio.gather(*(embed(world, ["bb", "a", "ccc"]) for _ in range(4)))
        assert world.upstream.calls == 2
        for answered in answers:
            assert vectors_of(answered) == [told("bb", 2), told("a", 1), told("ccc", 2)]
        assert sum(a.headers.get("x-cache-collapsed") == "1" for a in answers) == 3
