"""Traps through the real HTTP path: one text is stored, its trap asked, and none is served.

The packaged model, a real Valkey, the defaults. Each pair has a credential of its own, so that the
first text is all that could be served to the second; the long way round, many of one credential,
has a test of its own. The public sets take part where they lie beside the project.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
import pytest_asyncio

from benchmarks.pairs import (
    TUNING_FILES,
    Conversations,
    Pair,
    load,
    load_conversations,
    load_held_out_conversations,
)
from tests.conftest import Answered, World, world_maker

pytestmark = pytest.mark.live

AT_ONCE = 8
SAMPLE = 40
Messages = Sequence[dict[str, Any]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def world(valkey: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One sidecar for all of them."""
    make = world_maker(valkey, tmp_path_factory.mktemp("traps"))
    async with make() as made:
        yield made


async def served(world: World, pairs: Sequence[tuple[Messages, Messages]], name: str) -> list[int]:
    """The places of those pairs whose second request was answered from memory."""
    seats = asyncio.Semaphore(AT_ONCE)

    async def one(place: int) -> Answered:
        first, second = pairs[place]
        key = f"sk-{name}-{place}"
        async with seats:
            stored = await world.ask(list(first), key=key)
            assert stored.status == 200
            return await world.ask(list(second), key=key)

    found = await asyncio.gather(*(one(place) for place in range(len(pairs))))
    assert all(answered.status == 200 for answered in found)
    return [place for place, answered in enumerate(found) if answered.kind == "HIT"]


def alone(pairs: Sequence[Pair]) -> list[tuple[Messages, Messages]]:
    """As requests of one turn each."""
    return [tuple([{"role": "user", "content": text}] for text in pair[:2]) for pair in pairs]  # type: ignore[misc]


def spread(pairs: Sequence[Pair], count: int = SAMPLE) -> list[Pair]:
    """Some of all of them, evenly."""
    return list(pairs[:: max(1, len(pairs) // count)][:count])


def conversations() -> list[Conversations]:
    return load_conversations() + load_held_out_conversations()


@pytest.mark.asyncio(loop_scope="module")
async def test_no_conversation_that_differs_in_an_earlier_turn_is_served(world: World) -> None:
    """I2: the last turns are the same word for word, and everything before them is compared."""
    traps = [(chat.a, chat.b) for chat in conversations() if not chat.same]
    assert len(traps) >= 44
    assert await served(world, traps, "chat") == []


@pytest.mark.asyncio(loop_scope="module")
async def test_a_conversation_repeated_word_for_word_is_served(world: World) -> None:
    """So that the test before this one could fail."""
    again = [(chat.a, chat.a) for chat in conversations()[:10]]
    assert await served(world, again, "again") == list(range(10))


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("What about the second one?", "And what about the second one?"),
        ("Why is that so?", "Why is that?"),
        ("Tell me more about it", "Tell me more about this"),
        ("And for the other one?", "What about the other one?"),
        ("Can you explain that again?", "Could you explain that again?"),
        ("Còn cái thứ hai thì sao?", "Thế còn cái thứ hai?"),
    ],
)
async def test_a_turn_that_leans_on_another_is_matched_exactly_only(
    world: World, one: str, other: str
) -> None:
    """Alone or after the same history: what it means stands elsewhere."""
    history = [
        {"role": "user", "content": "Which two planets are nearest to the sun?"},
        {"role": "assistant", "content": "Mercury and Venus."},
    ]
    pairs = [
        (
            [*before, {"role": "user", "content": one}],
            [*before, {"role": "user", "content": other}],
        )
        for before in ([], history)
    ]
    assert await served(world, pairs, f"lean-{one.encode().hex()}") == []


@pytest.mark.asyncio(loop_scope="module")
async def test_no_vietnamese_question_gets_its_english_twins_answer_or_another_numbers(
    world: World,
) -> None:
    """Nor the other way round; twins, and the same question with its first number raised."""
    pairs = load("xquad")
    if not pairs:
        pytest.skip("the public sets are not there")
    for kind in ("language", "number"):
        some = spread([pair for pair in pairs if pair.kind == kind])
        turned = [Pair(pair.b, pair.a, *pair[2:]) for pair in some[:20]]
        assert await served(world, alone(some + turned), f"vi-{kind}") == []


@pytest.mark.asyncio(loop_scope="module")
async def test_no_sum_with_other_numbers_or_operations_is_served(world: World) -> None:
    """Of arithmetic questions that MiniLM puts above 0.92 in four cases of five."""
    pairs = load("gsmplus")
    if not pairs:
        pytest.skip("the public sets are not there")
    traps = spread([pair for pair in pairs if not pair.same], 50)
    assert await served(world, alone(traps), "sums") == []


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("name", TUNING_FILES)
async def test_own_traps_are_not_served_and_equal_questions_are(world: World, name: str) -> None:
    """Pairs that the guards were written with: what they cost, and that they cost not all. The
    packaged model does not serve Vietnamese by meaning, so nothing is kept there."""
    pairs = load(name)
    traps = spread([pair for pair in pairs if not pair.same])
    wrong = await served(world, alone(traps), f"{name}-traps")
    # A fifth of the blind pairs was made of what guards cannot see, and they still do not.
    assert len(wrong) <= (len(traps) / 10 if name.startswith("blind") else 0)
    genuine = spread([pair for pair in pairs if pair.same])
    kept = await served(world, alone(genuine), f"{name}-genuine")
    assert (len(kept) >= len(genuine) / 5) if ".en." in name else not kept


@pytest.mark.asyncio(loop_scope="module")
async def test_no_trap_is_served_among_the_answers_of_many_others(world: World) -> None:
    """One credential asks all first texts, then all traps: agreement and the look past the nearest
    must find no other way to a wrong answer. Served is at most another first text's equal."""
    traps = spread([pair for pair in load(TUNING_FILES[0]) if not pair.same])
    for pair in traps:
        await world.ask(pair.a, key="sk-many")
    wrong = []
    for pair in traps:
        answered = await world.ask(pair.b, key="sk-many")
        if answered.kind == "HIT" and answered.tier == "semantic":
            wrong.append((pair.a, pair.b))
    assert wrong == []
