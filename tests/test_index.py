"""What the index promises: the true nearest of one shelf, never a removed key, small partitions."""

from __future__ import annotations

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embeddings.index import FLAT_ABOVE, Index
from embeddings.vectors import Floats, pack, unpack

D = 16


def units(count: int, dimension: int = D, seed: int = 0) -> Floats:
    rows = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return np.stack([unpack(pack(row)) for row in rows])


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def brute(held: dict[bytes, Floats], query: Floats, k: int) -> list[float]:
    return sorted((float(v @ query) for v in held.values()), reverse=True)[:k]


class Shelves(RuleBasedStateMachine):
    """Any order of adds and removals, beside a plain dictionary. The shelf grows through all
    three forms: rows up to 4, flat up to 24, then an inverted file that trains again at 96."""

    pool = units(150, seed=1)

    def __init__(self) -> None:
        super().__init__()
        self.index = Index(D, flat_above=4, ivf_above=24)
        self.held: dict[bytes, dict[bytes, Floats]] = {}

    @rule(shelf=st.sampled_from([b"a", b"b"]), first=st.integers(0, 149), count=st.integers(1, 40))
    def add(self, shelf: bytes, first: int, count: int) -> None:
        for number in range(first, min(first + count, 150)):
            name = shelf + key(number % 120)
            self.index.add(shelf, name, self.pool[number])
            self.held.setdefault(shelf, {})[name] = self.pool[number]

    @rule(shelf=st.sampled_from([b"a", b"b", b"c"]), number=st.integers(0, 119))
    def remove(self, shelf: bytes, number: int) -> None:
        name = shelf + key(number)
        there = self.held.get(shelf, {}).pop(name, None) is not None
        assert self.index.remove(name) is there
        if not self.held.get(shelf):
            self.held.pop(shelf, None)

    @rule(shelf=st.sampled_from([b"a", b"b", b"c"]), query=st.integers(0, 149), k=st.integers(0, 9))
    def search(self, shelf: bytes, query: int, k: int) -> None:
        held = self.held.get(shelf, {})
        found = self.index.search(shelf, self.pool[query], k)
        assert {name for name, _ in found} <= set(held)
        assert len(found) == len({name for name, _ in found}) <= k
        for name, score in found:
            assert score == pytest.approx(min(1.0, float(held[name] @ self.pool[query])), abs=1e-5)
        scores = [score for _, score in found]
        assert scores == sorted(scores, reverse=True)
        expected = brute(held, self.pool[query], k)
        if len(held) <= 24:
            assert scores == pytest.approx(expected, abs=1e-3)
        elif expected and expected[0] > 0.95:  # an inverted file may miss the far, not the near
            assert scores[0] == pytest.approx(expected[0], abs=1e-3)

    @invariant()
    def counts(self) -> None:
        assert len(self.index) == sum(len(s) for s in self.held.values())
        assert self.index.shelves == len(self.held)


TestShelves = Shelves.TestCase
TestShelves.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)


@pytest.fixture
def index() -> Index:
    return Index(D)


@pytest.mark.parametrize(
    "vector",
    [
        np.full(D, np.nan, np.float32),
        np.zeros(D, np.float32),
        np.ones(D, np.float32),
        np.ones(D - 1, np.float32) / np.sqrt(D - 1),
        np.ones((1, D), np.float32) / np.sqrt(D),
    ],
    ids=["nan", "zero", "long", "narrow", "a row too many"],
)
def test_a_vector_unfit_for_cosines_is_refused_both_ways(index: Index, vector: Floats) -> None:
    """FAISS would take it in silence and answer nonsense."""
    with pytest.raises(ValueError, match="vector"):
        index.add(b"s", key(1), vector)
    with pytest.raises(ValueError, match="vector"):
        index.search(b"s", vector, 1)
    assert len(index) == 0


def test_a_search_never_leaves_its_shelf(index: Index) -> None:
    """The same text in another partition does not exist."""
    vector = units(1)[0]
    index.add(b"theirs", key(1), vector)
    assert index.search(b"ours", vector, 8) == []
    assert [name for name, _ in index.search(b"theirs", vector, 8)] == [key(1)]


@pytest.mark.parametrize("count", [1, FLAT_ABOVE, FLAT_ABOVE + 1])
def test_adding_a_key_again_replaces_it(index: Index, count: int) -> None:
    """No duplicates, in either form; the newer vector counts."""
    vectors = units(count + 1)
    for number in range(count):
        index.add(b"s", key(number), vectors[number])
    index.add(b"s", key(0), vectors[count])
    assert len(index) == count
    assert index.search(b"s", vectors[count], 1)[0][0] == key(0)


def test_a_score_is_never_above_one(index: Index) -> None:
    """Rounding to fp16 must not show as a cosine of 1.0003."""
    for number, vector in enumerate(units(50)):
        index.add(b"s", key(number), vector)
        assert index.search(b"s", vector, 1)[0][1] <= 1.0


def test_growing_changes_no_score() -> None:
    """Rows, flat and inverted file hold the same fp16 numbers."""
    vectors = units(400)
    forms = [
        Index(D, flat_above=1000),
        Index(D, flat_above=2),
        Index(D, flat_above=2, ivf_above=50),
    ]
    for form in forms:
        for number, vector in enumerate(vectors):
            form.add(b"s", key(number), vector)
    for vector in vectors[::20]:
        best: list[Any] = [form.search(b"s", vector, 3) for form in forms]
        assert best[0] == [(n, pytest.approx(s, abs=1e-5)) for n, s in best[1]]
        # The inverted file may miss a far neighbour, never the near one.
        assert best[2][0] == (best[0][0][0], pytest.approx(best[0][0][1], abs=1e-5))


def test_near_neighbours_are_found_in_a_large_shelf() -> None:
    """Above the threshold recall is whole, while the file is trained again under way."""
    rng = np.random.default_rng(7)
    centres = units(60, 64, seed=3)
    vectors = centres[rng.integers(0, 60, 5000)] + 0.1 * rng.standard_normal((5000, 64))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    index = Index(64, ivf_above=800)
    for number, vector in enumerate(vectors):
        index.add(b"s", key(number), vector)
    queries = vectors[::25] + 0.04 * rng.standard_normal((200, 64))
    queries = (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)
    near = 0
    for query in queries:
        scores = vectors @ query
        best = int(np.argmax(scores))
        if scores[best] >= 0.9:
            near += 1
            assert index.search(b"s", query, 8)[0][0] == key(best)
    assert near > 100


def test_removed_keys_stay_removed_while_the_file_is_rebuilt() -> None:
    """A key removed between two slices of the rebuild does not come back with its slice."""
    vectors = units(900)
    index = Index(D, flat_above=4, ivf_above=600)
    for number in range(602):
        index.add(b"s", key(number), vectors[number])
    for number in range(0, 600, 2):
        assert index.remove(key(number))
    for number in range(602, 700):
        index.add(b"s", key(number), vectors[number])
    found = {name for v in vectors for name, _ in index.search(b"s", v, 50)}
    assert found <= {key(n) for n in [*range(1, 602, 2), *range(600, 700)]}
    assert len(index) == 602 - 300 + 98


def test_twenty_thousand_tiny_partitions_cost_about_a_kilobyte_each() -> None:
    """One user, one partition, one entry: the usual case must not cost a FAISS object each."""
    vectors = units(100, 384)
    tracemalloc.start()
    try:
        index = Index(384)
        for number in range(20_000):
            index.add(b"shelf" + key(number), key(number), vectors[number % 100])
        current, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert current < 30_000_000
    assert index.nbytes == pytest.approx(current, rel=0.3)
    assert (index.shelves, len(index)) == (20_000, 20_000)


def test_freed_rows_are_used_again(index: Index) -> None:
    """Churn does not grow the arena."""
    vector = units(1)[0]
    for number in range(5_000):
        index.add(b"s", key(number), vector)
        assert index.remove(key(number))
    assert (len(index), index.shelves) == (0, 0)
    assert index.nbytes < 100_000


def test_clearing_forgets_everything(index: Index) -> None:
    """After a purge of all there is nothing left to propose."""
    vector = units(1)[0]
    index.add(b"s", key(1), vector)
    index.clear()
    assert index.search(b"s", vector, 1) == []
    assert (len(index), index.shelves) == (0, 0)
