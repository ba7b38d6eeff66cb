"""How alike two prompts really are: one number on the cosine scale, from more than the cosine.

The encoder's cosine treats all its dimensions alike. What `embeddings.lens` sees of the same two
vectors is weighted by what labelled pairs showed to matter, and the words both texts share or lack
say the rest. `adjusted` puts that sum back on the cosine scale, so that `threshold` stays the one
knob: at the calibrated 0.92 it asks what `score.toml` says was measured, above it more, at 1.0
equality. Guards come before: no score overrules a veto.

Plain functions of their arguments: no model, no clock, no I/O after import. The weights are made by
`benchmarks/train_score.py` and are read once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files

from cache_proxy import lexicon
from cache_proxy.facts import Facts

__all__ = ["FEATURES", "WEIGHTS", "Weights", "adjusted", "features", "read"]

_MANY = 12  # little words; a long polite frame is no more than a frame
FEATURES = ("cosine", "learned", "shared", "rare", "extra", "part", "function")


@dataclass(frozen=True, slots=True)
class Weights:
    """A weighted sum of FEATURES; cosine and learned share a weight of one between them."""

    values: tuple[float, ...]
    at: float  # the sum that means `threshold`
    threshold: float  # the calibrated one
    slope: float  # cosine a unit of the sum, below `at`


def features(cosine: float, learned: float, a: Facts, b: Facts) -> tuple[float, ...]:
    """What the sum is made of, in the order of FEATURES. None depends on which text is which."""
    left, right = frozenset(a.content), frozenset(b.content)
    both = left & right
    lone = min(len(left), len(right)) - len(both)
    return (
        cosine,
        learned,
        len(both) / max(1, len(left) + len(right) - len(both)),
        # How telling the most telling word is that each has and the other lacks.
        min(_heaviest(left - both), _heaviest(right - both)) if lone else 0.0,
        max(len(left), len(right)) - len(both),
        # One of the two only adds: a frame, or a condition that no guard knows.
        float(lone == 0 and left != right),
        # How they are put: the little words that only one of them has.
        min(_MANY, len((a.words ^ b.words) & lexicon.STOP)),
    )


def _heaviest(words: frozenset[str]) -> float:
    return max([lexicon.RARITY.get(word, 1.0) for word in words], default=0.0)


def adjusted(
    cosine: float, learned: float | None, a: Facts, b: Facts, weights: Weights | None = None
) -> float:
    """An effective similarity, to be held against `threshold`. Never falls as the cosine rises.

    Without a learned similarity (another encoder, no lens) the cosine stands as it is.
    """
    if learned is None:
        return cosine
    weighed = weights or WEIGHTS
    total = 0.0
    for weight, value in zip(weighed.values, features(cosine, learned, a, b), strict=True):
        total += weight * value
    above = total - weighed.at
    if above < 0.0:
        return max(-1.0, weighed.threshold + above * weighed.slope)
    # Stretched so that only what sums to one, as equal texts do, reaches 1.0; where the cosine
    # says more it stands, so that a stricter threshold means what it means without a lens.
    stretched = weighed.threshold + above * (1.0 - weighed.threshold) / (1.0 - weighed.at)
    return min(1.0, max(stretched, cosine))


def read(text: str) -> Weights:
    """The weights of a `score.toml`; ValueError where it does not fit this module."""
    told = tomllib.loads(text)
    table: Mapping[str, float] = told["weights"]
    if tuple(table) != FEATURES:
        raise ValueError("score.toml: its features are not those of this version")
    if not (table["cosine"] >= 0.0 and table["learned"] >= 0.0 and told["at"] < 1.0):
        raise ValueError("score.toml: more similar must never count as less")
    return Weights(
        values=tuple(float(table[name]) for name in FEATURES),
        at=float(told["at"]),
        threshold=float(told["threshold"]),
        slope=float(told["slope"]),
    )


WEIGHTS = read((files("cache_proxy") / "score.toml").read_text(encoding="utf-8"))
