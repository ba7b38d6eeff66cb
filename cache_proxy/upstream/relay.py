"""The way of one miss to upstream and back: windows and deadlines kept, attempts made, other models
asked instead, an answer's head brought.

An answer that has begun is never asked for again (I5). Whoever sends an errand may be cancelled at
any time, and its waits and calls with it (I8). Holds what must be remembered between errands and
knows nothing of caching; what an answer says is for others to read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from ..canonical import load
from ..errors import BadRequest, UpstreamUnavailable
from ..model import Attempt
from ..protocols.openai_request import ask_usage
from .client import Response, Upstream
from .completion import Asked, Completion, send
from .deadlines import Deadlines, Learnt, Limits, expected_tokens
from .fallback import Chain, Trouble, chain_for, instead, trouble
from .health import Health, Refused
from .providers import Provider, Route, Router
from .retry import LONGEST_WAIT, RetryBudget, Retrying, Windows, may_pass, retry_after
from .routes import Headers, forward
from .turnstile import Place, Turnstile

__all__ = ["Errand", "Journey", "Relay"]

# How much of an answer that is no stream is awaited where its deadline is ours; a longer one is
# passed on from there.
_HELD_BYTES = 4_194_304
# A time-out speaks against upstream only when that had so long: clients may be as impatient as they
# like, and must not shut the door on others.
_FAIR_SECONDS = 30.0


@dataclass(slots=True)
class Errand:
    """One request to bring an answer to, and how often upstream was asked for it."""

    route: Route
    query: bytes
    headers: Headers  # the client's, names in lower case
    body: bytes
    with_usage: bytes | None  # the body that also asks for a stream's usage, where that differs
    token: bytes  # keyed MAC of the client's credential; b"" when it cannot be told
    patience: float | None  # seconds that the client itself is ready to wait, if it says
    alone: bool = False  # no other model's answer will do
    why: Attempt = "first"  # of the next call
    attempts: int = 0
    _recorded: int = 0

    def turn_to(self, route: Route) -> None:
        """Go there instead."""
        body = route.body or b""
        self.route, self.body, self.why = route, body, "fallback"
        if self.with_usage is not None:
            self.with_usage = ask_usage(body, load(body))

    def claim(self) -> int:
        """Attempts that no record counts yet; from now on the caller's does."""
        unrecorded, self._recorded = self.attempts - self._recorded, self.attempts
        return unrecorded


class Journey:
    """An errand and the relay that runs it, for the flight that makes it."""

    def __init__(self, relay: Relay, errand: Errand) -> None:
        self.errand = errand
        self._relay = relay

    async def __call__(self) -> Completion:
        return await self._relay.send(self.errand)


@dataclass(frozen=True, slots=True)
class _Terms:
    """What holds for one model's attempts at an errand."""

    until: float  # monotonic seconds
    fair: float  # seconds: a time-out after fewer says nothing of upstream
    idle: float  # seconds between bytes
    held: bool  # it is answered when the answer is there: whole, or a stream's first byte
    alike: Hashable  # whose limits are learnt together


class Relay:
    """Built once, with a pool of connections for each provider by name, and a turnstile for those
    that have a limit. `count` is told of every call made, as it is made. `router` finds the models
    of `chains`; `learnt` None learns nothing.

    `now` gives monotonic and `clock` Unix seconds, `dice` a number in [0, 1).
    """

    def __init__(
        self,
        *,
        pools: Mapping[str, Upstream],
        turnstiles: Mapping[str, Turnstile],
        count: Callable[[Attempt, Route], None],
        retrying: Retrying,
        deadlines: Deadlines,
        learnt: Learnt | None,
        chains: Mapping[str, Chain],
        router: Router,
        now: Callable[[], float],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        dice: Callable[[], float],
    ) -> None:
        self._pools = pools
        self._turnstiles = turnstiles
        self._count = count
        self._retrying = retrying
        self._deadlines = deadlines
        self._learnt = learnt
        self._chains = chains
        self._router = router
        self._health = Health()
        self._now = now
        self._clock = clock
        self._sleep = sleep
        self._dice = dice
        self._budgets = {name: RetryBudget(retrying.budget) for name in pools}
        self._windows = Windows()
        self._no_usage: set[str] = set()  # base URLs that reject `stream_options`

    async def send(self, errand: Errand) -> Completion:
        """The answer's head, good or bad, of the model asked for or of another in its stead.

        Raises UpstreamUnavailable when none came.
        """
        chain = None if errand.alone else chain_for(errand.route, self._chains)
        plain = chain is None and self._deadlines.neutral
        document = None if plain else _document(errand)
        limits, now = self._limits(errand, document), self._now()
        if chain is None or document is None:
            return await self._attempts(errand, self._terms(errand, document, now + limits.model))
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
        place = await self._enter(route, read_seconds) if method == "POST" else None
        try:
            self._count("first", route)
            response = await pool.send(method, url, outgoing, body, read_seconds=read_seconds)
        except BaseException:
            _leave(place)
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

    async def _try(self, errand: Errand, terms: _Terms) -> Completion | UpstreamUnavailable:
        try:
            return await self._attempts(errand, terms)
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
    ) -> _Terms:
        """A model that others come after leaves them half of the time at least."""
        now, limits, route = self._now(), self._limits(errand, document), errand.route
        left = end - now
        length = expected_tokens(document or {}).bit_length() // 2
        return _Terms(
            until=now + min(limits.model, left if last else left / 2),
            fair=min(_FAIR_SECONDS, self._limits(errand, document, hinted=False).model / 2),
            idle=limits.idle,
            held=document is not None,
            alike=(route.provider.name, route.model, "stream" if _streams(document) else length),
        )

    async def _attempts(self, errand: Errand, terms: _Terms) -> Completion:
        """Ask until it is answered or is worth no more."""
        deadline = terms.until
        self._budgets[errand.route.provider.name].asked(self._now())
        tried = 0
        while True:
            if shut := self._health.wait(_circuit(errand), self._now()):
                raise _left_alone(shut)
            await self._keep_window(errand, min(deadline, self._now() + LONGEST_WAIT))
            tried += 1
            try:
                completion = await self._attempt(errand, terms)
            except UpstreamUnavailable as exc:
                if exc.reason != "connect":
                    raise  # it may have been sent, and answered, and charged
                pause = self._pause(errand, tried, None, deadline)
                if pause is None:
                    exc.retry = self._retrying.attempts == 1
                    raise
            else:
                told = self._told(errand, completion)
                if not may_pass(completion.status, completion.headers):
                    return completion
                pause = self._pause(errand, tried, told, deadline)
                if pause is None:
                    later = told is not None and self._too_long(told, deadline)
                    completion.spent = self._retrying.attempts > 1 and not later
                    return completion
                await completion.close()
            await self._sleep(pause)

    async def _keep_window(self, errand: Errand, latest: float) -> None:
        """Wait while upstream wants to hear nothing, or give up at once when that is too long."""
        unknown = errand.route.provider.judges and not errand.token
        if unknown or self._retrying.attempts == 1:
            return  # without retries everything is passed on as it is
        key = _window(errand)
        while True:
            now = self._now()
            left, whole = self._windows.left(key, now)
            if not left:
                return
            if now + left > latest:
                raise UpstreamUnavailable(
                    "Upstream asked not to be called so soon.",
                    429,
                    reason="rate_limited",
                    retry_after=left,
                )
            await self._sleep(left + self._dice() * whole / 10)

    def _told(self, errand: Errand, completion: Completion) -> float | None:
        """When upstream wants to be asked again; of a 429 all that ask alike take notice."""
        if completion.status < 400:
            return None
        told = retry_after(completion.headers, self._clock())
        if told and completion.status == 429:
            self._windows.close(_window(errand), told, self._now())
        return told

    def _pause(
        self, errand: Errand, tried: int, told: float | None, deadline: float
    ) -> float | None:
        """Seconds until the next attempt; None when there will be none."""
        if tried >= self._retrying.attempts or (told and self._too_long(told, deadline)):
            return None
        pause = self._retrying.pause(tried, told, self._dice())
        if self._now() + pause >= deadline:
            return None
        if self._health.wait(_circuit(errand), self._now() + pause):
            return None
        budget = self._budgets[errand.route.provider.name]
        return pause if budget.spend(self._now()) else None

    def _too_long(self, told: float, deadline: float) -> bool:
        return told > LONGEST_WAIT or self._now() + told >= deadline

    async def _enter(self, route: Route, seconds: float) -> Place | None:
        """A place at the provider, kept until the answer has ended; None where it has no limit."""
        turnstile = self._turnstiles.get(route.provider.name)
        return await turnstile.enter(route.priority or "normal", seconds) if turnstile else None

    async def _attempt(self, errand: Errand, terms: _Terms) -> Completion:
        """Ask once, within the time that is left or was learnt; the breaker is told."""
        place = await self._enter(errand.route, terms.until - self._now())
        try:
            completion = await self._judged(errand, terms)
        except BaseException:
            _leave(place)
            raise
        if place is not None:
            completion.when_closed(place.leave)
        return completion

    async def _judged(self, errand: Errand, terms: _Terms) -> Completion:
        left = terms.until - self._now()
        given = left if self._learnt is None else self._learnt.limit(terms.alike, left)
        leave = self._health.enter(_circuit(errand), self._now())
        if isinstance(leave, Refused):
            raise _left_alone(leave.seconds)
        began = self._now()
        try:
            answer = await self._answer(errand, terms, given)
        except (TimeoutError, UpstreamUnavailable) as exc:
            if isinstance(exc, UpstreamUnavailable) and exc.reason != "timeout":
                self._health.failed(leave, self._now())
                raise
            if given < terms.fair:
                self._health.leave(leave)
            else:
                self._health.failed(leave, self._now())
            if self._learnt and given < left:
                self._learnt.cut(terms.alike)
            raise UpstreamUnavailable(
                "Upstream did not answer in time.", 504, reason="timeout", retry=False
            ) from exc
        except BaseException:
            self._health.leave(leave)
            raise
        if answer.status >= 500:
            self._health.failed(leave, self._now())
        else:
            self._health.succeeded(leave, self._now())
        if self._learnt and answer.status == 200:
            self._learnt.answered(terms.alike, self._now() - began)
        return answer

    async def _answer(self, errand: Errand, terms: _Terms, seconds: float) -> Completion:
        """Send, and bring back what counts as an answer. Raises TimeoutError too."""

        def sending() -> None:
            self._count(errand.why, errand.route)
            errand.why = "retry"
            errand.attempts += 1

        asked = Asked(
            route=errand.route,
            query=errand.query,
            headers=errand.headers,
            body=errand.body,
            with_usage=errand.with_usage,
            read_seconds=max(seconds, terms.idle),
            sending=sending,
        )
        completion = None
        try:
            async with asyncio.timeout(seconds):
                pool = self._pools[errand.route.provider.name]
                completion = await send(pool, asked, self._no_usage)
                if terms.held:
                    completion.idle = terms.idle if completion.streams else None
                    await completion.peek(1 if completion.streams else _HELD_BYTES)
                return completion
        except BaseException:
            if completion is not None:
                await completion.close()
            raise


def _leave(place: Place | None) -> None:
    if place is not None:
        place.leave()


def _window(errand: Errand) -> tuple[str, str, bytes]:
    """Who shares a rate limit: one credential's calls to one model of one provider."""
    route = errand.route
    return route.provider.name, route.model, errand.token if route.provider.judges else b""


def _circuit(errand: Errand) -> tuple[str, str]:
    """What fails and recovers together."""
    return errand.route.provider.name, errand.route.model


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


def _left_alone(seconds: float) -> UpstreamUnavailable:
    message = "Upstream has failed again and again, and is left alone for a moment."
    return UpstreamUnavailable(message, 503, reason="open", retry_after=seconds, retry=False)
