"""Reading a request: who asks, what must be equal, and under which name an answer would be kept.

Does no I/O and judges nothing. Remembers its latest readings, since what is asked again is mostly
asked in the same bytes; the memory holds keyed digests of requests, not credentials.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

from . import canonical
from .directives import directives
from .model import Bypass, Call, Directives
from .protocols import chat, completions
from .protocols.openai_request import Unreadable
from .tenancy import Caller, Tenancy
from .upstream.routes import Headers, redacted_query, target

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


class Reader:
    """Built once; `base_url` is the upstream that the requests go to."""

    def __init__(
        self,
        *,
        tenancy: Tenancy,
        base_url: str,
        fingerprint: bytes,
        ignore_end_user: bool,
        masks: tuple[re.Pattern[str], ...],
        question_marker: str,
    ) -> None:
        self._tenancy = tenancy
        self._base_url = base_url
        self._fingerprint = fingerprint
        self._ignore_end_user = ignore_end_user
        self._masks = masks
        self._question_marker = question_marker
        self._plain = _PLAIN_HEADERS - {tenancy.user_header}
        self._latest: dict[bytes, Call] = {}

    def read(self, exchange: Exchange) -> Call | Bypass:
        """A chat or completions request. Raises BadRequest; Bypass where no name can be given."""
        if len(exchange.body) > _REMEMBERED_BYTES:
            return self._read(exchange)
        key = self._key(exchange)
        call = self._latest.get(key)
        if call is not None:
            return call
        read = self._read(exchange)
        if isinstance(read, Call):
            if len(self._latest) >= _REMEMBERED:
                del self._latest[next(iter(self._latest))]
            self._latest[key] = read
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
        if any(name == b"content-encoding" for name, _ in exchange.headers):
            return Bypass("encoded")
        document = canonical.load(exchange.body)
        caller = self.caller(exchange)
        if caller is None:
            return Bypass("identity")
        try:
            request = PROTOCOLS[exchange.operation].parse(
                document, masks=self._masks, question_marker=self._question_marker
            )
        except Unreadable:
            return Bypass("unreadable")
        partition = self.partition(exchange, caller, asked, request.end_user, request.rest)
        digest = canonical.digest(self._tenancy.secret, partition, request.text)
        return Call(request, asked, partition, digest, caller.tenant.hex(), caller.token)

    def caller(self, exchange: Exchange) -> Caller | None:
        """Who asks; None when that cannot be told for certain."""
        return self._tenancy.caller(exchange.headers, exchange.query)

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
        return canonical.partition(
            self._tenancy.secret,
            (
                ("encoder", self._fingerprint),
                ("tenant", caller.tenant),
                ("operation", exchange.operation.encode()),
                ("target", target(self._base_url, exchange.path, b"").encode("latin-1")),
                ("query", redacted_query(exchange.query)),
                ("headers", _partition_headers(exchange.headers)),
                ("namespace", asked.namespace.encode()),
                ("end_user", b"" if user is None else b"=" + user.encode()),
                ("rest", rest),
            ),
        )


def _partition_headers(headers: Headers) -> bytes:
    found = [b"%d:%b%d:%b" % (len(k), k, len(v), v) for k, v in headers if k in _PARTITION_HEADERS]
    return b"".join(sorted(found))
