"""One client's passage on a flight: from the first byte to the record of what came of it.

Passes bytes on as they are. The one thing it takes out is the usage chunk that the proxy asked for
and the client did not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from .flights import Flight
from .model import Answer, Outcome
from .protocols import sse
from .protocols.chat import usage_chunk
from .upstream.relay import Errand

__all__ = ["Landing", "Passage"]


@dataclass(frozen=True, slots=True)
class Landing:
    """What a flight came down with, worked out once for all aboard."""

    answer: Answer | None = None  # None when it was cut, failed, or is of a kind not read here
    cost: int | None = None  # nano-dollars
    stored: bool = False
    discard: str = ""  # why a readable answer was not stored


class Passage:
    """Aboard from construction until `finish`, which records and may be called more than once."""

    def __init__(
        self,
        flight: Flight[Landing],
        outcome: Outcome,
        errand: Errand,
        *,
        started: float,
        now: Callable[[], float],
        record: Callable[[Outcome], None],
    ) -> None:
        self._flight = flight
        self._outcome = outcome
        self._errand = errand  # of the flight, whoever began it
        self._started = started
        self._now = now
        self._record = record
        self._finished = False

    async def chunks(self, *, strip_usage: bool) -> AsyncIterator[bytes]:
        """The body as it arrives; raises UpstreamUnavailable where upstream broke off."""
        source = self._flight.chunks()
        async for chunk in _without_usage(source) if strip_usage else source:
            if self._outcome.first_token_ms is None:
                self._outcome.first_token_ms = (self._now() - self._started) * 1_000
            yield chunk

    def finish(self) -> None:
        """Leave the flight and record the outcome, once."""
        if self._finished:
            return
        self._finished = True
        flight, outcome = self._flight, self._outcome
        outcome.ms = (self._now() - self._started) * 1_000
        if landing := flight.landing:
            self._account(landing)
        outcome.attempts = self._errand.claim()
        flight.leave()
        self._record(outcome)

    def abandon(self) -> None:
        """Leave the flight without a record: the client is answered from elsewhere, once."""
        self._finished = True
        self._outcome.attempts = self._errand.claim()
        self._flight.leave()

    def _account(self, landing: Landing) -> None:
        """One aboard carries the cost of the call; for the others it is money saved."""
        flight, outcome = self._flight, self._outcome
        usage = landing.answer.usage if landing.answer else None
        if flight.paid:
            outcome.saved, outcome.saved_cost = usage, landing.cost
            return
        flight.paid = True
        outcome.spent, outcome.spent_cost = usage, landing.cost
        outcome.stored, outcome.discard = landing.stored, landing.discard
        if flight.ended is not None:
            outcome.upstream_ms = (flight.ended - flight.started) * 1_000


async def _without_usage(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same events, byte for byte, less the one that holds only usage."""
    splitter = sse.Splitter()
    async for chunk in chunks:
        try:
            kept = [event for event in splitter.feed(chunk) if not _only_usage(event)]
        except sse.SseTooLarge:
            break  # an image, say: from here on a usage chunk too many beats a broken stream
        if kept:
            yield b"".join(kept)
    if splitter.rest:
        yield splitter.rest
    async for chunk in chunks:
        yield chunk


def _only_usage(event: bytes) -> bool:
    # The cheap test first: nearly every event is a piece of text.
    if b'"usage"' not in event:
        return False
    data = sse.data(event)
    return data is not None and usage_chunk(data)
