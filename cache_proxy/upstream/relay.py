"""The way of one miss to upstream and back: which model is asked for how long, which other one
instead, and an answer's head brought.

An answer that has begun is never asked for again (I5). Whoever sends an errand may be cancelled at
any time, and its waits and calls with it (I8). How a model is asked again, and when not at all, is
`attempts`' part. Knows nothing of caching; what an answer says is for others to read.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from ..canonical import load
from ..errors import BadRequest, UpstreamUnavailable
from ..model import Attempt
from .attempts import Attempts, Errand, Terms
from .client import Response, Upstream
from .completion import Completion
from .deadlines import Deadlines, Limits, expected_tokens
from .fallback import Chain, Trouble, chain_for, instead, trouble
from .providers import Provider, Route, Router
from .routes import Headers, forward

__all__ = ["Errand", "Journey", "Relay"]

# A time-out speaks against upstream only when that had so long: clients may be as impatient as they
# like, and must not shut the door on others.
_FAIR_SECONDS = 30.0


class Journey:
    """An errand and the relay that runs it, for the flight that makes it."""

    def __init__(self, relay: Relay, errand: Errand) -> None:
        self.errand = errand
        self._relay = relay

    async def __call__(self) -> Completion:
        return await self._relay.send(self.errand)


class Relay:
    """Built once, with a pool of connections for each provider by name. `count` is told of every
    call made past `attempts`, as it is made. `router` finds the models of `chains`.
    """

    def __init__(
        self,
        *,
        attempts: Attempts,
        pools: Mapping[str, Upstream],
        count: Callable[[Attempt, Route], None],
        deadlines: Deadlines,
        chains: Mapping[str, Chain],
        router: Router,
        now: Callable[[], float],
    ) -> None:
        self._attempts = attempts
        self._pools = pools
        self._count = count
        self._deadlines = deadlines
        self._chains = chains
        self._router = router
        self._now = now

    async def send(self, errand: Errand) -> Completion:
        """The answer's head, good or bad, of the model asked for or of another in its stead.

        Raises UpstreamUnavailable when none came.
        """
        chain = None if errand.alone else chain_for(errand.route, self._chains)
        plain = chain is None and self._deadlines.neutral
        document = None if plain else _document(errand)
        limits, now = self._limits(errand, document), self._now()
        if chain is None or document is None:
            return await self._attempts.make(
                errand, self._terms(errand, document, now + limits.model)
            )
        return await self._in_turn(errand, chain, document, now + limits.journey)

    async def pass_on(
        self,
        method: str,
        route: Route,
        query: bytes,
        headers: Headers,
        body: bytes | AsyncIterator[bytes] | None,
        *,
        read_seconds: float,
    ) -> Response:
        """A request of any other kind, once. Raises UpstreamUnavailable."""
        provider = route.provider
        url = provider.url(route.path, query)
        outgoing = provider.outgoing(headers)
        pool = self._pools[provider.name]
        # Lists and look-ups take nothing that a provider limits.
        place = await self._attempts.enter(route, read_seconds) if method == "POST" else None
        try:
            self._count("first", route)
            response = await pool.send(method, url, outgoing, body, read_seconds=read_seconds)
        except BaseException:
            if place is not None:
                place.leave()
            raise
        if place is not None:
            response.when_closed(place.leave)
        return response

    async def probe(self, provider: Provider, headers: Headers, seconds: float) -> int:
        """What the provider's free question says to this credential. Raises UpstreamUnavailable."""
        asked = [(k, v) for k, v in provider.outgoing(forward(headers)) if k != b"content-type"]
        pool = self._pools[provider.name]
        self._count("first", Route(provider, provider.protocol, "", b""))
        response = await pool.send("GET", provider.probe, asked, None, read_seconds=seconds)
        await response.close()
        return response.status

    async def close(self) -> None:
        for pool in self._pools.values():
            await pool.close()

    async def _in_turn(
        self, errand: Errand, chain: Chain, document: Mapping[str, Any], end: float
    ) -> Completion:
        """The model asked for, then those of its chain; when all fail, the first one's error."""
        asked = errand.route
        terms = self._terms(errand, document, end, last=not chain.timeout)
        first = await self._try(errand, terms)
        what = _trouble(first)
        others = chain.after(what) if what else ()
        if others and isinstance(first, Completion):
            await first.close()  # it is here, and its place is for others
        for place, name in enumerate(others, 1):
            route = instead(self._router, asked, errand.headers, document, name)
            if route is None or self._now() >= end:
                continue
            errand.turn_to(route)
            terms = self._terms(errand, document, end, last=place == len(others))
            answer = await self._try(errand, terms)
            if isinstance(answer, Completion):
                if answer.status < 400:
                    answer.instead = True
                    return answer
                await answer.close()
        if isinstance(first, UpstreamUnavailable):
            first.retry = first.retry and not others
            raise first
        first.spent = first.spent or bool(others)
        return first

    async def _try(self, errand: Errand, terms: Terms) -> Completion | UpstreamUnavailable:
        try:
            return await self._attempts.make(errand, terms)
        except UpstreamUnavailable as exc:
            return exc

    def _limits(
        self, errand: Errand, document: Mapping[str, Any] | None, *, hinted: bool = True
    ) -> Limits:
        return self._deadlines.limits(
            errand.route.model,
            expected_tokens(document or {}),
            stream=_streams(document),
            hint=errand.patience if hinted else None,
        )

    def _terms(
        self,
        errand: Errand,
        document: Mapping[str, Any] | None,
        end: float,
        *,
        last: bool = True,
    ) -> Terms:
        """A model that others come after leaves them half of the time at least."""
        now, limits, route = self._now(), self._limits(errand, document), errand.route
        left = end - now
        length = expected_tokens(document or {}).bit_length() // 2
        return Terms(
            until=now + min(limits.model, left if last else left / 2),
            fair=min(_FAIR_SECONDS, self._limits(errand, document, hinted=False).model / 2),
            idle=limits.idle,
            held=document is not None,
            alike=(route.provider.name, route.model, "stream" if _streams(document) else length),
        )


def _document(errand: Errand) -> dict[str, Any] | None:
    """The body, read; None when it cannot be, being coded, say."""
    try:
        return load(errand.body)
    except BadRequest:
        return None


def _streams(document: Mapping[str, Any] | None) -> bool:
    return document is not None and document.get("stream") is True


def _trouble(answer: Completion | UpstreamUnavailable) -> Trouble | None:
    """Why another model is to be asked; None where that would not do."""
    if isinstance(answer, Completion):
        return trouble(answer.status)
    if answer.reason == "shed":  # by us: there is too much to do already
        return None
    return "timeout" if answer.reason == "timeout" else "error"
