"""The way into a provider that takes only so many at once, or only so many a minute.

Whoever holds a place gives it back when the answer's body has ended, not when its head came. Who
cannot be let in soon enough is turned away at once, best_effort first: a quick 503 that says when
to come again does a background job less harm than a slow one, and the rest no harm at all. Decides
nothing about turns (`fair_queue` does) and sends nothing.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping

from ..errors import UpstreamUnavailable
from .fair_queue import FairQueue, PriorityClass, TokenBucket

__all__ = ["Place", "Shed", "Turnstile"]

MAX_WAITING = 1_000  # I7
LONGEST_RETRY_AFTER = 60
# Of the newest measured stay in the mean one, from which waits are foretold.
_NEWEST = 0.1


class Shed(UpstreamUnavailable):
    """Turned away unsent; `retry_after` is whole seconds until a place is likely."""

    def __init__(self, retry_after: int) -> None:
        message = "Too many requests are waiting for this provider."
        super().__init__(message, 503, reason="shed", retry_after=retry_after)


class Place:
    """The right to have one call open. `leave` may be called more than once."""

    def __init__(self, turnstile: Turnstile) -> None:
        self._turnstile: Turnstile | None = turnstile
        self._entered = turnstile.now()

    def leave(self) -> None:
        turnstile, self._turnstile = self._turnstile, None
        if turnstile is not None:
            turnstile.left(turnstile.now() - self._entered)


class Turnstile:
    """One provider's. `concurrency` None: any number at once; `per_second` None: at any rate.

    `now` gives monotonic seconds.
    """

    def __init__(
        self,
        *,
        concurrency: int | None,
        per_second: float | None,
        classes: Mapping[str, PriorityClass],
        now: Callable[[], float],
        most_waiting: int = MAX_WAITING,
    ) -> None:
        self.now = now
        self._concurrency = concurrency
        self._classes = classes
        self._bucket = TokenBucket(per_second, now()) if per_second else None
        self._most_waiting = most_waiting
        self._queue: FairQueue[asyncio.Future[bool]] = FairQueue(classes)
        self._inside = 0
        self._mean_stay = 0.0  # seconds; 0 until somebody has left
        self._alarm: asyncio.TimerHandle | None = None  # rings when the next token is there

    @property
    def inside(self) -> int:
        """Places taken."""
        return self._inside

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def enter(self, name: str, seconds: float | None = None) -> Place:
        """Wait for a place, `seconds` at most; raises Shed.

        best_effort waits no longer than its class's target, and not at all where the queue lets
        foresee that this will not do. Cancelled, it gives back what it had.
        """
        if not self._queue and self._open():
            self._admit()
            return Place(self)
        turn = self._line_up(name, seconds)
        try:
            async with asyncio.timeout(self._patience(name, seconds)):
                admitted = await turn
        except BaseException as exc:
            if turn.done() and not turn.cancelled() and turn.result():
                self.left(None)  # its turn came in the very moment that it gave up
            self._queue.remove(turn, name)
            if isinstance(exc, TimeoutError):
                raise Shed(self._retry_after()) from exc
            raise
        if not admitted:
            raise Shed(self._retry_after())
        return Place(self)

    def left(self, stay: float | None) -> None:
        """A place is free again, after so many seconds; None where it was not used."""
        self._inside -= 1
        if stay is not None:
            self._mean_stay += (stay - self._mean_stay) * (_NEWEST if self._mean_stay else 1.0)
        self._turn()

    def _line_up(self, name: str, seconds: float | None) -> asyncio.Future[bool]:
        """A place in the queue. Raises Shed where there is none, or none worth having."""
        patience = self._patience(name, seconds)
        if name == "best_effort" and patience is not None and self._foreseen() > patience:
            raise Shed(self._retry_after())
        if len(self._queue) >= self._most_waiting:
            instead = self._queue.yielding_to(name)
            if instead is None:
                raise Shed(self._retry_after())
            instead.set_result(False)
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._queue.push(turn, name)
        self._turn()
        return turn

    def _patience(self, name: str, seconds: float | None) -> float | None:
        if name != "best_effort":
            return seconds
        target = self._classes[name].target_ms / 1_000
        return target if seconds is None else min(target, seconds)

    def _open(self) -> bool:
        """Whether one more may enter now."""
        return not self._full() and (self._bucket is None or self._bucket.wait(self.now()) == 0)

    def _full(self) -> bool:
        return self._concurrency is not None and self._inside >= self._concurrency

    def _admit(self) -> None:
        self._inside += 1
        if self._bucket is not None:
            self._bucket.take(self.now())

    def _turn(self) -> None:
        """Let in whoever may enter now, and wake again when the next token is there."""
        while self._queue and self._open():
            turn = self._queue.pop()
            if not turn.done():  # else it gave up a moment ago
                self._admit()
                turn.set_result(True)
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._bucket is not None and self._queue and not self._full():
            seconds = self._bucket.wait(self.now())
            self._alarm = asyncio.get_running_loop().call_later(seconds, self._turn)

    def _foreseen(self) -> float:
        """Seconds that one more would wait behind all who wait, as far as can be told."""
        ahead = len(self._queue) + 1
        by_rate = self._bucket.wait(self.now(), ahead) if self._bucket else 0.0
        return max(by_rate, ahead * self._mean_stay / self._concurrency if self._concurrency else 0)

    def _retry_after(self) -> int:
        return min(LONGEST_RETRY_AFTER, max(1, math.ceil(self._foreseen())))
