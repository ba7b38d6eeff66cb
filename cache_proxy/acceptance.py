"""Which credentials upstream has accepted: only those are served hits.

The proxy cannot judge a key that it passes on; upstream can. Its verdicts are kept in the store for
a day under a MAC of the exact token. When the last one is old, a question that costs nothing asks
again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from .errors import MemoryUnavailable, UpstreamUnavailable
from .store import Look, Store
from .upstream.providers import Provider
from .upstream.relay import Relay
from .upstream.routes import Headers

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
    """Built once for all providers. Where a provider gets a key of ours it judges no client: then
    everybody who was let in counts as accepted."""

    def __init__(
        self,
        *,
        store: Store,
        relay: Relay,
        strict: bool,
        clock: Callable[[], float],
    ) -> None:
        self._store = store
        self._relay = relay
        self._strict = strict
        self._clock = clock
        self._probing: dict[bytes, asyncio.Task[bool]] = {}

    def fresh(self, look: Look, provider: Provider) -> bool:
        """Was this credential accepted just now? The quick half of `holds`."""
        if look.accepted is not None and self._clock() - look.accepted <= FRESH_SECONDS:
            return True
        return not provider.judges

    async def holds(self, look: Look, provider: Provider, token: bytes, headers: Headers) -> bool:
        """May this credential be served from the cache?"""
        if self.fresh(look, provider):
            return True
        if look.accepted is None:
            return False
        if not provider.probe:
            return not self._strict
        probe = self._probing.get(token)
        if probe is None:
            probe = asyncio.get_running_loop().create_task(self._probe(provider, token, headers))
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

    async def _probe(self, provider: Provider, token: bytes, headers: Headers) -> bool:
        try:
            async with asyncio.timeout(_PROBE_SECONDS):
                status = await self._relay.probe(provider, headers, _PROBE_SECONDS)
        except (UpstreamUnavailable, TimeoutError):
            return True  # nobody said no
        await self.note(None, token, status, b"")
        return status != 401


def _is_bad_key(status: int, body: bytes) -> bool:
    if status == 401:
        return True
    return status in (400, 403) and any(word in body[:_BAD_KEY_BYTES] for word in _BAD_KEY)
