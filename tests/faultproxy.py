"""A line that can be made bad: bytes pass late, not at all, not to the end, or the line breaks.

Stands before anything that listens on a unix socket or a loopback port, on a socket of the same
kind. Knows no protocol.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

__all__ = ["FaultProxy", "fault_proxy"]

_PIECE = 65_536


class FaultProxy:
    """Set its fields while it runs; each holds for all lines, those that are open included."""

    def __init__(self, target: Path | int) -> None:
        self.latency = 0.0  # seconds that each piece towards the caller is held
        self.limit: int | None = None  # bytes towards the caller, by line; then it is reset
        self.lines = 0  # opened so far
        self.port = 0  # where it listens, unless on a unix socket
        self._target = target
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._writers: set[asyncio.StreamWriter] = set()

    def freeze(self) -> None:
        """Sockets stay open, nothing passes: no FIN, no reset, no answer."""
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def reset(self) -> None:
        """Drop all lines that are open."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One line; the server's callback."""
        self.lines += 1
        with suppress(OSError):
            if isinstance(self._target, int):
                far = await asyncio.open_connection("127.0.0.1", self._target)
            else:
                far = await asyncio.open_unix_connection(str(self._target))
            self._writers |= {writer, far[1]}
            try:
                tasks = {
                    asyncio.create_task(self._pass(reader, far[1], back=False)),
                    asyncio.create_task(self._pass(far[0], writer, back=True)),
                }
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in tasks:
                    task.cancel()
            finally:
                self._writers -= {writer, far[1]}
                far[1].close()
        writer.close()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, back: bool
    ) -> None:
        passed = 0
        with suppress(OSError):
            while piece := await reader.read(_PIECE):
                await self._flowing.wait()
                if back and self.latency:
                    await asyncio.sleep(self.latency)
                if back and self.limit is not None and passed + len(piece) > self.limit:
                    writer.write(piece[: self.limit - passed])
                    await writer.drain()
                    writer.transport.abort()
                    return
                passed += len(piece)
                writer.write(piece)
                await writer.drain()


@asynccontextmanager
async def fault_proxy(target: Path | int, path: Path | None = None) -> AsyncIterator[FaultProxy]:
    """Before a unix socket it listens on `path`; before a port on `proxy.port`, a free one."""
    proxy = FaultProxy(target)
    if path is not None:
        server = await asyncio.start_unix_server(proxy.serve, str(path))
    else:
        server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
    try:
        yield proxy
    finally:
        server.close()
        proxy.thaw()
        proxy.reset()
