"""The path of one request. Start reading at `Proxy.handle`.

Asks the collaborators in order and acts on their verdicts; judges nothing itself. Every request
leaves exactly one record, whichever way it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import structlog

from embeddings import Recall

from . import canonical, decisions
from .acceptance import Acceptance
from .audit import Auditor, Case
from .dial import Dial
from .errors import BadRequest, MemoryUnavailable, UpstreamUnavailable
from .explain import Partitions
from .flights import Flight, Flights
from .ledger import Source
from .memory import Memory, Recollection
from .model import Answer, Bypass, Call, Entry, Hit, Miss, Outcome, Policy
from .passage import Landing, Passage
from .pricing import PriceBook
from .protocols import sse
from .protocols.faults import fault
from .reading import PROTOCOLS, Exchange, Reader
from .reply import STALE, Reply, failure, hit_headers, passed_headers
from .store import Look
from .upstream.completion import Completion
from .upstream.deadlines import patience
from .upstream.relay import Errand, Journey, Relay

__all__ = ["Parts", "Proxy", "aside", "flight_body"]

log = structlog.get_logger("cache_proxy")

R = TypeVar("R")

_NOTHING = Recollection()
_LONG_BODY = 16_384  # bytes; some milliseconds to read, trim and judge


@dataclass(frozen=True, slots=True)
class Parts:
    """The finished parts that the shell works with."""

    policy: Policy
    dial: Dial
    reader: Reader
    memory: Memory
    acceptance: Acceptance
    relay: Relay
    flights: Flights[Landing]
    record: Callable[[Outcome], None]
    prices: PriceBook
    secret: bytes
    fingerprint: bytes
    read_seconds: float
    clock: Callable[[], float]  # Unix seconds
    now: Callable[[], float]  # monotonic seconds
    new_id: Callable[[], str]
    partitions: Partitions


class Proxy:
    """Answers requests to cached operations, from memory or from upstream."""

    def __init__(self, parts: Parts) -> None:
        self.parts = self._parts = parts
        self.auditor: Auditor | None = None  # needs this proxy's way upstream; set by the wiring

    def policy(self, route: str) -> Policy:
        """The policy with the threshold in force for a model, which audits may have tightened."""
        policy, threshold = self._parts.policy, self._parts.dial.threshold(route)
        return policy if threshold == policy.threshold else replace(policy, threshold=threshold)

    async def handle(self, exchange: Exchange) -> Reply:
        """The path of one request."""
        started = self._parts.now()
        try:
            call = await aside(exchange, self._parts.reader.read, exchange)
        except BadRequest as exc:
            return self.refuse(exchange, exc, started)
        if isinstance(call, Bypass):
            return await self.pass_by(exchange, None, call.reason, started)

        try:
            told = call.request, call.asked, self._parts.policy
            prompt = await aside(exchange, decisions.admit, *told)
        except Exception as exc:  # noqa: BLE001 - a mistake of ours must cost hits, not answers
            log.warning("judging", error=type(exc).__name__)  # its text may hold the prompt's
            return await self.pass_by(exchange, call, "internal", started)
        if isinstance(prompt, Bypass):
            return await self.pass_by(exchange, call, prompt.reason, started)

        try:
            look = await self._parts.memory.look(call.digest, call.partition, call.token, started)
        except MemoryUnavailable as exc:
            return await self.pass_by(exchange, call, exc.part, started)

        try:
            verdict, found = await self._judge(exchange, call, look, started)
        except Exception as exc:  # noqa: BLE001 - as above
            log.warning("judging", error=type(exc).__name__)
            return await self.pass_by(exchange, call, "internal", started)
        outcome = self._outcome(exchange, call, verdict, found)
        if isinstance(verdict, Hit) and not outcome.shadow:
            return self._serve(exchange, call, verdict, outcome, started)
        if call.asked.only_if_cached:
            return self.nothing_cached(exchange, outcome, started)

        def landed(flight: Flight[Landing]) -> Landing:
            landing = self._landed(flight, exchange, call, look, found.embedding)
            self._learn(call, found, flight, landing, outcome)
            return landing

        key = _flight_key(exchange, call, outcome.reason)
        stale = self._stale(call, look, outcome)
        return await self.fly(exchange, call, key, outcome, landed, started, stale=stale)

    async def _judge(
        self, exchange: Exchange, call: Call, look: Look, started: float
    ) -> tuple[Hit | Miss, Recollection]:
        """Exact, then similar; and the embedding under way for what a miss will store."""
        now = int(self._parts.clock())
        acceptance = self._parts.acceptance
        provider = exchange.routed.provider
        accepted = acceptance.fresh(look, provider) or await acceptance.holds(
            look, provider, call.token, exchange.headers
        )
        readable = accepted and not call.asked.no_cache
        if readable and look.entry and decisions.fits(look.entry, call.asked, now):
            # Where it is only looked up, upstream's answer takes its place, and needs a vector.
            return Hit(look.entry, "exact", 1.0), await self._again(exchange, call)
        text = call.request.text or ""
        told = call.request, call.asked, self._parts.policy
        if reason := await aside(exchange, decisions.closed, *told):
            # Who asked for exact matches only did not ask to be found by them only.
            found = self._parts.memory.embed(text) if reason == "mode" and text else _NOTHING
            return Miss(_unread(call, accepted) or reason), found
        if not readable:
            return Miss(_unread(call, accepted)), self._parts.memory.embed(text)
        if self._parts.flights.flying(_flight_key(exchange, call, "")):
            # The same question is on its way up: its answer will come sooner than a neighbour's
            # could be judged, and with no await before joining it cannot be missed.
            return Miss("in_flight"), _NOTHING
        found = await self._parts.memory.recall(
            text, call.partition, self._parts.policy.neighbours, started
        )
        if found.trouble:
            return Miss(found.trouble), found
        read = PROTOCOLS[call.request.operation].text_of
        policy = self.policy(call.request.model)
        verdict = decisions.choose(text, found.candidates, call.asked, policy, now, read)
        return verdict, found

    async def _again(self, exchange: Exchange, call: Call) -> Recollection:
        """The embedding of what is found and stored anew all the same, in shadow mode."""
        policy, text = self._parts.policy, call.request.text
        shadow = decisions.only_looked_up(call.request.model, call.asked, policy, exact=True)
        if not shadow or not text:
            return _NOTHING
        closed = await aside(exchange, decisions.closed, call.request, call.asked, policy)
        return self._parts.memory.embed(text) if closed in ("", "mode") else _NOTHING

    def _outcome(
        self, exchange: Exchange, call: Call, verdict: Hit | Miss, found: Recollection
    ) -> Outcome:
        """The record of this request, begun."""
        exact = isinstance(verdict, Hit) and verdict.tier == "exact"
        shadow = decisions.only_looked_up(
            call.request.model, call.asked, self._parts.policy, exact=exact
        )
        outcome = Outcome(
            kind="miss",
            model=call.request.model,
            tenant=call.tenant,
            similarity=verdict.similarity,
            vetoes=verdict.vetoes,
            threshold=max(
                self._parts.dial.threshold(call.request.model), call.asked.threshold or 0.0
            ),
            encode_ms=found.encode_ms,
            shadow=shadow,
            refresh=call.asked.no_cache,
            provider=exchange.routed.provider.name,
            priority=exchange.routed.priority,
            trimmed=exchange.routed.trimmed,
        )
        if isinstance(verdict, Miss):
            outcome.reason = verdict.reason
            outcome.churn = canonical.churn(self._parts.secret, call.request.rest)
            self._parts.partitions.note(call, outcome.churn)
        else:
            outcome.tier = verdict.tier
            outcome.reason = "shadow" if shadow else ""
        return outcome

    def _stale(self, call: Call, look: Look, outcome: Outcome) -> Entry | None:
        """An expired answer to this very question that will do where upstream fails (RFC 5861)."""
        entry, now = look.stale, int(self._parts.clock())
        if entry is None or outcome.shadow or outcome.reason in ("unaccepted", "no_cache"):
            return None
        return entry if decisions.fits(entry, call.asked, now) else None

    def _serve(
        self, exchange: Exchange, call: Call, hit: Hit, outcome: Outcome, started: float
    ) -> Reply:
        """A stored answer, under a fresh id, in the form that was asked for."""
        entry, request, now = hit.entry, call.request, int(self._parts.clock())
        protocol = PROTOCOLS[request.operation]
        if request.stream:
            body = b"".join(protocol.render_stream(entry.body, request, self._parts.new_id(), now))
        else:
            body = protocol.render_json(entry.body, request, self._parts.new_id(), now)
        outcome.kind = "hit"
        outcome.status = 200
        outcome.entry = entry.digest.hex()
        outcome.age, outcome.ttl = max(0, now - entry.created), entry.expires - now
        if outcome.reason != STALE:
            outcome.ttl = max(0, outcome.ttl)
        outcome.saved, outcome.saved_cost = entry.usage, entry.cost
        outcome.ms = (self._parts.now() - started) * 1_000
        self._parts.record(outcome)
        if hit.tier == "semantic" and self.auditor is not None:
            self.auditor.served(Case(exchange, call, entry, hit.similarity))
        return Reply(200, hit_headers(outcome, stream=request.stream, length=len(body)), body)

    async def pass_by(
        self, exchange: Exchange, call: Call | None, reason: str, started: float
    ) -> Reply:
        """Straight to upstream, shared with nobody and kept nowhere; its usage still counts."""
        outcome = Outcome(
            kind="bypass",
            reason=reason,
            model=call.request.model if call else "",
            tenant=call.tenant if call else "",
            provider=exchange.routed.provider.name,
            priority=exchange.routed.priority,
            trimmed=exchange.routed.trimmed,
        )
        if call is not None and call.asked.only_if_cached:
            return self.nothing_cached(exchange, outcome, started)

        def landed(flight: Flight[Landing]) -> Landing:
            if call is not None and flight.status >= 400:
                self.note(flight, exchange, None, call.partition, call.token)
            return self._read_only(flight, call)

        return await self.fly(exchange, call, None, outcome, landed, started)

    async def fly(
        self,
        exchange: Exchange,
        call: Call | None,
        key: bytes | None,
        outcome: Outcome,
        landed: Callable[[Flight[Landing]], Landing],
        started: float,
        *,
        token: bytes = b"",
        stale: Entry | None = None,
    ) -> Reply:
        """Join or start the upstream call, wait for its head, and pass on what comes.

        `stale` is served where upstream fails.
        """
        errand = Errand(
            route=exchange.routed,
            query=exchange.query,
            headers=exchange.headers,
            body=exchange.body,
            with_usage=_with_usage(exchange, call),
            token=token or (call.token if call else b""),
            patience=patience(exchange.headers),
        )
        exchange.watch()
        journey = Journey(self._parts.relay, errand)
        flight, joined = self._parts.flights.join(key, journey, landed)
        if isinstance(flight.send, Journey):
            errand = flight.send.errand
        outcome.collapsed = joined
        passage = Passage(
            flight, outcome, errand, started=started, now=self._parts.now, record=self._parts.record
        )
        try:
            await flight.head()
        except UpstreamUnavailable as exc:
            if call is not None and stale is not None and exc.status_hint >= 500:
                return self._instead(exchange, call, stale, passage, outcome, started)
            outcome.attempts = 0 if joined else errand.attempts
            reply = self.broken(exchange, outcome, exc)
            passage.finish()
            return reply
        except BaseException:
            passage.finish()
            raise
        if call is not None and stale is not None and flight.status >= 500:
            return self._instead(exchange, call, stale, passage, outcome, started)
        outcome.status = flight.status
        outcome.attempts = 0 if joined else errand.attempts
        source = flight.source
        if isinstance(source, Completion) and source.instead:
            outcome.answered_by, outcome.provider = source.route.model, source.route.provider.name
            messages, tokens = source.route.trimmed  # on top of what the first one needed
            outcome.trimmed = outcome.trimmed[0] + messages, outcome.trimmed[1] + tokens
        headers = passed_headers(outcome, flight.headers, spent=getattr(source, "spent", False))
        strip = getattr(source, "usage_injected", False)
        if strip:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        chunks = passage.chunks(strip_usage=strip)
        return Reply(flight.status, headers, chunks, passage.finish)

    def _instead(
        self,
        exchange: Exchange,
        call: Call,
        stale: Entry,
        passage: Passage,
        outcome: Outcome,
        started: float,
    ) -> Reply:
        """Upstream failed: the expired answer, said to be one."""
        passage.abandon()
        outcome.reason, outcome.tier, outcome.similarity = STALE, "exact", 1.0
        outcome.vetoes, outcome.collapsed = (), False
        return self._serve(exchange, call, Hit(stale, "exact", 1.0), outcome, started)

    def _landed(
        self,
        flight: Flight[Landing],
        exchange: Exchange,
        call: Call,
        look: Look,
        embedding: asyncio.Future[Recall] | None,
    ) -> Landing:
        """Upstream's answer is whole, or never will be: keep it if it may be kept."""
        landing = self._read_only(flight, call)
        self.note(flight, exchange, look, call.partition, call.token)
        answer = landing.answer
        if answer is None:
            return landing
        spoken = self._spoken(flight, exchange, call)
        if isinstance(spoken, Bypass):
            return Landing(answer, landing.cost, discard=spoken.reason)
        call, provider = spoken
        if discard := decisions.keep(
            answer, flight.status, call.request.choices, self._parts.policy
        ):
            return Landing(answer, landing.cost, discard=discard.reason)
        try:
            body = PROTOCOLS[call.request.operation].prepare(answer.body)
        except ValueError:
            return Landing(answer, landing.cost, discard="unreadable")
        ttl = min(self._parts.policy.ttl_seconds, call.asked.ttl or self._parts.policy.ttl_seconds)
        now = int(self._parts.clock())
        entry = Entry(
            digest=call.digest,
            partition=call.partition,
            fingerprint=self._parts.fingerprint,
            epoch=look.epoch,
            created=now,
            expires=now + ttl,
            text=call.request.text or "",
            model=call.request.model,
            provider=provider,
            tenant=call.tenant,
            namespace=call.asked.namespace,
            tags=call.asked.tags,
            usage=answer.usage,
            cost=landing.cost,
            body=body,
        )
        self._parts.memory.remember(entry, embedding, ttl)
        return Landing(answer, landing.cost, stored=True)

    def _spoken(
        self, flight: Flight[Landing], exchange: Exchange, call: Call
    ) -> tuple[Call, str] | Bypass:
        """The request as whoever answered it was asked, and that provider's base URL: its answer
        must never be found under another model's name."""
        source = flight.source
        if not isinstance(source, Completion) or not source.instead:
            return call, exchange.routed.provider.base_url
        other = self._parts.reader.reread(exchange, source.route)
        return other if isinstance(other, Bypass) else (other, source.route.provider.base_url)

    def _learn(
        self,
        call: Call,
        found: Recollection,
        flight: Flight[Landing],
        landing: Landing,
        outcome: Outcome,
    ) -> None:
        """A free label: what upstream answered, against what the nearest neighbour holds."""
        if self.auditor is None or landing.answer is None or not landing.stored:
            return
        if getattr(flight.source, "instead", False):  # two models may well say two things
            return
        text = call.request.text or ""
        near = decisions.nearest(text, found.candidates, self.policy(call.request.model))
        if near is not None:
            source: Source = "shadow" if outcome.shadow else "miss"
            self.auditor.observe(call, near, landing.answer, source)

    async def ask(self, exchange: Exchange, call: Call) -> Landing:
        """Put a request to upstream whole, past the cache and outside the count of requests.

        Raises UpstreamUnavailable.
        """
        document = canonical.load(exchange.body)
        document.pop("stream_options", None)
        errand = Errand(
            route=replace(exchange.routed, priority="best_effort"),
            query=exchange.query,
            headers=exchange.headers,
            body=canonical.dump({**document, "stream": False}),
            with_usage=None,
            token=call.token,
            patience=None,
            alone=True,
        )
        response = await self._parts.relay.send(errand)
        try:
            body = b"".join([chunk async for chunk in response.chunks()])
        finally:
            await response.close()
        if response.status != 200:
            return Landing()
        answer: Answer = PROTOCOLS[call.request.operation].whole(body)
        return Landing(answer, self._cost(answer, call, response))

    def note(
        self,
        flight: Flight[Landing],
        exchange: Exchange,
        look: Look | None,
        partition: bytes,
        token: bytes,
    ) -> None:
        """Remember what upstream thinks of the credential, where it saw the client's own."""
        source = flight.source
        route = source.route if isinstance(source, Completion) else exchange.routed
        if flight.status and route.provider.judges:
            refusal = b"" if flight.status < 400 else flight.body or b""
            self._parts.memory.soon(
                partition, self._parts.acceptance.note(look, token, flight.status, refusal)
            )

    def _read_only(self, flight: Flight[Landing], call: Call | None) -> Landing:
        """What the answer says and cost; nothing when it cannot be read."""
        answer = _answer(flight, call)
        if answer is None or call is None or not isinstance(flight.source, Completion):
            return Landing(answer)
        return Landing(answer, self._cost(answer, call, flight.source))

    def _cost(self, answer: Answer, call: Call, completion: Completion) -> int | None:
        """Nano-dollars, at the prices of whoever answered."""
        if answer.usage is None:
            return None
        provider = completion.route.provider.base_url
        model = completion.route.model if completion.instead else call.request.model
        return self._parts.prices.cost(answer.usage, model, provider)

    def refuse(self, exchange: Exchange, exc: BadRequest, started: float) -> Reply:
        outcome = Outcome(kind="error", reason="bad_request", status=exc.status)
        outcome.ms = (self._parts.now() - started) * 1_000
        self._parts.record(outcome)
        return _error(exchange, outcome, str(exc), exc.code, retry=False)

    def nothing_cached(self, exchange: Exchange, outcome: Outcome, started: float) -> Reply:
        outcome.status, outcome.ms = 504, (self._parts.now() - started) * 1_000
        outcome.reason = outcome.reason or "only_if_cached"
        self._parts.record(outcome)
        message = "Nothing fitting is cached, and only-if-cached was asked for."
        return _error(exchange, outcome, message, "only_if_cached", retry=False)

    def broken(self, exchange: Exchange, outcome: Outcome, exc: UpstreamUnavailable) -> Reply:
        """No answer came from upstream: say so in the protocol's shape."""
        reason = exc.reason if exc.reason in ("rate_limited", "shed", "open") else "upstream"
        outcome.kind, outcome.reason, outcome.status = "error", reason, exc.status_hint
        code = "rate_limit_exceeded" if exc.status_hint == 429 else "upstream_unavailable"
        body = fault(exchange.protocol, str(exc), outcome.status, code)
        return failure(outcome, body, retry=exc.retry, retry_after=exc.retry_after)


async def aside(exchange: Exchange, work: Callable[..., R], *arguments: Any) -> R:
    """Work that grows with the body: for a long one beside the loop, which serves others."""
    if len(exchange.body) <= _LONG_BODY:
        return work(*arguments)
    return await asyncio.to_thread(work, *arguments)


def _error(exchange: Exchange, outcome: Outcome, message: str, code: str, *, retry: bool) -> Reply:
    return failure(outcome, fault(exchange.protocol, message, outcome.status, code), retry=retry)


def _with_usage(exchange: Exchange, call: Call | None) -> bytes | None:
    """The body that asks for a stream's usage too; None where the client did, or none can come."""
    if call is None or not call.request.stream or call.request.include_usage:
        return None
    asked: bytes = PROTOCOLS[exchange.operation].ask_usage(
        exchange.body, canonical.load(exchange.body)
    )
    return asked


def _unread(call: Call, accepted: bool) -> str:
    """Why the cache was not even read; "" when it was."""
    if call.asked.no_cache:
        return "no_cache"
    return "" if accepted else "unaccepted"


def _flight_key(exchange: Exchange, call: Call, reason: str) -> bytes | None:
    """What may share one call: the same question in the same form. A credential that upstream
    does not accept shares with itself alone, and whoever asked for a fresh answer with nobody.
    Where there is a queue nobody waits in it for one of another class."""
    if call.asked.no_cache:
        return None
    form = b"%d%d" % (call.request.stream, call.request.include_usage)
    if exchange.routed.provider.limited:
        form += exchange.routed.priority.encode()
    return call.digest + form + (call.token if reason == "unaccepted" else b"")


def flight_body(flight: Flight[Landing]) -> bytes | None:
    """The whole body of a good answer that can be read as it is."""
    coding = dict(flight.headers).get(b"content-encoding", b"identity")
    return flight.body if flight.status == 200 and coding == b"identity" else None


def _answer(flight: Flight[Landing], call: Call | None) -> Answer | None:
    """The answer as its protocol reads it; None when it is cut, failed, coded or of no protocol."""
    body = flight_body(flight)
    if call is None or body is None:
        return None
    headers = dict(flight.headers)
    protocol = PROTOCOLS[call.request.operation]
    if not headers.get(b"content-type", b"").startswith(b"text/event-stream"):
        answer: Answer = protocol.whole(body)
        return answer
    return _reassembled(protocol, body)


def _reassembled(protocol: ModuleType, body: bytes) -> Answer | None:
    """A whole stream put together."""
    splitter = sse.Splitter()
    reader = protocol.Reassembler()
    try:
        events = [*splitter.feed(body), *splitter.close()]
    except sse.SseTooLarge:
        return None
    for event in events:
        data = sse.data(event)
        if data is not None:
            reader.feed(data)
    answer: Answer = reader.answer()
    return answer
