"""A second look at two vectors: their cosine after a learned projection.

The matrix lies beside the model it was trained for (`lens.npy`, half precision) and fits no other.
Plain arithmetic on arrays; a look at eight neighbours takes some ten microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embeddings.models import EncoderError
from embeddings.vectors import Floats, unpack

__all__ = ["Lens", "open_lens"]

_FILE = "lens.npy"


class Lens:
    """`matrix`: dimension of the encoder by dimension of the projection."""

    def __init__(self, matrix: Floats) -> None:
        if matrix.ndim != 2 or not np.all(np.isfinite(matrix)):
            raise EncoderError("lens: not a finite matrix")
        self._matrix = np.ascontiguousarray(matrix, dtype=np.float32)

    def similarities(self, query: bytes, others: Sequence[bytes]) -> list[float | None]:
        """The projected cosine of a stored vector with others; None where there is none."""
        size = 2 * len(self._matrix)
        if len(query) != size:
            return [None] * len(others)
        rows = [other if len(other) == size else query for other in others]
        seen = unpack(b"".join((query, *rows))).reshape(len(rows) + 1, -1) @ self._matrix
        lengths = np.linalg.norm(seen, axis=1)
        scores = (seen[1:] @ seen[0]) / np.maximum(lengths[1:] * lengths[0], 1e-9)
        return [
            min(1.0, float(score)) if len(other) == size else None
            for score, other in zip(scores, others, strict=True)
        ]


def open_lens(folder: Path, dimension: int) -> Lens | None:
    """The folder's lens, None where it has none. EncoderError when it is not one."""
    path = folder / _FILE
    if not path.is_file():
        return None
    try:
        matrix = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as exc:
        raise EncoderError("lens: its file cannot be read") from exc
    if matrix.shape[0] != dimension:
        raise EncoderError("lens: made for another model")
    return Lens(matrix)
