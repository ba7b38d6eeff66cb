"""Reading a request: who asks, what must be equal, and under which name an answer would be kept.

Does no I/O and judges nothing. Remembers its latest readings, since what is asked again is mostly
asked in the same bytes; the memory holds keyed digests of requests, not credentials.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from . import canonical
from .directives import directives
from .errors import NoRoute
from .model import Bypass, Call, Directives
from .protocols import chat, completions
from .protocols.openai_request import Unreadable
from .tenancy import Caller, Tenancy
from .upstream.providers import Route, Router
from .upstream.routes import Headers, protocol, redacted_query, target

__all__ = ["PROTOCOLS", "Exchange", "Reader"]

PROTOCOLS: dict[str, ModuleType] = {"chat": chat, "completions": completions}

# Request headers that change what upstream answers; no other header partitions.
_PARTITION_HEADERS = frozenset(
    {
        b"anthropic-version",
        b"anthropic-beta",
        b"openai-beta",
        b"openai-organization",
        b"openai-project",
        b"x-goog-user-project",
    }
)
# Headers that are the same in all requests of an app, or say nothing of what is asked.
_PLAIN_HEADERS = frozenset(
    {b"host", b"accept", b"user-agent", b"content-type", b"content-length", b"connection"}
)
_REMEMBERED = 1_024
_REMEMBERED_BYTES = 8_192  # of one body


@dataclass(slots=True)
class Exchange:
    """One HTTP request to a cached operation, its body read."""

    operation: str
    path: bytes  # as it came, percent signs and all
    query: bytes
    headers: Headers  # names in lower case
    body: bytes
    watch: Callable[[], None]  # from here on a client that leaves cancels this request's task
    route: Route | None = None  # set by reading it; path and body are then those to be sent

    @property
    def routed(self) -> Route:
        """Where it goes, once it was read."""
        if self.route is None:
            raise RuntimeError("the exchange was not read")
        return self.route

    @property
    def protocol(self) -> str:
        """Whose shape an error must have."""
        return protocol(self.path, self.headers)


class Reader:
    """Built once; `router` knows where the requests go."""

    def __init__(
        self,
        *,
        tenancy: Tenancy,
        router: Router,
        fingerprint: bytes,
        ignore_end_user: bool,
        masks: tuple[re.Pattern[str], ...],
        question_marker: str,
    ) -> None:
        self._tenancy = tenancy
        self._router = router
        self._fingerprint = fingerprint
        self._ignore_end_user = ignore_end_user
        self._masks = masks
        self._question_marker = question_marker
        self._plain = _PLAIN_HEADERS - {tenancy.user_header}
        self._latest: dict[bytes, tuple[Call, Route]] = {}

    def read(self, exchange: Exchange) -> Call | Bypass:
        """A chat or completions request, and its route, which is set in the exchange.

        Raises BadRequest, of which NoRoute is one; Bypass where no name can be given.
        """
        if len(exchange.body) > _REMEMBERED_BYTES:
            return self._read(exchange)
        key = self._key(exchange)
        latest = self._latest.get(key)
        if latest is not None:
            call, route = latest
            _send_by(exchange, route)
            return call
        read = self._read(exchange)
        if isinstance(read, Call):
            if len(self._latest) >= _REMEMBERED:
                del self._latest[next(iter(self._latest))]
            self._latest[key] = read, exchange.routed
        return read

    def _key(self, exchange: Exchange) -> bytes:
        """One keyed digest of all that a reading may depend on, and then some."""
        parts = [exchange.operation.encode(), exchange.path, exchange.query, exchange.body]
        for name, value in exchange.headers:
            if name not in self._plain:
                parts += (name, value)
        return canonical.keyed(self._tenancy.secret, b"reading", parts)

    def _read(self, exchange: Exchange) -> Call | Bypass:
        asked = directives(exchange.headers)
        document = self.document(exchange)
        if document is None:
            return Bypass("encoded")
        caller = self.caller(exchange)
        if caller is None:
            return Bypass("identity")
        return self._named(exchange, document, asked, caller)

    def reread(self, exchange: Exchange, route: Route) -> Call | Bypass:
        """The same request as if it had been asked by this route, which has a body of its own."""
        body = exchange.body if route.body is None else route.body
        asked = replace(exchange, path=route.path, body=body, route=route)
        caller = self.caller(asked)
        if caller is None:
            return Bypass("identity")
        return self._named(asked, canonical.load(body), directives(asked.headers), caller)

    def _named(
        self, exchange: Exchange, document: dict[str, Any], asked: Directives, caller: Caller
    ) -> Call | Bypass:
        try:
            request = PROTOCOLS[exchange.operation].parse(
                document, masks=self._masks, question_marker=self._question_marker
            )
        except Unreadable:
            return Bypass("unreadable")
        partition = self.partition(exchange, caller, asked, request.end_user, request.rest)
        digest = canonical.digest(self._tenancy.secret, partition, request.text)
        return Call(request, asked, partition, digest, caller.tenant.hex(), caller.token)

    def document(self, exchange: Exchange) -> dict[str, Any] | None:
        """The body as it will be sent, with its route set in the exchange; None when it is coded.

        Raises BadRequest.
        """
        document = None
        if not any(name == b"content-encoding" for name, _ in exchange.headers):
            document = canonical.load(exchange.body)
        elif self._router.by_model(exchange.path, exchange.headers):
            # To guess would show one provider's key to another.
            raise NoRoute("A body with a Content-Encoding does not show its model.", 415)
        route, sent = self._router.route(exchange.path, exchange.headers, document)
        _send_by(exchange, route)
        return sent

    def caller(self, exchange: Exchange) -> Caller | None:
        """Who asks; None when that cannot be told for certain."""
        caller = self._tenancy.caller(exchange.headers, exchange.query)
        provider = exchange.routed.provider
        if caller is None or not provider.name:
            return caller
        # What one provider accepts proves nothing to another.
        fields = (provider.base_url.encode(), caller.token)
        return Caller(caller.tenant, canonical.keyed(self._tenancy.secret, b"at", fields))

    def partition(
        self,
        exchange: Exchange,
        caller: Caller,
        asked: Directives,
        end_user: str | None,
        rest: bytes,
    ) -> bytes:
        """The name of everything that must be equal (I2)."""
        user = None if self._ignore_end_user else end_user
        base_url = exchange.routed.provider.base_url
        return canonical.partition(
            self._tenancy.secret,
            (
                ("encoder", self._fingerprint),
                ("tenant", caller.tenant),
                ("operation", exchange.operation.encode()),
                ("target", target(base_url, exchange.path, b"").encode("latin-1")),
                ("query", redacted_query(exchange.query)),
                ("headers", _partition_headers(exchange.headers)),
                ("namespace", asked.namespace.encode()),
                ("end_user", b"" if user is None else b"=" + user.encode()),
                ("rest", rest),
            ),
        )


def _send_by(exchange: Exchange, route: Route) -> None:
    exchange.route, exchange.path = route, route.path
    if route.body is not None:
        exchange.body = route.body


def _partition_headers(headers: Headers) -> bytes:
    found = [b"%d:%b%d:%b" % (len(k), k, len(v), v) for k, v in headers if k in _PARTITION_HEADERS]
    return b"".join(sorted(found))
