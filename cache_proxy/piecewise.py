"""The path of an embeddings request: each input is looked up by itself, upstream asked the rest.

Exact tier only. Works with the parts and the way upstream of `proxy.Proxy`; see there first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from . import canonical, decisions
from .directives import directives
from .errors import BadRequest, MemoryUnavailable, UpstreamUnavailable
from .flights import Flight
from .model import Answer, Bypass, Directives, Entry, Kind, Outcome, Usage
from .passage import Landing
from .protocols import embeddings_api as api
from .protocols.openai_request import Unreadable
from .proxy import Proxy, aside, flight_body
from .reading import Exchange
from .reply import Reply, hit_headers
from .store import Look

__all__ = ["Piecewise"]


@dataclass(frozen=True, slots=True)
class _Batch:
    """One request: its inputs, and the name that each has in the store."""

    request: api.EmbeddingsRequest
    asked: Directives
    document: dict[str, object]
    partition: bytes
    digests: tuple[bytes, ...]
    tenant: str
    token: bytes


class Piecewise:
    """Answers `/embeddings`."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._parts = proxy.parts

    async def handle(self, exchange: Exchange) -> Reply:
        """The path of one embeddings request."""
        started = self._parts.now()
        try:
            batch = await aside(exchange, self._read, exchange)
        except BadRequest as exc:
            return self._proxy.refuse(exchange, exc, started)
        if isinstance(batch, Bypass):
            return await self._proxy.pass_by(exchange, None, batch.reason, started)
        if batch.asked.mode == "off" or batch.asked.no_store:
            reason = "off" if batch.asked.mode == "off" else "no_store"
            return await self._pass_by(exchange, batch, reason, started)
        outcome = self._outcome("miss", "", exchange, batch)
        try:
            look = await self._parts.memory.look(
                batch.digests[0], batch.partition, batch.token, started
            )
            accepted = await self._parts.acceptance.holds(
                look, exchange.routed.provider, batch.token, exchange.headers
            )
            known = await self._known(batch, accepted)
        except MemoryUnavailable as exc:
            return await self._pass_by(exchange, batch, exc.part, started)

        missing = [n for n, entry in enumerate(known) if entry is None]
        found = [entry for entry in known if entry is not None]
        outcome.shadow = decisions.only_looked_up(
            outcome.model, batch.asked, self._parts.policy, exact=True
        )
        if found and outcome.shadow:
            outcome.tier = None if missing else "exact"
            known, missing, found = [None] * len(known), [*range(len(known))], []
            outcome.reason = "shadow"
        outcome.saved, outcome.saved_cost = _saved(found)
        outcome.refresh = batch.asked.no_cache
        if not missing:
            return self._serve(found, outcome, started)
        outcome.reason = outcome.reason or ("partial" if found else _reason(batch, accepted))
        if batch.asked.only_if_cached:
            return self._proxy.nothing_cached(exchange, outcome, started)
        exchange.body = api.ask(batch.document, exchange.body, missing)

        def landed(flight: Flight[Landing]) -> Landing:
            return self._landed(flight, exchange, batch, look, missing)

        key = self._flight_key(batch, accepted, missing)
        reply = await self._proxy.fly(
            exchange, None, key, outcome, landed, started, token=batch.token
        )
        return await self._completed(exchange, reply, outcome, known) if found else reply

    def _read(self, exchange: Exchange) -> _Batch | Bypass:
        asked = directives(exchange.headers)
        document = self._parts.reader.document(exchange)
        if document is None:
            return Bypass("encoded")
        caller = self._parts.reader.caller(exchange)
        if caller is None:
            return Bypass("identity")
        try:
            request = api.parse(document)
        except Unreadable:
            return Bypass("unreadable")
        partition = self._parts.reader.partition(
            exchange, caller, asked, request.end_user, request.rest
        )
        secret = self._parts.secret
        digests = [canonical.mac(secret, "item", partition + item) for item in request.items]
        return _Batch(
            request, asked, document, partition, tuple(digests), caller.tenant.hex(), caller.token
        )

    async def _known(self, batch: _Batch, accepted: bool) -> Sequence[Entry | None]:
        """What the store holds for each input; nothing for callers it must not be read for."""
        if not accepted or batch.asked.no_cache:
            return [None] * len(batch.digests)
        now = int(self._parts.clock())
        oldest = None if batch.asked.max_age is None else now - batch.asked.max_age
        entries = await self._parts.memory.fetch(batch.digests)
        return [
            entry
            if entry and entry.partition == batch.partition and entry.created >= (oldest or 0)
            else None
            for entry in entries
        ]

    def _flight_key(self, batch: _Batch, accepted: bool, missing: Sequence[int]) -> bytes | None:
        if batch.asked.no_cache:
            return None
        names = b"".join(batch.digests[n] for n in missing)
        return names + (b"" if accepted else batch.token)

    async def _pass_by(
        self, exchange: Exchange, batch: _Batch, reason: str, started: float
    ) -> Reply:
        """Straight to upstream; what it costs still counts."""
        outcome = self._outcome("bypass", reason, exchange, batch)

        def landed(flight: Flight[Landing]) -> Landing:
            return self._billed(exchange, batch, flight_body(flight))

        return await self._proxy.fly(
            exchange, None, None, outcome, landed, started, token=batch.token
        )

    def _outcome(self, kind: Kind, reason: str, exchange: Exchange, batch: _Batch) -> Outcome:
        return Outcome(
            kind=kind,
            reason=reason,
            model=batch.request.model,
            tenant=batch.tenant,
            provider=exchange.routed.provider.name,
            priority=exchange.routed.priority,
        )

    def _billed(self, exchange: Exchange, batch: _Batch, body: bytes | None) -> Landing:
        """What an answer cost that is not kept."""
        usage = api.billed(body) if body is not None else None
        if body is None or usage is None:
            return Landing()
        return Landing(_answer(body, usage), self._cost(exchange, batch, usage))

    def _cost(self, exchange: Exchange, batch: _Batch, usage: Usage | None) -> int | None:
        if usage is None:
            return None
        provider = exchange.routed.provider.base_url
        return self._parts.prices.cost(usage, batch.request.model, provider)

    def _serve(self, found: Sequence[Entry], outcome: Outcome, started: float) -> Reply:
        """Every input is known."""
        now = int(self._parts.clock())
        body = _joined(found, outcome.saved)
        outcome.kind, outcome.tier, outcome.status = "hit", "exact", 200
        outcome.similarity = outcome.threshold = 1.0
        outcome.age = max(now - entry.created for entry in found)
        outcome.ttl = min(entry.expires - now for entry in found)
        outcome.entry = found[0].digest.hex()
        outcome.ms = (self._parts.now() - started) * 1_000
        self._parts.record(outcome)
        return Reply(200, hit_headers(outcome, stream=False, length=len(body)), body)

    async def _completed(
        self, exchange: Exchange, reply: Reply, outcome: Outcome, known: Sequence[Entry | None]
    ) -> Reply:
        """Upstream's vectors for the missing inputs, put in among the known ones."""
        assert not isinstance(reply.body, bytes)  # noqa: S101 - `fly` streams what it passes on
        try:
            body = b"".join([chunk async for chunk in reply.body])
        except UpstreamUnavailable as exc:
            told = self._proxy.broken(exchange, outcome, exc)
            reply.finish()
            return told
        except BaseException:
            reply.finish()
            raise
        missing = sum(entry is None for entry in known)
        split = api.split(body, missing) if reply.status == 200 else None
        if split is not None:
            fresh = iter(split.pieces)
            pieces = [_piece(entry) if entry else next(fresh) for entry in known]
            body = api.join(split.model, pieces, _sum(split.usage, outcome.saved))
        headers = [pair for pair in reply.headers if pair[0] != b"content-length"]
        headers.append((b"content-length", b"%d" % len(body)))
        return Reply(reply.status, headers, body, reply.finish)

    def _landed(
        self,
        flight: Flight[Landing],
        exchange: Exchange,
        batch: _Batch,
        look: Look,
        missing: Sequence[int],
    ) -> Landing:
        """Keep each vector under the name of its input."""
        self._proxy.note(flight, exchange, look, batch.partition, batch.token)
        body = flight_body(flight)
        split = api.split(body, len(missing)) if body is not None else None
        if body is None or split is None:
            return self._billed(exchange, batch, body)
        now = int(self._parts.clock())
        ttl = min(self._parts.policy.ttl_seconds, batch.asked.ttl or now)
        sizes = [len(batch.request.items[n]) for n in missing]
        usages = _shares(split.usage, sizes)
        entries = [
            Entry(
                digest=batch.digests[n],
                partition=batch.partition,
                fingerprint=self._parts.fingerprint,
                epoch=look.epoch,
                created=now,
                expires=now + ttl,
                text="",
                model=batch.request.model,
                provider=exchange.routed.provider.base_url,
                tenant=batch.tenant,
                namespace=batch.asked.namespace,
                tags=batch.asked.tags,
                usage=usage,
                cost=self._cost(exchange, batch, usage),
                body=canonical.dump(split.model) + b"\n" + piece,
            )
            for n, piece, usage in zip(missing, split.pieces, usages, strict=True)
        ]
        self._parts.memory.remember_all(batch.partition, entries, ttl)
        cost = self._cost(exchange, batch, split.usage)
        return Landing(_answer(body, split.usage), cost, stored=True)


def _answer(body: bytes, usage: Usage | None) -> Answer:
    return Answer(
        body,
        usage,
        finished=(),
        terminal=True,
        empty=False,
        refused=False,
        tool_calls=False,
        error=False,
    )


def _reason(batch: _Batch, accepted: bool) -> str:
    if batch.asked.no_cache:
        return "no_cache"
    return "no_entry" if accepted else "unaccepted"


def _shares(usage: Usage | None, sizes: Sequence[int]) -> Sequence[Usage | None]:
    """Each input's part of what its batch was billed."""
    if usage is None:
        return [None] * len(sizes)
    return [Usage(input=share) for share in api.apportion(usage.input, sizes)]


def _piece(entry: Entry) -> bytes:
    return entry.body.partition(b"\n")[2]


def _joined(found: Sequence[Entry], usage: Usage | None) -> bytes:
    model = canonical.load(b'{"model":%b}' % found[0].body.partition(b"\n")[0])["model"]
    return api.join(model, [_piece(entry) for entry in found], usage)


def _saved(found: Sequence[Entry]) -> tuple[Usage | None, int | None]:
    """Tokens and nano-dollars that the known inputs cost when they were asked."""
    costs = [entry.cost for entry in found]
    tokens = [entry.usage.input for entry in found if entry.usage]
    if not tokens:
        return None, None
    return Usage(input=sum(tokens)), None if None in costs else sum(cost or 0 for cost in costs)


def _sum(one: Usage | None, other: Usage | None) -> Usage | None:
    return Usage(input=one.input + other.input) if one and other else one or other
