"""Flights: identical requests in the air share one upstream call.

A flight is a task of its own that reads upstream into a buffer; whoever waits reads the buffer at
its own pace. So there is no leader to lose: the flight goes on while somebody is aboard, and the
last one to leave ends it, which is also how a client that hangs up ends the upstream work.
The rejected way, a leader that reads for the others, needs a hand-over at every await.

Knows nothing of HTTP beyond a head and some bytes, and stores nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

__all__ = ["Flight", "Flights", "Source"]

L = TypeVar("L")

# How far upstream may run ahead of the fastest reader, so that a slow client slows its own call.
AHEAD_BYTES = 1_048_576
# How long upstream may trail on after a whole answer that nobody reads any more.
_TRAIL_SECONDS = 1.0


class Source(Protocol):
    """An upstream answer whose head has come."""

    status: int
    headers: list[tuple[bytes, bytes]]
    finished: bool
    """True from before the chunk that makes the answer whole, whatever trails after it."""

    def chunks(self) -> AsyncIterator[bytes]: ...
    async def close(self) -> None: ...


@dataclass(slots=True, eq=False)  # two at the same place are still two
class _Reader:
    taken: int = 0  # chunks
    taken_bytes: int = 0


class Flight(Generic[L]):
    """One upstream call and those aboard. Made by `Flights.join`."""

    def __init__(
        self,
        send: Callable[[], Awaitable[Source]],
        landed: Callable[[Flight[L]], L],
        *,
        hold_bytes: int,
    ) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.aboard = 0
        self.complete = False  # upstream's answer is whole
        self.paid = False  # somebody's record carries what the call cost
        self.landing: L | None = None  # what `landed` made of the whole, once it has ended
        self.source: Source | None = None
        self.started: float = 0.0
        self.ended: float | None = None
        self.send = send
        self._landed = landed
        self._hold_bytes = hold_bytes
        self._buffer: list[bytes] = []
        self._size = 0
        self._dropped = 0  # chunks let go from the front: too much to hold, nobody new may join
        self._readers: list[_Reader] = []
        self._error: BaseException | None = None
        self._headed = False
        self._down = False
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._now = loop.time
        self._task = loop.create_task(self._fly())
        # For a call that is ended before its first step, which then never comes.
        self._task.add_done_callback(lambda _: self._land())

    @property
    def joinable(self) -> bool:
        # Nobody aboard: the call is being ended, and would take down whoever joined now.
        return self._dropped == 0 and self.aboard > 0 and not self._task.done()

    @property
    def body(self) -> bytes | None:
        """The whole answer, None when it was cut or too long to hold."""
        return b"".join(self._buffer) if self.complete and not self._dropped else None

    async def head(self) -> None:
        """Wait for status and headers; raises what the call raised."""
        while not self._headed:
            await self._wait()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body from its first byte, as it arrives; raises what the call raised."""
        reader = _Reader()
        self._readers.append(reader)
        try:
            while True:
                while reader.taken < self._dropped + len(self._buffer):
                    chunk = self._buffer[reader.taken - self._dropped]
                    reader.taken += 1
                    reader.taken_bytes += len(chunk)
                    self._let_go()
                    self._room.set()
                    yield chunk
                if self.ended is not None and self._error is None:
                    return
                await self._wait()
        finally:
            self._readers.remove(reader)
            self._room.set()

    @property
    def _unread(self) -> bool:
        """Somebody aboard has not begun to read, and needs the first byte."""
        return len(self._readers) < self.aboard

    def leave(self) -> None:
        """One less aboard; the last one ends the call."""
        self.aboard -= 1
        self._room.set()
        if self.aboard == 0 and not self._task.done():
            if self.complete:
                # Clients hang up on the last event; upstream's connection is worth a moment.
                asyncio.get_running_loop().call_later(_TRAIL_SECONDS, self._task.cancel)
            else:
                self._task.cancel()

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        changed = self._changed
        await changed.wait()

    def _tell(self) -> None:
        """Wake everybody who waits, and begin a new wait."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _fly(self) -> None:
        self.started = self._now()
        try:
            source = await self.send()
            try:
                self.source = source
                self.status, self.headers = source.status, source.headers
                self._headed = True
                self._tell()
                async for chunk in source.chunks():
                    await self._take(chunk, last=source.finished)
                self.complete = True
            finally:
                await source.close()
        except BaseException as exc:
            # Kept for those aboard, who raise it in their own request.
            self._error = exc
            if not isinstance(exc, (Exception, asyncio.CancelledError)):
                raise
        finally:
            self.ended = self._now()
            try:
                self._land()
            finally:
                self._tell()

    def _land(self) -> None:
        if not self._down:
            self._down = True
            self.landing = self._landed(self)

    async def _take(self, chunk: bytes, *, last: bool) -> None:
        self._buffer.append(chunk)
        self._size += len(chunk)
        if last and not self.complete:
            # Before anybody sees the last byte: who asks again right after it must find what
            # came of this answer already under way.
            self.complete = True
            self._land()
        self._tell()
        while self._ahead() > AHEAD_BYTES:
            self._room.clear()
            await self._room.wait()

    def _ahead(self) -> int:
        """Bytes that even the fastest reader has not taken; nobody reading yet counts as none."""
        fastest = max((reader.taken_bytes for reader in self._readers), default=self._size)
        slowest = min((reader.taken_bytes for reader in self._readers), default=self._size)
        if self._unread:
            slowest = 0
        if self._size - slowest > self._hold_bytes:
            return self._size - slowest  # the buffer is full: the slowest sets the pace
        return self._size - fastest

    def _let_go(self) -> None:
        """Past the hold limit keep only what some reader still needs."""
        if self._size <= self._hold_bytes or self._unread:
            return
        needed = min(reader.taken for reader in self._readers)
        if needed > self._dropped:
            del self._buffer[: needed - self._dropped]
            self._dropped = needed


class Flights(Generic[L]):
    """The calls in the air, by key. A key is free again the moment its flight ends."""

    def __init__(self, *, hold_bytes: int) -> None:
        self._hold_bytes = hold_bytes
        self._flights: dict[bytes, Flight[L]] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def flying(self, key: bytes | None) -> bool:
        """Whether `join` would find a flight under this key now."""
        flight = self._flights.get(key) if key is not None else None
        return flight is not None and flight.joinable

    def join(
        self,
        key: bytes | None,
        send: Callable[[], Awaitable[Source]],
        landed: Callable[[Flight[L]], L],
    ) -> tuple[Flight[L], bool]:
        """The flight under `key` and whether it was already in the air; None flies alone.

        `landed` is called once, when the answer is whole or the flight that `send` starts has
        ended in any other way; what it returns is everybody's `landing`. The caller is aboard
        when this returns and must `leave`.
        """
        if key is not None and self.flying(key):
            flight = self._flights[key]
            flight.aboard += 1
            return flight, True

        def cleared(ended: Flight[L]) -> L:
            if key is not None and self._flights.get(key) is ended:
                del self._flights[key]
            return landed(ended)

        flight = Flight(send, cleared, hold_bytes=self._hold_bytes)
        flight.aboard = 1
        if key is not None:
            self._flights[key] = flight
        return flight, False
