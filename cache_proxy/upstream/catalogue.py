"""One list of models for several providers, under the names by which clients reach them.

Asks all of them at once, for a bounded time; whoever does not answer is left out and named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import orjson

from ..errors import UpstreamUnavailable
from ..tenancy import is_credential
from .client import Response
from .providers import Provider, Route, Router
from .relay import Relay
from .routes import Headers

__all__ = ["Catalogue"]

_NOT_ASKED = (b"accept-encoding", b"if-none-match", b"if-modified-since", b"range")
_SECONDS = 5.0
_LONGEST = 8_388_608  # bytes of one list


class Catalogue:
    """Built once."""

    def __init__(self, relay: Relay, router: Router) -> None:
        self._relay = relay
        self._router = router

    async def models(
        self, providers: Sequence[Provider], route: Route, headers: Headers
    ) -> tuple[bytes | None, list[str]]:
        """The merged list as JSON, None when nobody answered, and who did not.

        The client's own credential is shown to nobody but `route`'s provider, where the request
        would go by itself.
        """
        lists = await asyncio.gather(*(self._ask(each, route, headers) for each in providers))
        silent = [
            each.name for each, models in zip(providers, lists, strict=True) if models is None
        ]
        if len(silent) == len(providers):
            return None, silent
        pairs = [
            (each, model)
            for each, models in zip(providers, lists, strict=True)
            for model in models or ()
        ]
        return orjson.dumps({"object": "list", "data": self._merged(pairs)}), silent

    def _merged(self, pairs: Sequence[tuple[Provider, dict[str, Any]]]) -> list[dict[str, Any]]:
        owners: dict[str, set[str]] = {}
        for provider, model in pairs:
            owners.setdefault(model["id"], set()).add(provider.name)
        merged = []
        for provider, model in pairs:
            bare = model["id"]
            shared = len(owners[bare]) > 1
            name = f"{provider.name}/{bare}" if shared else self._router.told(provider, bare)
            merged.append({**model, "id": name})
        return merged

    async def _ask(
        self, provider: Provider, route: Route, headers: Headers
    ) -> list[dict[str, Any]] | None:
        """One provider's models; None when it does not answer with any."""
        own = provider is route.provider or not provider.judges
        asked = Route(provider, route.protocol, "", route.path)
        try:
            async with asyncio.timeout(_SECONDS):
                response = await self._relay.pass_on(
                    "GET",
                    asked,
                    b"",
                    [
                        *(pair for pair in headers if _passes(pair[0], own=own)),
                        (b"accept-encoding", b"identity"),
                    ],
                    None,
                    read_seconds=_SECONDS,
                )
                body = await _whole(response) if response.status == 200 else b""
        except (UpstreamUnavailable, TimeoutError):
            return None
        try:
            told: list[dict[str, Any]] = orjson.loads(body)["data"]
            return [model for model in told if isinstance(model["id"], str)]
        except (ValueError, TypeError, KeyError):
            return None


def _passes(name: bytes, *, own: bool) -> bool:
    """Whether a header of the client's goes along: its credential to its own provider only, and
    nothing that would bring another answer than a whole, plain list."""
    if name in _NOT_ASKED:
        return False
    return own or not (is_credential(name) or name == b"cookie")


async def _whole(response: Response) -> bytes:
    """The body, cut where no list of models is that long."""
    body = b""
    try:
        async for chunk in response.chunks():
            body += chunk
            if len(body) > _LONGEST:
                break
    finally:
        await response.close()
    return body
