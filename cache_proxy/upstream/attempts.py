"""One model's attempts at an errand: windows kept, a place taken, the breaker heard, time given.

Asks until it is answered or asking is worth no more; who else might be asked is `relay`'s question.
Holds what must be remembered between errands: bans, budgets, breakers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass

from ..canonical import load
from ..errors import UpstreamUnavailable
from ..model import Attempt
from ..protocols.openai_request import ask_usage
from .client import Upstream
from .completion import Asked, Completion, send
from .deadlines import Learnt
from .health import Health, Refused
from .providers import Route
from .retry import LONGEST_WAIT, RetryBudget, Retrying, Windows, may_pass, retry_after
from .routes import Headers
from .turnstile import Place, Turnstile

__all__ = ["Attempts", "Errand", "Terms"]

# How much of an answer that is no stream is awaited where its deadline is ours; a longer one is
# passed on from there.
_HELD_BYTES = 4_194_304


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


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for one model's attempts at an errand."""

    until: float  # monotonic seconds
    fair: float  # seconds: a time-out after fewer says nothing of upstream
    idle: float  # seconds between bytes
    held: bool  # it is answered when the answer is there: whole, or a stream's first byte
    alike: Hashable  # whose limits are learnt together


class Attempts:
    """Built once, with a pool of connections for each provider by name, and a turnstile for those
    that have a limit. `count` is told of every call made, as it is made; `learnt` None learns
    nothing.

    `now` gives monotonic and `clock` Unix seconds, `dice` a number in [0, 1).
    """

    def __init__(
        self,
        *,
        pools: Mapping[str, Upstream],
        turnstiles: Mapping[str, Turnstile],
        count: Callable[[Attempt, Route], None],
        retrying: Retrying,
        learnt: Learnt | None,
        now: Callable[[], float],
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]],
        dice: Callable[[], float],
    ) -> None:
        self._pools = pools
        self._turnstiles = turnstiles
        self._count = count
        self._retrying = retrying
        self._learnt = learnt
        self._health = Health()
        self._now = now
        self._clock = clock
        self._sleep = sleep
        self._dice = dice
        self._budgets = {name: RetryBudget(retrying.budget) for name in pools}
        self._windows = Windows()
        self._no_usage: set[str] = set()  # base URLs that reject `stream_options`

    async def make(self, errand: Errand, terms: Terms) -> Completion:
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

    async def enter(self, route: Route, seconds: float) -> Place | None:
        """A place at the provider, kept until the answer has ended; None where it has no limit."""
        turnstile = self._turnstiles.get(route.provider.name)
        return await turnstile.enter(route.priority or "normal", seconds) if turnstile else None

    async def _attempt(self, errand: Errand, terms: Terms) -> Completion:
        """Ask once, within the time that is left or was learnt; the breaker is told."""
        place = await self.enter(errand.route, terms.until - self._now())
        try:
            completion = await self._judged(errand, terms)
        except BaseException:
            _leave(place)
            raise
        if place is not None:
            completion.when_closed(place.leave)
        return completion

    async def _judged(self, errand: Errand, terms: Terms) -> Completion:
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

    async def _answer(self, errand: Errand, terms: Terms, seconds: float) -> Completion:
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


def _left_alone(seconds: float) -> UpstreamUnavailable:
    message = "Upstream has failed again and again, and is left alone for a moment."
    return UpstreamUnavailable(message, 503, reason="open", retry_after=seconds, retry=False)
