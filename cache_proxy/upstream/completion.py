"""Asking upstream for a completion: with the usage of a stream, where the provider tells it.

Sends once; once more only where the first was refused for the very field that was added here.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass

from .client import Response, Upstream
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

    url: str
    headers: Headers
    body: bytes
    with_usage: bytes | None
    provider: str
    read_seconds: float


class Completion:
    """Upstream's answer; `usage_injected`: a usage chunk will come that the client did not ask."""

    def __init__(self, response: Response, *, usage_injected: bool) -> None:
        self.status = response.status
        self.headers = response.headers
        self.usage_injected = usage_injected
        self.finished = False
        self._response = response
        self._read: list[bytes] = []
        self._rest = response.chunks()

    async def peek(self, most: int) -> bytes:
        """The body's beginning, `most` bytes if there are so many; it still comes whole."""
        while sum(map(len, self._read)) < most:
            chunk = await anext(self._rest, None)
            if chunk is None:
                break
            self._read.append(chunk)
        return b"".join(self._read)

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body; `finished` turns true just before the chunk that makes it whole."""
        headers = dict(self.headers)
        if headers.get(b"content-type", b"").startswith(b"text/event-stream"):
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
        async for chunk in self._rest:
            yield chunk

    async def close(self) -> None:
        await self._response.close()


async def send(upstream: Upstream, asked: Asked, no_usage: set[str]) -> Completion:
    """Raises UpstreamUnavailable. A provider that refuses `stream_options` goes to `no_usage`."""
    headers = [
        *((name, value) for name, value in forward(asked.headers) if name != b"accept-encoding"),
        # What is coded cannot be read, and a small body may unfold to any size.
        (b"accept-encoding", b"identity"),
    ]
    if asked.with_usage is None or asked.provider in no_usage:
        return Completion(await _post(upstream, asked, headers, asked.body), usage_injected=False)
    completion = Completion(
        await _post(upstream, asked, headers, asked.with_usage), usage_injected=True
    )
    if completion.status not in (400, 422):
        return completion
    refusal = await completion.peek(_REFUSAL_BYTES)
    if b"stream_options" not in refusal and b"include_usage" not in refusal:
        return completion
    await completion.close()
    no_usage.add(asked.provider)
    return Completion(await _post(upstream, asked, headers, asked.body), usage_injected=False)


async def _post(upstream: Upstream, asked: Asked, headers: Headers, body: bytes) -> Response:
    return await upstream.send("POST", asked.url, headers, body, read_seconds=asked.read_seconds)
