"""How to call a store that may not answer: a deadline, few at a time, and a breaker above.

Knows no store: it is told which exceptions mean "down" and which mean "said no". Never retries,
and never lets a caller who goes away cut a command in half.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Literal, TypeVar

from cache_proxy.errors import MemoryUnavailable

__all__ = ["Breaker", "Line", "State"]

T = TypeVar("T")

_LATE = 0.25  # seconds
Errors = tuple[type[BaseException], ...]

State = Literal["closed", "open", "half-open"]


class Breaker:
    """Opens after `failures` in a row or `seconds` of nothing else, then lets one probe through.

    `on_state` is called once per change, with the new state. Times are monotonic seconds.
    """

    def __init__(
        self,
        on_state: Callable[[State], None],
        *,
        failures: int = 5,
        seconds: float = 1.0,
        open_seconds: float = 1.0,
        longest_seconds: float = 2.0,  # hits must be back within 5 s of the store
    ) -> None:
        self.state: State = "closed"
        self._on_state = on_state
        self._limit = failures
        self._seconds = seconds
        self._shortest = open_seconds
        self._longest = longest_seconds
        self._failures = 0
        self._failing_since = 0.0
        self._open_for = open_seconds
        self._probe_at = 0.0

    def admits(self, now: float) -> bool:
        """Whether a call may be made; in the half-open state the one who asks is the probe."""
        if self.state == "closed":
            return True
        if now < self._probe_at:
            return False
        # A probe that never reports must not shut the door for good: another may try later.
        self._probe_at = now + self._longest
        self._turn("half-open")
        return True

    def succeeded(self) -> None:
        self._failures = 0
        self._open_for = self._shortest
        self._turn("closed")

    def failed(self, now: float) -> None:
        if self._failures == 0:
            self._failing_since = now
        self._failures += 1
        if self.state == "half-open":
            self._open_for = min(self._open_for * 2, self._longest)
            self._open(now)
        elif self.state == "closed" and (
            self._failures >= self._limit or now - self._failing_since >= self._seconds
        ):
            self._open(now)

    def _open(self, now: float) -> None:
        self._probe_at = now + self._open_for
        self._turn("open")

    def _turn(self, state: State) -> None:
        if state != self.state:
            self.state = state
            self._on_state(state)


class Line:
    """Calls to one store, at most `seats` at a time and `waiters` in the queue for a seat.

    All trouble is MemoryUnavailable. Only what the store does counts against it: waiting for a
    seat is our own crowding, and an error that it answered with proves that it lives.
    """

    def __init__(
        self, breaker: Breaker, *, down: Errors, refused: Errors, seats: int = 12, waiters: int = 64
    ) -> None:
        self.breaker = breaker
        self._down = down
        self._refused = refused
        self._seats = asyncio.Semaphore(seats)
        self._waiters = waiters
        self._waiting = 0
        self._running: set[asyncio.Task[object]] = set()

    def admit(self) -> None:
        """Raise MemoryUnavailable at once while the breaker is open."""
        if not self.breaker.admits(asyncio.get_running_loop().time()):
            raise MemoryUnavailable("store")

    async def call(self, operation: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Admit and run. A caller who is cancelled leaves; the command itself is ended in order."""
        self.admit()
        task = asyncio.create_task(self.run(operation, seconds))
        self._running.add(task)
        task.add_done_callback(self._finished)
        return await asyncio.shield(task)

    async def run(self, operation: Callable[[], Awaitable[T]], seconds: float) -> T:
        """Run what was admitted, seat and all within `seconds`. Not to be cancelled."""
        now = asyncio.get_running_loop().time
        deadline = now() + seconds
        await self._sit(deadline)
        began = now()
        try:
            async with asyncio.timeout_at(deadline):
                result = await operation()
        except TimeoutError as exc:
            # Who got its seat late gave the store too little time to be judged by; where the end is
            # told late, it was this process that stood still.
            ended = now()
            if deadline - began >= seconds / 2 and ended - deadline < max(seconds, _LATE):
                self.breaker.failed(ended)
            raise MemoryUnavailable("store") from exc
        except self._down as exc:
            self.breaker.failed(now())
            raise MemoryUnavailable("store") from exc
        except self._refused as exc:
            self.breaker.succeeded()
            raise MemoryUnavailable("store") from exc
        finally:
            self._seats.release()
        self.breaker.succeeded()
        return result

    async def close(self) -> None:
        """Wait for the calls under way; each ends by its own deadline."""
        if self._running:
            await asyncio.wait(self._running)

    async def _sit(self, deadline: float) -> None:
        if not self._seats.locked():
            await self._seats.acquire()  # at once
            return
        if self._waiting >= self._waiters:
            raise MemoryUnavailable("store")
        self._waiting += 1
        try:
            async with asyncio.timeout_at(deadline):
                await self._seats.acquire()
        except TimeoutError as exc:
            raise MemoryUnavailable("store") from exc
        finally:
            self._waiting -= 1

    def _finished(self, task: asyncio.Task[object]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # read, so that nobody complains when its caller has left
