"""A client without manners: raw bytes over a connection, read to where the test wants, hung up.

Only what the tests need of HTTP/1.1; decides nothing about what is right.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

import orjson

__all__ = ["Line", "Told", "chat", "post"]


@dataclass(frozen=True)
class Told:
    """One answer as it stood on the wire."""

    status: int
    headers: dict[str, str]
    body: bytes
    whole: bool  # it ended as its framing says, and not with the connection

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


class Line:
    """One connection; `async with Line(base) as line`."""

    def __init__(self, base: str) -> None:
        parts = urlsplit(base)
        assert parts.hostname
        assert parts.port
        self._address = parts.hostname, parts.port
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    async def __aenter__(self) -> Line:
        self.reader, self.writer = await asyncio.open_connection(*self._address)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.writer.close()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    def hang_up(self, *, rudely: bool = False) -> None:
        """End the connection: with a FIN, or with a reset."""
        if rudely:
            linger = struct.pack("ii", 1, 0)
            self.writer.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, linger
            )
        self.writer.transport.abort()

    async def head(self, seconds: float = 60.0) -> tuple[int, dict[str, str]]:
        async with asyncio.timeout(seconds):
            raw = await self.reader.readuntil(b"\r\n\r\n")
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        pairs = (line.partition(":") for line in lines)
        return int(first.split()[1]), {name.lower(): value.strip() for name, _, value in pairs}

    async def answer(self, seconds: float = 60.0) -> Told:
        """The next whole answer, or what there was of it."""
        status, headers = await self.head(seconds)
        async with asyncio.timeout(seconds):
            if "content-length" in headers:
                length = int(headers["content-length"])
                body = await self._exactly(length)
                return Told(status, headers, body, len(body) == length)
            if headers.get("transfer-encoding") == "chunked":
                return Told(status, headers, *await self._chunks())
            return Told(status, headers, await self.reader.read(), True)

    async def rest(self, seconds: float = 60.0) -> bytes:
        """All that comes until the other side closes; a reset ends it as well."""
        found = b""
        async with asyncio.timeout(seconds):
            try:
                while more := await self.reader.read(65_536):
                    found += more
            except ConnectionError:
                pass
        return found

    async def _exactly(self, length: int) -> bytes:
        try:
            return await self.reader.readexactly(length)
        except asyncio.IncompleteReadError as exc:
            return exc.partial
        except ConnectionError:
            return b""

    async def _chunks(self) -> tuple[bytes, bool]:
        body = b""
        try:
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readuntil(b"\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            return body, False
        return body, True


def post(
    body: bytes,
    *,
    path: str = "/v1/chat/completions",
    key: str = "sk-raw",
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A well-formed POST."""
    named = {
        "Host": "proxy",
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    } | dict(headers or {})
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in named.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def chat(text: str, **fields: Any) -> bytes:
    """The body of a chat request."""
    messages = [{"role": "user", "content": text}]
    return orjson.dumps({"model": "gpt-4o-mini", "messages": messages} | fields)
