"""Unit vectors: what an encoder hands over, the check that they are fit for use, their stored form.

Plain arithmetic on arrays: no model, no index, no I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings.models import EncoderError

__all__ = ["Encoded", "Floats", "checked", "pack", "unpack"]

Floats = NDArray[np.float32]

# fp16 rounding moves a length by about 1e-4; more than this is no rounding.
_LENGTH_TOLERANCE = 5e-3


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row a text. A truncated text has no vector (zeros): part of it never reached the model,
    so what the rest is close to says nothing about it."""

    vectors: Floats  # [n, dimension], unit length
    truncated: tuple[bool, ...]


def checked(encoded: Encoded, texts: int, dimension: int) -> Encoded:
    """The same, or EncoderError: wrong shape, NaN, infinity, zero or any length but one."""
    vectors = encoded.vectors
    if vectors.shape != (texts, dimension) or len(encoded.truncated) != texts:
        raise EncoderError(f"encoder: shape {vectors.shape} for {texts} texts of {dimension}")
    lengths = np.linalg.norm(vectors, axis=1)[~np.asarray(encoded.truncated, dtype=bool)]
    # Written so that NaN fails it.
    if not np.all(np.abs(lengths - 1.0) <= _LENGTH_TOLERANCE):
        raise EncoderError("encoder: a vector is not of unit length")
    return encoded


def pack(vector: Floats | Sequence[float]) -> bytes:
    """The stored form: fp16, little-endian, 2 bytes a dimension."""
    return np.asarray(vector).astype("<f2").tobytes()


def unpack(vector: bytes) -> Floats:
    """The float32 array that `pack` rounded; ValueError when the length is odd."""
    return np.frombuffer(vector, dtype="<f2").astype(np.float32)
