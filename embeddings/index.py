"""The nearest of those seen before, one shelf a partition: a search never leaves its shelf.

A shelf starts as bare fp16 rows in a shared arena (most partitions hold one entry and must cost
1 kB, not a FAISS object), becomes a flat FAISS index, then an inverted file. The stored numbers
are the same fp16 in all three, so growing changes no score.

Belongs to one thread: FAISS segfaults on an add beside a search, and there is no lock here. Does no
I/O. Checks everything itself, because FAISS takes NaN and duplicates in silence and checks
dimensions by `assert`, which -O removes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.vectors import Floats, unpack

__all__ = ["FLAT_ABOVE", "IVF_ABOVE", "Index", "unpack"]

FLAT_ABOVE = 64  # rows; below, a Python loop over rows costs less than a FAISS object weighs
IVF_ABOVE = 10_000  # entries; a flat search costs 1.4 ms there and grows with each entry
_REGROW = 4  # times the size it was trained at: train again
_SAMPLE = 32  # vectors a list to train on; training is the one step that holds up queries
_SLICE = 256  # entries moved to the retrained file with each add: some ms, never a stall
_BLOCK = 1024  # rows of the arena that are allocated at a time
_LENGTH_TOLERANCE = 5e-3  # fp16 rounding moves a length by about 1e-4
_OVERHEAD = 250  # bytes an entry besides its vector: key, maps; measured
_SHELF_OVERHEAD = 200

Neighbours = list[tuple[bytes, float]]


class Index:
    """Keys (opaque bytes) by shelf and vector. A key lies on one shelf; adding it again moves it.

    The thresholds between the three forms are arguments for tests only.
    """

    def __init__(
        self, dimension: int, *, flat_above: int = FLAT_ABOVE, ivf_above: int = IVF_ABOVE
    ) -> None:
        self.dimension = dimension
        self._flat_above = flat_above
        self._ivf_above = ivf_above
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._arena = _Arena(self.dimension)
        self._shelves: dict[bytes, tuple[int, ...] | _Large] = {}
        self._shelf_of: dict[bytes, bytes] = {}  # who removes knows the key only

    def add(self, shelf: bytes, key: bytes, vector: Floats) -> None:
        """ValueError unless `vector` is finite, of unit length and of this index's dimension."""
        row = self._checked(vector).astype(np.float16)
        self.remove(key)
        held = self._shelves.get(shelf, ())
        if isinstance(held, tuple) and len(held) >= self._flat_above:
            held = self._shelves[shelf] = self._enlarged(held)
        if isinstance(held, tuple):
            self._shelves[shelf] = (*held, self._arena.put(key, row))
        else:
            held.add(key, row.astype(np.float32))
        self._shelf_of[key] = shelf

    def search(self, shelf: bytes, vector: Floats, k: int) -> Neighbours:
        """At most `k` keys of the shelf with their cosine, best first. ValueError as for `add`."""
        query = self._checked(vector)
        held = self._shelves.get(shelf)
        if held is None or k < 1:
            return []
        if isinstance(held, tuple):
            return self._arena.nearest(held, query, k)
        return held.search(query, k)

    def remove(self, key: bytes) -> bool:
        """Whether it was there."""
        shelf = self._shelf_of.pop(key, None)
        if shelf is None:
            return False
        held = self._shelves[shelf]
        if isinstance(held, tuple):
            left = tuple(r for r in held if self._arena.keys[r] != key)
            self._arena.free(set(held).difference(left))
            held = self._shelves[shelf] = left
        else:
            held.remove(key)
        if not held:
            del self._shelves[shelf]
        return True

    def __len__(self) -> int:
        return len(self._shelf_of)

    @property
    def shelves(self) -> int:
        return len(self._shelves)

    @property
    def nbytes(self) -> int:
        """About what it occupies, objects included."""
        large = sum(len(held) for held in self._shelves.values() if isinstance(held, _Large))
        return (
            self._arena.nbytes
            + large * self.dimension * 2
            + len(self) * _OVERHEAD
            + len(self._shelves) * _SHELF_OVERHEAD
        )

    def _enlarged(self, rows: tuple[int, ...]) -> _Large:
        large = _Large(self.dimension, self._ivf_above)
        for row in rows:
            large.add(self._arena.keys[row], self._arena.vector(row))
        self._arena.free(rows)
        return large

    def _checked(self, vector: Floats) -> Floats:
        if vector.shape != (self.dimension,):
            raise ValueError(f"a vector of shape {vector.shape} in an index of {self.dimension}")
        # Written so that NaN fails it.
        if not abs(float(np.linalg.norm(vector)) - 1.0) <= _LENGTH_TOLERANCE:
            raise ValueError("a vector that is not of unit length")
        return vector


class _Arena:
    """Rows of all small shelves, in blocks so that growing copies nothing."""

    def __init__(self, dimension: int) -> None:
        self.keys: list[bytes] = []  # by row; b"" where free
        self._dimension = dimension
        self._blocks: list[NDArray[np.float16]] = []
        self._free: list[int] = []

    def put(self, key: bytes, row: NDArray[np.float16]) -> int:
        if self._free:
            number = self._free.pop()
            self.keys[number] = key
        else:
            number = len(self.keys)
            if number % _BLOCK == 0:
                self._blocks.append(np.zeros((_BLOCK, self._dimension), dtype=np.float16))
            self.keys.append(key)
        self._blocks[number // _BLOCK][number % _BLOCK] = row
        return number

    def vector(self, number: int) -> Floats:
        vector: Floats = self._blocks[number // _BLOCK][number % _BLOCK].astype(np.float32)
        return vector

    def free(self, numbers: Sequence[int] | set[int]) -> None:
        for number in numbers:
            self.keys[number] = b""
        self._free.extend(numbers)

    def nearest(self, numbers: tuple[int, ...], query: Floats, k: int) -> Neighbours:
        rows = np.stack([self._blocks[n // _BLOCK][n % _BLOCK] for n in numbers])
        scores = rows.astype(np.float32) @ query
        best = np.argsort(-scores, kind="stable")[:k]
        return [(self.keys[numbers[i]], _cosine(scores[i])) for i in best]

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)


class _Large:
    """One shelf in FAISS: flat, then an inverted file that is trained again as it grows.

    Training again fills a successor slice by slice, an old slice with each add, while the present
    file goes on answering; a rebuild in one go would hold up every query for seconds.
    """

    def __init__(self, dimension: int, ivf_above: int) -> None:
        import faiss

        faiss.omp_set_num_threads(1)  # of this thread; the other core belongs to the event loop
        self._faiss = faiss
        self._dimension = dimension
        self._ivf_above = ivf_above
        self._index = faiss.IndexIDMap(
            faiss.IndexScalarQuantizer(
                dimension, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
            )
        )
        self._next = 0  # ids are never used twice, so a stale one can only find nothing
        self._grow_at = ivf_above
        self._keys: dict[int, bytes] = {}
        self._ids: dict[bytes, int] = {}
        self._successor: Any = None
        self._to_move: list[int] = []

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, key: bytes, vector: Floats) -> None:
        number = self._next
        self._next += 1
        self._keys[number] = key
        self._ids[key] = number
        for index in self._both():
            index.add_with_ids(vector[None], np.array([number], dtype=np.int64))
        if self._successor is not None:
            self._move()
        elif len(self._ids) > self._grow_at:
            self._begin()

    def remove(self, key: bytes) -> None:
        number = self._ids.pop(key)
        del self._keys[number]
        for index in self._both():
            # The array selector is the one that the inverted file's id table can use. Removing
            # from the successor what was not moved yet removes nothing.
            index.remove_ids(self._faiss.IDSelectorArray(np.array([number], dtype=np.int64)))

    def search(self, query: Floats, k: int) -> Neighbours:
        scores, numbers = self._index.search(query[None], min(k, len(self._ids)))
        found = zip(numbers[0].tolist(), scores[0].tolist(), strict=True)
        # FAISS fills what it did not find with id -1.
        return [(self._keys[n], _cosine(s)) for n, s in found if n in self._keys]

    def _both(self) -> tuple[Any, ...]:
        return (self._index,) if self._successor is None else (self._index, self._successor)

    def _begin(self) -> None:
        """Train a successor on a sample; from here on each add moves a slice into it."""
        numbers = list(self._keys)
        lists = max(16, math.isqrt(len(numbers)))
        step = max(1, len(numbers) // (_SAMPLE * lists))
        sample = self._vectors(numbers[::step])
        self._successor = _trained(self._faiss, sample, lists)
        self._to_move = numbers
        self._grow_at = len(numbers) * _REGROW

    def _move(self) -> None:
        part, self._to_move = self._to_move[-_SLICE:], self._to_move[:-_SLICE]
        part = [n for n in part if n in self._keys]  # removed meanwhile
        if part:
            self._successor.add_with_ids(self._vectors(part), np.array(part, dtype=np.int64))
        if not self._to_move:
            self._index, self._successor = self._successor, None

    def _vectors(self, numbers: Sequence[int]) -> Floats:
        """Exactly the stored values: fp16 decodes without loss."""
        if not isinstance(self._index, self._faiss.IndexIDMap):
            batch: Floats = self._index.reconstruct_batch(np.array(numbers, dtype=np.int64))
            return batch
        order = self._faiss.vector_to_array(self._index.id_map)
        place = {n: i for i, n in enumerate(order.tolist())}
        flat = self._index.index
        return np.stack([flat.reconstruct(place[n]) for n in numbers]).astype(np.float32)


def _trained(faiss: Any, sample: Floats, lists: int) -> Any:
    index = faiss.IndexIVFScalarQuantizer(
        coarse := faiss.IndexFlatIP(sample.shape[1]),
        sample.shape[1],
        lists,
        faiss.ScalarQuantizer.QT_fp16,
        faiss.METRIC_INNER_PRODUCT,
        False,  # the vectors themselves, not residuals: same scores as in the other two forms
    )
    index.own_fields = True  # the C++ side frees the coarse quantizer
    coarse.this.disown()
    index.cp.niter = 4  # recall near the threshold is 1.0 already
    index.cp.min_points_per_centroid = 1  # it complains on stderr below 39
    index.cp.spherical = True
    index.train(sample)
    index.set_direct_map_type(faiss.DirectMap.Hashtable)  # removal in 10 us instead of a scan
    # A paraphrase close enough to matter lies in the query's own list or in one beside it.
    index.nprobe = max(8, lists // 8)
    return index


def _cosine(score: float) -> float:
    """fp16 rounding can put equal texts a hair above one."""
    return min(1.0, float(score))
