"""How long an answer may take: by model and expected tokens, by the client's own patience, and by
what successes took.

Plain functions and values, seconds in and seconds out; measures nothing and waits for nothing.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from .routes import Headers

__all__ = ["Deadlines", "Learnt", "Limits", "expected_tokens", "patience"]

# What one more token costs a slow model: 20 tokens a second.
_TOKEN_SECONDS = 0.05
_SECONDS = re.compile(rb"\d{1,6}(\.\d{1,6})?")
# Stainless wrote the SDKs of OpenAI and Anthropic: Python's tells the silence it bears, Node's the
# whole.
_HINTS = (b"x-stainless-read-timeout", b"x-stainless-timeout")


def patience(headers: Headers) -> float | None:
    """How long the client itself is ready to wait, in seconds; None when it does not say."""
    for name, value in headers:
        if name in _HINTS and _SECONDS.fullmatch(value):
            return float(value) or None
    return None


def expected_tokens(document: Mapping[str, Any]) -> int:
    """The most tokens that a request allows its answer; 0 when it sets no bound."""
    gemini = document.get("generationConfig")
    asked = (
        document.get("max_completion_tokens"),
        document.get("max_tokens"),
        document.get("max_output_tokens"),
        gemini.get("maxOutputTokens") if isinstance(gemini, dict) else None,
    )
    return next((n for n in asked if isinstance(n, int) and not isinstance(n, bool) and n > 0), 0)


@dataclass(frozen=True, slots=True)
class Limits:
    """In seconds, counted from when the request set out for upstream."""

    model: float  # for one model's answer: the whole of it, or a stream's first byte
    journey: float  # for the answer at last, other models' included
    idle: float  # the longest silence between bytes
    set: bool  # by the operator: `model` binds to an answer's last byte, and is watched here


@dataclass(frozen=True, slots=True)
class Deadlines:
    """The operator's bounds; None is not set. `otherwise` holds where nobody named any."""

    total: float | None = None
    first_byte: float | None = None  # of a stream
    idle: float | None = None  # of a stream, between bytes
    models: tuple[tuple[str, float], ...] = ()  # glob and base; the first that matches
    otherwise: float = 600.0

    @property
    def neutral(self) -> bool:
        return (self.total, self.first_byte, self.idle, self.models) == (None, None, None, ())

    def limits(self, model: str, tokens: int, *, stream: bool, hint: float | None) -> Limits:
        """What a request for up to `tokens` tokens (0 is unknown) gets; `hint` is the client's
        own bound, which none of the operator's exceeds."""
        unset = hint or self.otherwise
        if self.neutral:
            return Limits(unset, unset, unset, set=False)
        if stream:
            first = min(self.first_byte or unset, unset)
            return Limits(first, first, min(self.idle or unset, unset), set=True)
        longest = min(self.total, hint or self.total) if self.total else unset
        base = next((base for glob, base in self.models if fnmatchcase(model, glob)), None)
        own = longest if base is None else min(base + _TOKEN_SECONDS * tokens, longest)
        return Limits(own, longest, longest, set=True)


@dataclass(slots=True)
class _Record:
    took: deque[float]
    owed: int = 0


@dataclass(slots=True)
class Learnt:
    """Tighter limits, from what whole answers took: `factor` times the `quantile` of the latest
    ones, not below `floor` seconds and never above what is configured.

    It cannot ratchet up. A time-out puts no figure in, so nothing grows by itself; and were each
    limit learnt only from answers that came within the one before, it would still not exceed
    `factor` times the model's own quantile.

    Successes alone would ratchet it down: of a model that has become slow, only the quick answers
    come within the limit, they alone teach, and it stays cut off for ever. So each call that the
    learnt limit cuts off earns the next one the whole configured time. Those answer what the
    model takes now, whatever was known before: at most a few calls more are cut than it takes to
    move the quantile. Where they are not answered either, nothing is learnt and nothing moves.

    Kept by key: provider, model and how long an answer may get, since a long answer is no slow
    model. The limit binds one attempt, not the waiting before it.
    """

    floor: float = 10.0  # below it a limit saves nobody anything
    factor: float = 3.0  # with the quantile: far out in the tail even of a very uneven model
    quantile: float = 0.99
    fewest: int = 32
    window: int = 256
    most_keys: int = 1_024
    _records: dict[Hashable, _Record] = field(default_factory=dict)

    def limit(self, key: Hashable, configured: float) -> float:
        """Seconds for the next call, which spends the whole time that a cut one earned it."""
        record = self._records.get(key)
        if record is None or len(record.took) < self.fewest:
            return configured
        known = sorted(record.took)[int(self.quantile * len(record.took))]
        learnt = max(self.floor, self.factor * known)
        if learnt < configured and record.owed:
            record.owed -= 1
            return configured
        return min(learnt, configured)

    def answered(self, key: Hashable, seconds: float) -> None:
        """A whole good answer took this long, or a stream's first byte did."""
        record = self._records.pop(key, None) or _Record(deque(maxlen=self.window))
        record.took.append(seconds)
        self._records[key] = record  # the latest at the end
        if len(self._records) > self.most_keys:
            del self._records[next(iter(self._records))]

    def cut(self, key: Hashable) -> None:
        """A call ran into its learnt limit."""
        if record := self._records.get(key):
            record.owed = min(record.owed + 1, self.window)
