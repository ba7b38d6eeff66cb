"""The threshold in force: the configured one, or a stricter one that audits found to be needed.

Pure. It never loosens below what is configured, and the same labels always give the same answer,
so that `cache-stats` and a proxy after its restart agree with the proxy that learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .certify import interval

__all__ = ["BINS", "Dial", "Labels", "bin_of"]

BINS = 100  # of the score, 0.01 each
_CONFIDENCE = 0.95
# One wrong hit may be the judge's mistake; two of few are a pattern worth losing hits for.
_FEWEST_WRONG = 2


def bin_of(score: float) -> int:
    """The bin of a score on the cosine scale; bin 92 holds 0.92 up to 0.93."""
    return min(BINS, max(0, int(score * BINS + 1e-9)))


@dataclass(slots=True)
class Labels:
    """Audited semantic hits by bin of their score."""

    right: dict[int, int] = field(default_factory=dict)
    wrong: dict[int, int] = field(default_factory=dict)

    def add(self, place: int, *, wrong: bool, count: int = 1) -> None:
        counts = self.wrong if wrong else self.right
        counts[place] = counts.get(place, 0) + count

    def above(self, place: int) -> tuple[int, int]:
        """(audited, wrong) from this bin upwards."""
        wrong = _above(self.wrong, place)
        return wrong + _above(self.right, place), wrong


def _above(counts: Mapping[int, int], place: int) -> int:
    return sum(count for at, count in counts.items() if at >= place)


class Dial:
    """Learns from audits; `threshold` is read for every decision."""

    def __init__(self, configured: float, budget: float, labels: Labels | None = None) -> None:
        self.configured = configured
        self.labels = labels or Labels()
        self._budget = budget
        self.threshold = self._needed()

    @property
    def tightened(self) -> bool:
        return self.threshold > self.configured

    def learn(self, score: float, *, wrong: bool) -> bool:
        """Take one label; True when the threshold moved."""
        self.labels.add(bin_of(score), wrong=wrong)
        before, self.threshold = self.threshold, self._needed()
        return self.threshold != before

    def _needed(self) -> float:
        """The loosest threshold whose audited hits give no sign of passing the budget.

        The sign is a 95 % upper bound above the budget with at least two wrong hits behind it:
        few audits alone always leave the bound high and say nothing.
        """
        if not self._passes(bin_of(self.configured)):
            return self.configured
        stricter: Iterable[int] = range(bin_of(self.configured) + 1, BINS + 1)
        return next((place / BINS for place in stricter if not self._passes(place)), 1.01)

    def _passes(self, place: int) -> bool:
        audited, wrong = self.labels.above(place)
        if wrong < _FEWEST_WRONG:
            return False
        return interval(wrong, audited, _CONFIDENCE)[2] > self._budget
