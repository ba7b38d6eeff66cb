"""A second look at two vectors: their cosine after learned projections, the best of them.

A projection sees what its labelled pairs were about, so there are several, each with an offset that
puts it on the scale of the first. They lie beside the model they were trained for (`lens.npz`, half
precision) and fit no other. Plain arithmetic on arrays; a look at eight neighbours takes some
ten microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embeddings.models import EncoderError
from embeddings.vectors import Floats, unpack

__all__ = ["Lens", "open_lens"]

_FILE = "lens.npz"


class Lens:
    """`projections`: how many, by dimension of the encoder, by dimension of the projection."""

    def __init__(self, projections: Floats, offsets: Floats) -> None:
        shaped = projections.ndim == 3 and offsets.shape == projections.shape[:1]
        if not shaped or not (np.all(np.isfinite(projections)) and np.all(np.isfinite(offsets))):
            raise EncoderError("lens: no finite projections")
        self.dimension = projections.shape[1]
        self._offsets = offsets.astype(np.float32)
        # Side by side, so that one product makes all of them.
        self._matrix = np.ascontiguousarray(
            projections.astype(np.float32).transpose(1, 0, 2).reshape(self.dimension, -1)
        )

    def views(self, vectors: Floats) -> Floats:
        """Unit vectors of every projection: row, projection, dimension."""
        shape = len(vectors), len(self._offsets), self._matrix.shape[1] // len(self._offsets)
        seen = (vectors @ self._matrix).reshape(shape)
        lengths = np.linalg.norm(seen, axis=2, keepdims=True)
        scaled: Floats = seen / np.maximum(lengths, 1e-9)
        return scaled

    def compare(self, left: Floats, right: Floats) -> Floats:
        """The similarities of views, row by row; one row on a side stands for all."""
        scores = (left * right).sum(axis=2) + self._offsets
        best: Floats = np.minimum(1.0, scores.max(axis=1))
        return best

    def similarities(self, query: bytes, others: Sequence[bytes]) -> list[float | None]:
        """Of a vector in its stored form with others; None where one is missing."""
        size = 2 * self.dimension
        if len(query) != size or not others:
            return [None] * len(others)
        rows = [other if len(other) == size else query for other in others]
        seen = self.views(unpack(b"".join((query, *rows))).reshape(len(rows) + 1, -1))
        scores = self.compare(seen[:1], seen[1:]).tolist()
        return [
            score if len(other) == size else None
            for score, other in zip(scores, others, strict=True)
        ]


def open_lens(folder: Path, dimension: int) -> Lens | None:
    """The folder's lens, None where it has none. EncoderError when it is not one."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as told:
            lens = Lens(told["projections"], told["offsets"])
    except (OSError, ValueError, KeyError) as exc:
        raise EncoderError("lens: its file cannot be read") from exc
    if lens.dimension != dimension:
        raise EncoderError("lens: made for another model")
    return lens
