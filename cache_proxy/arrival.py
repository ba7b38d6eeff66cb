"""A request's body on its way in, and the client that may leave or fall silent meanwhile.

Knows ASGI's messages and the clock; decides nothing about what is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any

__all__ = ["Gone", "Message", "Overdue", "Receive", "Upload", "Watcher"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


class Gone(Exception):
    """The client hung up before its request was whole."""


class Overdue:
    """Cancels the present task once, so many seconds from now."""

    def __init__(self, seconds: float) -> None:
        self.struck = False
        self._task = asyncio.current_task()
        self.timer = asyncio.get_running_loop().call_later(seconds, self._strike)

    def _strike(self) -> None:
        if self._task is not None:
            self.struck = True
            self._task.cancel()
            self._task.uncancel()  # the cancellation is answered where the body is read


class Upload:
    """A request's body on its way through, which may take as long as it will.

    But neither side may let the other wait for too long, and a client that leaves half of it ends
    the work: built by the task that does it, which is cancelled; `silent` says whose fault it was.
    """

    def __init__(
        self, receive: Receive, watcher: Watcher, client_seconds: float, upstream_seconds: float
    ) -> None:
        self.silent = ""  # or "client", or "upstream"
        self.whole = False
        self._receive = receive
        self._watcher = watcher
        self._seconds = {"client": client_seconds, "upstream": upstream_seconds}
        self._worker = asyncio.current_task()
        self._timer: asyncio.TimerHandle | None = None
        self._answered = False

    async def pieces(self, message: Message) -> AsyncIterator[bytes]:
        """This one and what follows; read by the HTTP client's own task."""
        while message["type"] != "http.disconnect":
            if message["body"]:
                self._await("upstream")
                yield message["body"]
            if not message.get("more_body"):
                self.whole = True
                self.close()
                self._watcher.start(self._worker)
                return
            self._await("client")
            message = await self._receive()
        self.close()
        self._watcher.gone(self._worker)
        raise Gone  # an end that upstream must not take for the body's

    def close(self) -> None:
        """Upstream has answered, or never will: nobody waits for more of the body."""
        self._answered = True
        if self._timer is not None:
            self._timer.cancel()

    def _await(self, whom: str) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if not self._answered:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._seconds[whom], self._give_up, whom)

    def _give_up(self, whom: str) -> None:
        if self._worker is not None:
            self.silent = whom
            self._worker.cancel()
            self._worker.uncancel()  # as `Overdue` does


class Watcher:
    """Notices that the client hangs up, and cancels the task that works for it.

    One mechanism for all three windows (before the first byte, in mid-stream, not streamed): the
    task is cancelled wherever it waits, and leaves its flight on the way out.
    """

    def __init__(self, receive: Receive) -> None:
        self.left = False
        self._receive = receive
        self._task: asyncio.Task[None] | None = None

    def start(self, worker: asyncio.Task[Any] | None = None) -> None:
        """Call once the request's body is read, from the task that works for it or with it."""
        worker = worker or asyncio.current_task()
        if self._task is None and worker is not None:
            self._task = asyncio.get_running_loop().create_task(self._watch(worker))

    def gone(self, worker: asyncio.Task[Any] | None) -> None:
        """The client has left."""
        self.left = True
        if worker is not None:
            worker.cancel()

    async def _watch(self, worker: asyncio.Task[Any]) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.gone(worker)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
