"""The way out: one pooled HTTP client for upstream. The only file that knows httpx.

Never follows a redirect, keeps no cookie, decodes nothing, retries nothing.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable, Iterable
from functools import cache
from http.cookiejar import CookieJar, DefaultCookiePolicy

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport
from httpx_aiohttp.transport import AiohttpResponseStream, map_aiohttp_exceptions
from multidict import CIMultiDict
from yarl import URL

from ..errors import UpstreamUnavailable
from .routes import Headers, backward

__all__ = ["Response", "Upstream"]

# aiohttp refuses a response line or header longer than 8 KiB by default; providers send long
# policies and cookies.
_HEAD_BYTES = 65_536


class Response:
    """Upstream's answer, its head read and its body still to come."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self.status = response.status_code
        self.headers: Headers = backward(response.headers.raw)
        self._closed: Callable[[], None] | None = None

    def when_closed(self, told: Callable[[], None]) -> None:
        """Call this once the answer has ended, in whatever way."""
        self._closed = told

    async def chunks(self) -> AsyncIterator[bytes]:
        """Raw bytes as they arrive; UpstreamUnavailable when they end too soon."""
        try:
            async for chunk in self._response.stream:  # type: ignore[union-attr]
                yield chunk
        except httpx.TimeoutException as exc:
            raise UpstreamUnavailable(
                "Upstream fell silent in mid-answer.", 504, reason="timeout"
            ) from exc
        except (httpx.HTTPError, aiohttp.ClientError, OSError) as exc:
            raise UpstreamUnavailable("Upstream broke off in mid-answer.", 502) from exc

    async def close(self) -> None:
        """Give the connection back, or abort it when the body was not read to its end."""
        try:
            await self._response.aclose()
        finally:
            if self._closed is not None:
                self._closed()


class _AsSpelt(AiohttpTransport):
    """httpx over aiohttp, with target and headers exactly as the client spelt them.

    The plain transport writes odd percent signs anew and joins repeated headers, and signatures
    are made over both.
    """

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        if not isinstance(self.client, aiohttp.ClientSession):
            self.client = self.get_client()
        timeout = request.extensions["timeout"]
        body = request.extensions["body"]
        with map_aiohttp_exceptions():
            response = await self.client.request(
                request.method,
                URL(request.extensions["url"], encoded=True),
                headers=CIMultiDict((_text(k), _text(v)) for k, v in request.extensions["headers"]),
                data=body or None,
                allow_redirects=False,
                auto_decompress=False,
                timeout=aiohttp.ClientTimeout(
                    sock_connect=timeout["connect"],
                    sock_read=timeout["read"],
                    connect=timeout["pool"],
                ),
            )
        return httpx.Response(
            response.status,
            headers=response.raw_headers,
            stream=AiohttpResponseStream(response),
            request=request,
        )


def _text(value: bytes) -> str:
    """What aiohttp, which writes UTF-8, will write as these bytes; Latin-1 it cannot."""
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")


@cache
def _trusted() -> ssl.SSLContext:
    """The system's certificates, which take a twentieth of a second to read: once for all pools."""
    return ssl.create_default_context()


class Upstream:
    """A pool of connections to the configured providers."""

    def __init__(self, *, max_connections: int, connect_seconds: float) -> None:
        self._connect_seconds = connect_seconds
        tls = _trusted()

        def session() -> aiohttp.ClientSession:
            return aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    limit=max_connections, keepalive_timeout=60, ssl=tls
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
                max_line_size=_HEAD_BYTES,
                max_field_size=_HEAD_BYTES,
            )

        self._client = httpx.AsyncClient(
            transport=_AsSpelt(client=session, verify=tls),
            follow_redirects=False,
            trust_env=False,
            # Upstream's cookie for one caller must not go out with the next caller's request.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=())),
        )
        self._client.headers.clear()

    async def send(
        self,
        method: str,
        url: str,
        headers: Iterable[tuple[bytes, bytes]],
        body: bytes | AsyncIterator[bytes] | None,
        *,
        read_seconds: float,
    ) -> Response:
        """Send once and return when the head has come. Raises UpstreamUnavailable.

        `read_seconds` bounds the wait for the first byte and each silence after it.
        """
        request = self._client.build_request(
            method,
            "http://upstream/",  # the real one goes past httpx, which would spell it anew
            extensions={"url": url, "headers": list(headers), "body": body},
            timeout=httpx.Timeout(
                read_seconds,
                connect=self._connect_seconds,
                pool=self._connect_seconds + read_seconds,
            ),
        )
        try:
            return Response(await self._client.send(request, stream=True))
        except (httpx.HTTPError, aiohttp.ClientError, OSError, TimeoutError) as exc:
            raise _explained(exc) from exc

    async def close(self) -> None:
        await self._client.aclose()


def _explained(exc: BaseException) -> UpstreamUnavailable:
    """By the transport's own error, which httpx's class hides: a refused connection, a failed
    look-up and a dropped one all surface as one and the same time-out."""
    cause = exc.__cause__ or exc
    if isinstance(cause, (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)):
        return UpstreamUnavailable("Upstream cannot be reached.", 502, reason="connect")
    if isinstance(cause, aiohttp.ServerDisconnectedError):
        return UpstreamUnavailable("Upstream closed the connection without an answer.", 502)
    if isinstance(cause, (aiohttp.ServerTimeoutError, TimeoutError)):
        return UpstreamUnavailable("Upstream did not answer in time.", 504, reason="timeout")
    return UpstreamUnavailable("Upstream's answer could not be read.", 502)
