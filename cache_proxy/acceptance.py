"""Which credentials upstream has accepted: only those are served hits.

The proxy cannot judge a key; upstream can. Its verdicts are kept in the store for a day under a MAC
of the exact token. When the last one is old, a question that costs nothing asks again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from .errors import MemoryUnavailable, UpstreamUnavailable
from .store import Look, Store
from .upstream.client import Upstream
from .upstream.routes import Headers, forward

__all__ = ["Acceptance"]

# Where the provider has a free question, a revoked key sees its last hit at most this long after
# upstream last accepted it; elsewhere its next real call tells.
FRESH_SECONDS = 300
# How old a verdict may grow before another success is worth a write.
_RENEW_SECONDS = 60
_PROBE_SECONDS = 10.0
# Providers that say "bad key" with a status other than 401 do so with one of these words.
_BAD_KEY = (b"API_KEY_INVALID", b"invalid_api_key", b"authentication_error", b"UNAUTHENTICATED")
_BAD_KEY_BYTES = 4_096


class Acceptance:
    """Built with `probe_url` "" when no free question is known for the provider."""

    def __init__(
        self,
        *,
        store: Store,
        upstream: Upstream,
        probe_url: str,
        strict: bool,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._upstream = upstream
        self._probe_url = probe_url
        self._strict = strict
        self._clock = clock
        self._probing: dict[bytes, asyncio.Task[bool]] = {}

    def fresh(self, look: Look) -> bool:
        """Was this credential accepted just now? The quick half of `holds`."""
        return look.accepted is not None and self._clock() - look.accepted <= FRESH_SECONDS

    async def holds(self, look: Look, token: bytes, headers: Headers) -> bool:
        """May this credential be served from the cache?"""
        if look.accepted is None:
            return False
        if self.fresh(look):
            return True
        if not self._probe_url:
            return not self._strict
        probe = self._probing.get(token)
        if probe is None:
            probe = asyncio.get_running_loop().create_task(self._probe(token, headers))
            self._probing[token] = probe
            probe.add_done_callback(lambda _: self._probing.pop(token, None))
        return await asyncio.shield(probe) if self._strict else True

    async def note(self, look: Look | None, token: bytes, status: int, body: bytes) -> None:
        """Remember what an answer of upstream says of the credential."""
        with suppress(MemoryUnavailable):
            if 200 <= status < 300:
                now = int(self._clock())
                if look is None or look.accepted is None or now - look.accepted > _RENEW_SECONDS:
                    await self._store.accept(token, now)
            elif _is_bad_key(status, body):
                await self._store.close_token(token)

    async def _probe(self, token: bytes, headers: Headers) -> bool:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                asked = [(k, v) for k, v in forward(headers) if k != b"content-type"]
                response = await self._upstream.send(
                    "GET", self._probe_url, asked, None, read_seconds=_PROBE_SECONDS
                )
                await response.close()
        except (UpstreamUnavailable, TimeoutError):
            return True  # nobody said no
        await self.note(None, token, response.status, b"")
        return response.status != 401


def _is_bad_key(status: int, body: bytes) -> bool:
    if status == 401:
        return True
    return status in (400, 403) and any(word in body[:_BAD_KEY_BYTES] for word in _BAD_KEY)
