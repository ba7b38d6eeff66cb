"""The path of one request. Start reading at `Proxy.handle`.

Asks the collaborators in order and acts on their verdicts; judges nothing itself. Every request
leaves exactly one record, whichever way it ends.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

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
from .protocols.openai_answer import error
from .reading import PROTOCOLS, Exchange, Reader
from .reply import Reply, failure, hit_headers, passed_headers
from .store import Look
from .upstream.client import Upstream
from .upstream.completion import Asked, send
from .upstream.routes import Headers, target

__all__ = ["Parts", "Proxy", "flight_body"]

_NOTHING = Recollection()


@dataclass(frozen=True, slots=True)
class Parts:
    """The finished parts that the shell works with."""

    policy: Policy
    dial: Dial
    reader: Reader
    memory: Memory
    acceptance: Acceptance
    upstream: Upstream
    base_url: str
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
        self._no_usage: set[str] = set()  # upstreams that reject `stream_options`

    def policy(self, route: str) -> Policy:
        """The policy with the threshold in force for a model, which audits may have tightened."""
        policy, threshold = self._parts.policy, self._parts.dial.threshold(route)
        return policy if threshold == policy.threshold else replace(policy, threshold=threshold)

    async def handle(self, exchange: Exchange) -> Reply:
        """The path of one request."""
        started = self._parts.now()
        try:
            call = self._parts.reader.read(exchange)
        except BadRequest as exc:
            return self.refuse(exc, started)
        if isinstance(call, Bypass):
            return await self.pass_by(exchange, None, call.reason, started)

        prompt = decisions.admit(call.request, call.asked, self._parts.policy)
        if isinstance(prompt, Bypass):
            return await self.pass_by(exchange, call, prompt.reason, started)

        try:
            look = await self._parts.memory.look(call.digest, call.partition, call.token, started)
        except MemoryUnavailable as exc:
            return await self.pass_by(exchange, call, exc.part, started)

        verdict, found = await self._judge(exchange, call, look, started)
        outcome = self._outcome(call, verdict, found, started)
        if isinstance(verdict, Hit) and not outcome.shadow:
            return self._serve(exchange, call, verdict, outcome, started)
        if call.asked.only_if_cached:
            return self.nothing_cached(outcome, started)

        def landed(flight: Flight[Landing]) -> Landing:
            landing = self._landed(flight, call, look, found.embedding)
            self._learn(call, found, landing, outcome)
            return landing

        key = _flight_key(call, outcome.reason)
        return await self.fly(exchange, call, key, outcome, landed, started)

    async def _judge(
        self, exchange: Exchange, call: Call, look: Look, started: float
    ) -> tuple[Hit | Miss, Recollection]:
        """Exact, then similar; and the embedding under way for what a miss will store."""
        now = int(self._parts.clock())
        acceptance = self._parts.acceptance
        accepted = acceptance.fresh(look) or await acceptance.holds(
            look, call.token, exchange.headers
        )
        readable = accepted and not call.asked.no_cache
        if readable and look.entry and decisions.fits(look.entry, call.asked, now):
            return Hit(look.entry, "exact", 1.0), _NOTHING
        text = call.request.text or ""
        if reason := decisions.closed(call.request, call.asked, self._parts.policy):
            # Who asked for exact matches only did not ask to be found by them only.
            found = self._parts.memory.embed(text) if reason == "mode" and text else _NOTHING
            return Miss(_unread(call, accepted) or reason), found
        if not readable:
            return Miss(_unread(call, accepted)), self._parts.memory.embed(text)
        if self._parts.flights.flying(_flight_key(call, "")):
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

    def _outcome(
        self, call: Call, verdict: Hit | Miss, found: Recollection, started: float
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
        )
        if isinstance(verdict, Miss):
            outcome.reason = verdict.reason
            outcome.churn = canonical.churn(self._parts.secret, call.request.rest)
            self._parts.partitions.note(call, outcome.churn)
        else:
            outcome.tier = verdict.tier
            outcome.reason = "shadow" if shadow else ""
        return outcome

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
        outcome.age, outcome.ttl = max(0, now - entry.created), max(0, entry.expires - now)
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
        )
        if call is not None and call.asked.only_if_cached:
            return self.nothing_cached(outcome, started)

        def landed(flight: Flight[Landing]) -> Landing:
            if call is not None and flight.status >= 400:
                self.note(flight, None, call.partition, call.token)
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
    ) -> Reply:
        """Join or start the upstream call, wait for its head, and pass on what comes."""
        asked = Asked(
            url=target(self._parts.base_url, exchange.path, exchange.query),
            headers=exchange.headers,
            body=exchange.body,
            with_usage=_with_usage(exchange, call),
            provider=self._parts.base_url,
            read_seconds=_patience(exchange.headers, self._parts.read_seconds),
        )
        exchange.watch()
        flight, joined = self._parts.flights.join(
            key,
            lambda: send(self._parts.upstream, asked, self._no_usage),
            landed,
        )
        outcome.collapsed = joined
        passage = Passage(
            flight, outcome, started=started, now=self._parts.now, record=self._parts.record
        )
        try:
            await flight.head()
        except UpstreamUnavailable as exc:
            reply = self.broken(outcome, exc)
            passage.finish()
            return reply
        except BaseException:
            passage.finish()
            raise
        outcome.status = flight.status
        headers = passed_headers(outcome, flight.headers)
        strip = getattr(flight.source, "usage_injected", False)
        if strip:
            headers = [pair for pair in headers if pair[0] != b"content-length"]
        chunks = passage.chunks(strip_usage=strip)
        return Reply(flight.status, headers, chunks, passage.finish)

    def _landed(
        self,
        flight: Flight[Landing],
        call: Call,
        look: Look,
        embedding: asyncio.Future[Recall] | None,
    ) -> Landing:
        """Upstream's answer is whole, or never will be: keep it if it may be kept."""
        landing = self._read_only(flight, call)
        self.note(flight, look, call.partition, call.token)
        answer = landing.answer
        if answer is None:
            return landing
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
            provider=self._parts.base_url,
            tenant=call.tenant,
            namespace=call.asked.namespace,
            tags=call.asked.tags,
            usage=answer.usage,
            cost=landing.cost,
            body=body,
        )
        self._parts.memory.remember(entry, embedding, ttl)
        return Landing(answer, landing.cost, stored=True)

    def _learn(self, call: Call, found: Recollection, landing: Landing, outcome: Outcome) -> None:
        """A free label: what upstream answered, against what the nearest neighbour holds."""
        if self.auditor is None or landing.answer is None or not landing.stored:
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
        asked = Asked(
            url=target(self._parts.base_url, exchange.path, exchange.query),
            headers=exchange.headers,
            body=canonical.dump({**document, "stream": False}),
            with_usage=None,
            provider=self._parts.base_url,
            read_seconds=self._parts.read_seconds,
        )
        response = await send(self._parts.upstream, asked, self._no_usage)
        try:
            body = b"".join([chunk async for chunk in response.chunks()])
        finally:
            await response.close()
        if response.status != 200:
            return Landing()
        answer: Answer = PROTOCOLS[call.request.operation].whole(body)
        cost = None
        if answer.usage is not None:
            cost = self._parts.prices.cost(answer.usage, call.request.model, self._parts.base_url)
        return Landing(answer, cost)

    def note(
        self, flight: Flight[Landing], look: Look | None, partition: bytes, token: bytes
    ) -> None:
        """Remember what upstream thinks of the credential."""
        if flight.status:
            refusal = b"" if flight.status < 400 else flight.body or b""
            self._parts.memory.soon(
                partition, self._parts.acceptance.note(look, token, flight.status, refusal)
            )

    def _read_only(self, flight: Flight[Landing], call: Call | None) -> Landing:
        """What the answer says and cost; nothing when it cannot be read."""
        answer = _answer(flight, call)
        if answer is None or answer.usage is None or call is None:
            return Landing(answer)
        cost = self._parts.prices.cost(answer.usage, call.request.model, self._parts.base_url)
        return Landing(answer, cost)

    def refuse(self, exc: BadRequest, started: float) -> Reply:
        outcome = Outcome(kind="error", reason="bad_request", status=exc.status)
        outcome.ms = (self._parts.now() - started) * 1_000
        self._parts.record(outcome)
        return _error(outcome, str(exc), "invalid_request", retry=False)

    def nothing_cached(self, outcome: Outcome, started: float) -> Reply:
        outcome.status, outcome.ms = 504, (self._parts.now() - started) * 1_000
        outcome.reason = outcome.reason or "only_if_cached"
        self._parts.record(outcome)
        message = "Nothing fitting is cached, and only-if-cached was asked for."
        return _error(outcome, message, "only_if_cached", retry=False)

    def broken(self, outcome: Outcome, exc: UpstreamUnavailable) -> Reply:
        """No answer came from upstream: say so in the protocol's shape."""
        outcome.kind, outcome.reason, outcome.status = "error", "upstream", exc.status_hint
        return _error(outcome, str(exc), "upstream_unavailable", retry=True)


def _error(outcome: Outcome, message: str, code: str, *, retry: bool) -> Reply:
    return failure(outcome, error(message, outcome.status, code), retry=retry)


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


def _flight_key(call: Call, reason: str) -> bytes | None:
    """What may share one call: the same question in the same form. A credential that upstream
    does not accept shares with itself alone, and whoever asked for a fresh answer with nobody."""
    if call.asked.no_cache:
        return None
    form = b"%d%d" % (call.request.stream, call.request.include_usage)
    return call.digest + form + (call.token if reason == "unaccepted" else b"")


def _patience(headers: Headers, otherwise: float) -> float:
    """How long the client itself is ready to wait, in seconds."""
    for name, value in headers:
        if name == b"x-stainless-read-timeout" and re.fullmatch(rb"\d{1,6}(\.\d{1,6})?", value):
            return float(value) or otherwise
    return otherwise


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
