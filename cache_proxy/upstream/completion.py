"""Asking upstream for a completion: with the usage of a stream, where the provider tells it.

Sends once; once more only where the first was refused for the very field that was added here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from ..errors import UpstreamUnavailable
from .client import Response, Upstream
from .providers import Route
from .routes import Headers, forward

__all__ = ["Asked", "Completion", "send"]

_REFUSAL_BYTES = 65_536
# The terminal event with the blank line that ends it. Only at the start of a line: an answer may
# well speak of it, and inside a JSON string a line never ends.
_DONE = re.compile(rb"[\r\n]data: ?\[DONE\](?:\r\n\r\n|\n\n|\r\r)")
_LONGEST_DONE = 18


@dataclass(frozen=True, slots=True)
class Asked:
    """One call to make. `with_usage` is the body that also asks for usage, where that differs."""

    route: Route
    query: bytes
    headers: Headers  # the client's
    body: bytes
    with_usage: bytes | None
    read_seconds: float
    sending: Callable[[], None]  # told before each request to upstream


class Completion:
    """Upstream's answer; `usage_injected`: a usage chunk will come that the client did not ask."""

    def __init__(self, response: Response, route: Route, *, usage_injected: bool) -> None:
        self.route = route  # whoever answered
        self.spent = False  # asked again in vain: the client need not try
        self.instead = False  # another model than the one asked for
        self.idle: float | None = None  # longest silence between bytes, where it is watched
        self.status = response.status
        self.headers = response.headers
        self.usage_injected = usage_injected
        self.finished = False
        self._response = response
        self._read: list[bytes] = []
        self._rest = response.chunks()

    @property
    def streams(self) -> bool:
        return dict(self.headers).get(b"content-type", b"").startswith(b"text/event-stream")

    async def peek(self, most: int) -> bytes:
        """The body's beginning, `most` bytes if there are so many; it still comes whole."""
        size = sum(map(len, self._read))
        while size < most:
            chunk = await anext(self._rest, None)
            if chunk is None:
                break
            self._read.append(chunk)
            size += len(chunk)
        return b"".join(self._read)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body; `finished` turns true just before the chunk that makes it whole."""
        if self.streams:
            async for chunk in self._streamed():
                yield chunk
            return
        # Not a stream: nobody can use a part, so each chunk waits until it is known not to be the
        # last.
        held: bytes | None = None
        async for chunk in self._all():
            if held is not None:
                yield held
            held = chunk
        self.finished = True
        if held is not None:
            yield held

    async def _streamed(self) -> AsyncIterator[bytes]:
        tail = b"\n"  # a stream begins at the start of a line
        async for chunk in self._all():
            tail = tail[-_LONGEST_DONE:] + chunk
            self.finished = self.finished or _DONE.search(tail) is not None
            yield chunk

    async def _all(self) -> AsyncIterator[bytes]:
        for chunk in self._read:
            yield chunk
        async for chunk in self._rest if self.idle is None else self._in_time(self.idle):
            yield chunk

    async def _in_time(self, seconds: float) -> AsyncIterator[bytes]:
        """The rest, of which no chunk lets wait longer."""
        try:
            while True:
                async with asyncio.timeout(seconds):
                    chunk = await anext(self._rest, None)
                if chunk is None:
                    return
                yield chunk
        except TimeoutError as exc:
            raise UpstreamUnavailable(
                "Upstream fell silent in mid-answer.", 504, reason="timeout"
            ) from exc

    def when_closed(self, told: Callable[[], None]) -> None:
        self._response.when_closed(told)

    async def close(self) -> None:
        await self._response.close()


async def send(upstream: Upstream, asked: Asked, no_usage: set[str]) -> Completion:
    """Raises UpstreamUnavailable. A provider that refuses `stream_options` goes to `no_usage`."""
    provider = asked.route.provider
    if asked.with_usage is None or provider.base_url in no_usage:
        response = await _post(upstream, asked, asked.body)
        return Completion(response, asked.route, usage_injected=False)
    response = await _post(upstream, asked, asked.with_usage)
    completion = Completion(response, asked.route, usage_injected=True)
    if completion.status not in (400, 422):
        return completion
    try:
        refusal = await completion.peek(_REFUSAL_BYTES)
    except BaseException:
        await completion.close()
        raise
    if b"stream_options" not in refusal and b"include_usage" not in refusal:
        return completion
    await completion.close()
    response = await _post(upstream, asked, asked.body)
    if response.status not in (400, 422):  # else it was not the field that was refused
        no_usage.add(provider.base_url)
    return Completion(response, asked.route, usage_injected=False)


async def _post(upstream: Upstream, asked: Asked, body: bytes) -> Response:
    route = asked.route
    headers = [
        *(
            (name, value)
            for name, value in route.provider.outgoing(forward(asked.headers))
            if name != b"accept-encoding"
        ),
        # What is coded cannot be read, and a small body may unfold to any size.
        (b"accept-encoding", b"identity"),
    ]
    asked.sending()
    url = route.provider.url(route.path, asked.query)
    return await upstream.send("POST", url, headers, body, read_seconds=asked.read_seconds)
