"""Whose turn it is when a provider takes no more: weighted fair queueing and a token bucket.

Plain state with the time handed in: no clock, no waiting, no task. Self-clocked fair queueing:
each class carries a virtual finish time that grows by 1/weight a turn, and the least goes next. A
class that was idle starts at the queue's own virtual time, so a critical request overtakes all that
wait in lighter classes, and a light class still gets its share however many heavier ones come. The
rejected way, strict priority, starves best_effort for as long as an evening peak lasts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

__all__ = ["CLASSES", "FairQueue", "PriorityClass", "TokenBucket", "class_of"]

T = TypeVar("T")

_ROUNDING = 1e-9  # of a token: a wake-up at the computed moment must find it there


@dataclass(frozen=True, slots=True)
class PriorityClass:
    """How much of a crowded provider a class gets, and how soon its answers should begin."""

    target_ms: int
    weight: int


# By falling rank: of two whose turn it is, the first goes; who is turned away first is the last.
CLASSES: dict[str, PriorityClass] = {
    "critical": PriorityClass(500, 8),
    "normal": PriorityClass(2_000, 4),
    "best_effort": PriorityClass(5_000, 1),
}


def class_of(header: bytes) -> str:
    """The class that an `X-Priority` header means; what is none of the three is normal."""
    name = header.strip().lower().decode("latin-1")
    return name if name in CLASSES else "normal"


class FairQueue(Generic[T]):
    """Waiting items by class, first come first served within one. Each item is in it once."""

    def __init__(self, classes: Mapping[str, PriorityClass]) -> None:
        self._weights = {name: classes[name].weight for name in CLASSES}
        self._waiting: dict[str, OrderedDict[T, None]] = {name: OrderedDict() for name in CLASSES}
        self._finish = dict.fromkeys(CLASSES, 0.0)  # virtual, of each class's next turn
        self._virtual = 0.0

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def push(self, item: T, name: str) -> None:
        line = self._waiting[name]
        if not line:
            self._finish[name] = max(self._finish[name], self._virtual + 1 / self._weights[name])
        line[item] = None

    def pop(self) -> T:
        """Whose turn it is. KeyError when nobody waits."""
        name = min(
            (name for name, line in self._waiting.items() if line),
            key=self._finish.__getitem__,  # the first of equals: the heavier class
            default="",
        )
        item, _ = self._waiting[name].popitem(last=False)
        self._virtual = self._finish[name]
        self._finish[name] += 1 / self._weights[name]
        return item

    def remove(self, item: T, name: str) -> None:
        """Take out one that no longer waits; nothing happens when it is out already."""
        self._waiting[name].pop(item, None)

    def yielding_to(self, name: str) -> T | None:
        """The last comer of the lightest class below `name`, taken out; None when there is none."""
        for lighter in reversed(CLASSES):
            if lighter == name:
                return None
            if self._waiting[lighter]:
                return self._waiting[lighter].popitem()[0]
        return None


class TokenBucket:
    """At most `per_second` in the long run; one second's worth, at least one, at once."""

    def __init__(self, per_second: float, now: float) -> None:
        self._per_second = per_second
        self._burst = max(1.0, per_second)
        self._tokens = self._burst
        self._at = now

    def take(self, now: float) -> None:
        """Spend one token; whether there is one is `wait`'s question."""
        self._fill(now)
        self._tokens -= 1.0

    def wait(self, now: float, tokens: int = 1) -> float:
        """Seconds until so many will be there; 0 when they are."""
        self._fill(now)
        missing = tokens - self._tokens
        return missing / self._per_second if missing > _ROUNDING else 0.0

    def _fill(self, now: float) -> None:
        since = max(0.0, now - self._at)
        self._at = now
        self._tokens = min(self._burst, self._tokens + since * self._per_second)
