"""Who is asking: a tenant and a token, as keyed MACs of the credential. Never the credential.

Pure. What cannot be told apart safely has no identity, and without one nothing is cached.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from urllib.parse import parse_qsl

import orjson

from .canonical import keyed

__all__ = ["KEY_PARAMETERS", "Caller", "Tenancy", "is_credential", "presented"]

KEY_PARAMETERS = frozenset({"key", "api_key", "api-key"})

# The providers' own four, and what gateways before them go by. A header too many only keeps
# answers apart that could have been shared.
_CREDENTIAL = re.compile(
    rb"auth(?!or(?!iz))|api-?key|subscription-key|(access|security)-token|secret"
)


@lru_cache(1_024)
def is_credential(name: bytes) -> bool:
    """Whether a header of this name, in lower case, says who is asking."""
    return name != b"proxy-authorization" and _CREDENTIAL.search(name) is not None


@dataclass(frozen=True, slots=True)
class Caller:
    """20-byte keyed MACs: `tenant` owns the answers, `token` is what upstream accepted."""

    tenant: bytes
    token: bytes


@dataclass(frozen=True, slots=True)
class Tenancy:
    """How callers are told apart."""

    secret: bytes
    mode: str = "per-key"
    names: Mapping[str, str] = field(default_factory=dict)  # sha256 hex of a key -> tenant name
    jwt: bool = False

    def caller(self, headers: Sequence[tuple[bytes, bytes]], query: bytes) -> Caller | None:
        """None when the credential is ambiguous or the named user is missing."""
        credentials = _credentials(headers, query)
        if credentials is None:
            return None
        token = keyed(self.secret, b"token", credentials)
        if self.mode == "shared":
            return Caller(keyed(self.secret, b"tenant", (b"shared",)), token)
        owner = self._owner(credentials)
        if wanted := self.user_header:
            users = [value for name, value in headers if name == wanted]
            if len(users) != 1 or not users[0].strip():
                return None
            owner = (b"user", users[0].strip(), *owner)
        return Caller(keyed(self.secret, b"tenant", owner), token)

    @property
    def user_header(self) -> bytes:
        """The header in which the app names its user, b"" when it names none."""
        return self.mode.partition("header:")[2].lower().encode()

    def _owner(self, credentials: tuple[bytes, ...]) -> tuple[bytes, ...]:
        if (self.names or self.jwt) and len(credentials) == 2:
            key = _bare(credentials[1])
            digest = hashlib.sha256(key).hexdigest()
            for known, name in self.names.items():
                if hmac.compare_digest(known, digest):
                    return (b"name", name.encode())
            if self.jwt and (claims := _jwt_owner(key)):
                return (b"jwt", claims)
        return (b"credential", *credentials)


def presented(headers: Sequence[tuple[bytes, bytes]], query: bytes) -> list[bytes]:
    """Every key that a request shows, less the word `Bearer`."""
    found = [value for name, value in headers if is_credential(name)]
    if b"=" in query:
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, encoding="latin-1")
        found += [key.encode("latin-1") for name, key in pairs if name.lower() in KEY_PARAMETERS]
    return [_bare(value) for value in found]


def _bare(value: bytes) -> bytes:
    return value[7:].strip() if value[:7].lower() == b"bearer " else value


def _credentials(headers: Sequence[tuple[bytes, bytes]], query: bytes) -> tuple[bytes, ...] | None:
    """Name and raw bytes of each credential, in one order; None when one name comes twice."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if is_credential(name):
            if name in found:
                return None
            found[name] = value
    if b"=" in query:
        # Latin-1 both ways keeps every byte: no two keys may decode to one.
        text = query.decode("latin-1")
        for parameter, key in parse_qsl(text, keep_blank_values=True, encoding="latin-1"):
            if parameter.lower() in KEY_PARAMETERS:
                if b"?" in found:
                    return None
                found[b"?"] = key.encode("latin-1")
    if not found and any(name == b"cookie" for name, _ in headers):
        return None  # a session may hide in it; beside a key it is the provider's own and no name
    return tuple(part for pair in sorted(found.items()) for part in pair)


def _jwt_owner(token: bytes) -> bytes | None:
    """Issuer, tenant and subject, unverified: a forged token owns nothing, because only a token
    that upstream itself has accepted is ever served a hit."""
    parts = token.split(b".")
    if len(parts) != 3:
        return None
    try:
        claims = orjson.loads(base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4)))
    except (binascii.Error, ValueError):
        return None
    if not isinstance(claims, dict):
        return None
    issuer, subject = claims.get("iss"), claims.get("sub")
    tenant = claims.get("tid") or claims.get("org_id") or ""
    if not all(isinstance(claim, str) for claim in (issuer, tenant, subject)):
        return None
    return orjson.dumps([issuer, tenant, subject]) if issuer and subject else None
