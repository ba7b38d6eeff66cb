"""Asking again: after which answers, how soon, how often, and when not to ask at all.

Plain arithmetic: time and chance are handed in; waiting and sending are done elsewhere.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime

from .routes import Headers

__all__ = ["LONGEST_WAIT", "RetryBudget", "Retrying", "Windows", "may_pass", "retry_after"]

# Longer waits are the client's to make: it is told how long, and may have better to do.
LONGEST_WAIT = 20.0
_STATUSES = frozenset({408, 409, 425, 429})
_NUMBER = re.compile(rb"\d{1,12}(\.\d{1,9})?")
_LONGEST_TOLD = 86_400.0
_WINDOW_SECONDS = 10
_FLOOR = 3
_MOST_WINDOWS = 4_096


def may_pass(status: int, headers: Headers) -> bool:
    """Whether the same request may fare better a moment later; upstream's own no counts."""
    if (b"x-should-retry", b"false") in headers:
        return False
    return status in _STATUSES or status >= 500


def retry_after(headers: Headers, clock: float) -> float | None:
    """Seconds that upstream wants to be left alone; None when it does not say.

    `clock` is Unix seconds, for those who name a date.
    """
    found = dict(headers)
    milliseconds = found.get(b"retry-after-ms", b"").strip()
    if _NUMBER.fullmatch(milliseconds):
        return min(float(milliseconds) / 1_000, _LONGEST_TOLD)
    told = found.get(b"retry-after", b"").strip()
    if _NUMBER.fullmatch(told):
        return min(float(told), _LONGEST_TOLD)
    try:
        date = parsedate_to_datetime(told.decode("latin-1")).replace(tzinfo=UTC)  # HTTP's only zone
        return min(max(0.0, date.timestamp() - clock), _LONGEST_TOLD)
    except (ValueError, OverflowError):
        return None


@dataclass(frozen=True, slots=True)
class Retrying:
    """How often, and how soon. `attempts` counts the first one too."""

    attempts: int = 3
    budget: float = 0.2
    base_seconds: float = 0.5
    cap_seconds: float = 8.0

    def pause(self, attempt: int, told: float | None, dice: float) -> float:
        """Seconds to wait after this attempt (from 1).

        `dice` is in [0, 1). Full jitter spreads those that failed together; who was told when to
        come back comes at most a tenth later, and never sooner.
        """
        if told:
            return told * (1 + dice / 10)
        return dice * min(self.cap_seconds, self.base_seconds * 2.0 ** (attempt - 1))


@dataclass(slots=True)
class RetryBudget:
    """Retries may be `share` of the requests of the last ten seconds, and three at least.

    So upstream never sees much more than the traffic that it was sent, however much of it fails.
    """

    share: float
    _seconds: deque[list[int]] = field(default_factory=deque)  # [second, requests, retries]

    def asked(self, now: float) -> None:
        """A request sets out."""
        self._slot(now)[1] += 1

    def spend(self, now: float) -> bool:
        """One more retry, if there is one left; monotonic seconds."""
        slot = self._slot(now)
        requests = sum(each[1] for each in self._seconds)
        retries = sum(each[2] for each in self._seconds)
        if retries >= max(_FLOOR if self.share else 0, math.floor(self.share * requests)):
            return False
        slot[2] += 1
        return True

    def _slot(self, now: float) -> list[int]:
        second = int(now)
        while self._seconds and self._seconds[0][0] <= second - _WINDOW_SECONDS:
            self._seconds.popleft()
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0, 0])
        return self._seconds[-1]


@dataclass(slots=True)
class Windows:
    """Until when whom upstream wants to hear nothing from; the latest few thousand."""

    _until: dict[Hashable, tuple[float, float]] = field(default_factory=dict)

    def close(self, key: Hashable, seconds: float, now: float) -> None:
        """Nothing for so many seconds; a longer ban that is in force stays."""
        until = now + seconds
        if until <= self._until.get(key, (0.0, 0.0))[0]:
            return
        self._until.pop(key, None)
        while len(self._until) >= _MOST_WINDOWS:
            del self._until[next(iter(self._until))]
        self._until[key] = (until, seconds)

    def left(self, key: Hashable, now: float) -> tuple[float, float]:
        """Seconds still to wait, 0 when there is no ban, and how long the whole ban was."""
        until, seconds = self._until.get(key, (0.0, 0.0))
        if until <= now:
            self._until.pop(key, None)
            return 0.0, 0.0
        return until - now, seconds
