"""The threshold in force: the configured one, or a stricter one that wrong hits called for.

A route of requests (their model) has a threshold of its own, so that one whose answers go stale or
astray costs no other its hits. Pure. It never loosens below what is configured, and the same labels
always give the same answer, so that a proxy after its restart agrees with the proxy that learnt.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from .certify import interval
from .counters import OTHER, label

__all__ = ["BINS", "Dial", "Labels", "bin_of"]

BINS = 100  # of the score, 0.01 each
_CONFIDENCE = 0.95
# One wrong hit may be the judge's mistake; two of few are a pattern worth losing hits for.
_FEWEST_WRONG = 2
_ROUTES = 200  # I7; what is beyond shares one


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
    """Learns from audits and reports; `threshold` is read for every decision."""

    def __init__(
        self, configured: float, budget: float, labels: Mapping[str, Labels] | None = None
    ) -> None:
        self.configured = configured
        self._budget = budget
        self.relearn(labels or {})

    @property
    def tightened(self) -> dict[str, float]:
        """The routes whose threshold is stricter than the configured one."""
        found = self._thresholds.items()
        return {route: now for route, now in found if now > self.configured}

    def threshold(self, route: str) -> float:
        if not self._thresholds:
            return self.configured
        return self._thresholds.get(self._known(route), self.configured)

    def relearn(self, labels: Mapping[str, Labels]) -> None:
        """Forget all labels for these: those of every process, less those that grew old."""
        self._labels = dict(labels)
        self._thresholds = {route: self._needed(found) for route, found in self._labels.items()}

    def learn(self, route: str, score: float, *, wrong: bool) -> bool:
        """Take one label; True when the threshold moved."""
        name = self._known(route)
        found = self._labels.setdefault(name, Labels())
        found.add(bin_of(score), wrong=wrong)
        before = self._thresholds.get(name, self.configured)
        self._thresholds[name] = self._needed(found)
        return self._thresholds[name] != before

    def _known(self, route: str) -> str:
        name = label(route)  # as the ledger writes it
        return name if name in self._labels or len(self._labels) < _ROUTES else OTHER

    def _needed(self, labels: Labels) -> float:
        """The loosest threshold whose audited hits give no sign of passing the budget.

        The sign is a 95 % upper bound above the budget with at least two wrong hits behind it:
        few audits alone always leave the bound high and say nothing.
        """
        if not self._passes(labels, bin_of(self.configured)):
            return self.configured
        stricter: Iterable[int] = range(bin_of(self.configured) + 1, BINS + 1)
        return next((place / BINS for place in stricter if not self._passes(labels, place)), 1.01)

    def _passes(self, labels: Labels, place: int) -> bool:
        audited, wrong = labels.above(place)
        if wrong < _FEWEST_WRONG:
            return False
        return interval(wrong, audited, _CONFIDENCE)[2] > self._budget
