"""A connection of one's own to a sidecar or a provider, for the commands that ask: batch and bench.

One request at a time, over plain sockets: a client library adds a millisecond to each time, and ten
of them when ten answers arrive at once, which would be measured as the endpoint's. Retries nothing,
follows nothing, keeps nothing.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import SplitResult, urlsplit

from httptools import HttpParserError, HttpResponseParser

from .errors import ConfigError, UpstreamUnavailable
from .upstream.routes import Headers

__all__ = ["Caller", "Told", "listens"]

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 660.0  # the sidecar's own patience, and a minute to tell of it
MAX_ANSWER_BYTES = 256 * 1024 * 1024

_PRINTED = re.compile(r"[!-~]+")


@dataclass(frozen=True, slots=True)
class Told:
    """A whole answer, and when it came. Times are of `time.perf_counter`."""

    status: int
    headers: Headers  # names in lower case
    chunks: tuple[tuple[float, bytes], ...]
    sent: float
    ended: float

    @property
    def body(self) -> bytes:
        return b"".join(chunk for _, chunk in self.chunks)

    def header(self, name: bytes) -> str:
        """Its value, empty when there is none."""
        return dict(self.headers).get(name, b"").decode("latin-1")


class Caller:
    """One keep-alive connection to the host of `base`, opened when it is needed.

    ConfigError when that is no address.
    """

    def __init__(self, base: str, key: str) -> None:
        parts = _address(base)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        named = {"Host": parts.netloc, "Content-Type": "application/json"}
        if key:
            named["Authorization"] = f"Bearer {key}"
        self._head = _lines(named.items())
        self._wire: _Wire | None = None

    async def ask(
        self, target: str, body: bytes | None, headers: Iterable[tuple[str, str]] = ()
    ) -> Told:
        """POST `body` to the path and query `target`, or GET it when that is None.

        Raises UpstreamUnavailable when no whole answer comes; what was sent may have been read.
        """
        verb = b"GET" if body is None else b"POST"
        length = (("Content-Length", str(len(body or b""))),)
        head = b"%b %b HTTP/1.1\r\n%b" % (verb, target.encode(), self._head)
        sent = head + _lines([*headers, *length]) + b"\r\n" + (body or b"")
        try:
            wire = await self.connect()
            async with asyncio.timeout(ANSWER_SECONDS):
                return await wire.send(sent)
        except TimeoutError:
            self.close()
            raise UpstreamUnavailable("No answer came in time.", 504, reason="timeout") from None
        except BaseException:
            self.close()  # an answer may still be on its way to nobody
            raise

    async def connect(self) -> _Wire:
        """The connection, opened if need be. Raises UpstreamUnavailable."""
        if self._wire is None or self._wire.closed:
            try:
                async with asyncio.timeout(CONNECT_SECONDS):
                    _, self._wire = await asyncio.get_running_loop().create_connection(
                        _Wire, self._host, self._port, ssl=self._tls
                    )
            except (OSError, UnicodeError) as exc:  # the latter: a host that cannot be a name
                raise UpstreamUnavailable(
                    "Nobody answers at that address.", 502, reason="connect"
                ) from exc
        return self._wire

    def close(self) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None


async def listens(base: str) -> bool:
    """Whether anybody accepts connections there."""
    caller = Caller(base, "")
    try:
        await caller.connect()
    except UpstreamUnavailable:
        return False
    finally:
        caller.close()
    return True


class _Wire(asyncio.Protocol):
    """HTTP/1.1 on one connection; each chunk is dated when it arrives, not when it is read."""

    def __init__(self) -> None:
        self.closed = False
        self._told: asyncio.Future[Told] | None = None

    def send(self, request: bytes) -> asyncio.Future[Told]:
        self._told = asyncio.get_running_loop().create_future()
        self._parser = HttpResponseParser(self)
        self._headers: Headers = []
        self._chunks: list[tuple[float, bytes]] = []
        self._bytes = 0
        self._complete_head = False
        self._sent = self._now = time.perf_counter()
        self._transport.write(request)
        return self._told

    def close(self) -> None:
        self.closed = True
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        if self._told is None or self._told.done():
            self.close()  # nobody asked
            return
        try:
            self._parser.feed_data(data)
        except HttpParserError:
            self._fail("The answer is not HTTP.")

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        if self._told is None or self._told.done():
            return
        framed = {b"content-length", b"transfer-encoding"} & dict(self._headers).keys()
        if exc is None and self._complete_head and not framed:
            self._finish()  # an answer without a length ends with its connection
        else:
            self._fail("The connection broke off.")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self._complete_head = True

    def on_body(self, chunk: bytes) -> None:
        self._chunks.append((self._now, chunk))
        self._bytes += len(chunk)
        if self._bytes > MAX_ANSWER_BYTES:
            self._fail("The answer is too large.")

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() < 200:
            self._headers.clear()  # "early hints" and the like: the answer is still to come
            return
        if not self._parser.should_keep_alive():
            self.close()
        self._finish()

    def _finish(self) -> None:
        if self._told is not None and not self._told.done():
            status = self._parser.get_status_code()
            chunks = tuple(self._chunks)
            self._told.set_result(Told(status, self._headers, chunks, self._sent, self._now))

    def _fail(self, message: str) -> None:
        self.close()
        if self._told is not None and not self._told.done():
            self._told.set_exception(UpstreamUnavailable(message, 502))


def _address(base: str) -> SplitResult:
    with suppress(ValueError):
        parts = urlsplit(base)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        if named and not (parts.query or parts.username) and _PRINTED.fullmatch(base):
            return parts
    raise ConfigError(
        "url: is an http or https base URL without a query or a password, such as "
        "http://127.0.0.1:8080/v1."
    )


def _lines(headers: Iterable[tuple[str, str]]) -> bytes:
    return b"".join(b"%b: %b\r\n" % (k.encode(), v.encode("latin-1")) for k, v in headers)
