"""Who is asking: a tenant and a token, as keyed MACs of the credential. Never the credential.

Pure. What cannot be told apart safely has no identity, and without one nothing is cached.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import parse_qsl

import orjson

from .canonical import mac

__all__ = ["KEY_PARAMETERS", "Caller", "Tenancy"]

KEY_PARAMETERS = frozenset({"key", "api_key", "api-key"})

_CREDENTIAL_HEADERS = (b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key")


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
        token = mac(self.secret, "token", credentials)
        if self.mode == "shared":
            return Caller(mac(self.secret, "tenant", b"shared"), token)
        owner = self._owner(credentials)
        if self.mode.startswith("header:"):
            wanted = self.mode.removeprefix("header:").lower().encode()
            users = [value for name, value in headers if name == wanted]
            if len(users) != 1 or not users[0].strip():
                return None
            owner += b"\x00user\x00" + users[0].strip()
        return Caller(mac(self.secret, "tenant", owner), token)

    def _owner(self, credentials: bytes) -> bytes:
        if not (self.names or self.jwt) or credentials.count(b"\x1e") > 1:
            return credentials
        key = credentials.partition(b"\x1f")[2].removesuffix(b"\x1e")
        key = key[7:].strip() if key[:7].lower() == b"bearer " else key
        if self.names:
            digest = hashlib.sha256(key).hexdigest()
            for known, name in self.names.items():
                if hmac.compare_digest(known, digest):
                    return b"name\x00" + name.encode()
        return (_jwt_owner(key) if self.jwt else None) or credentials


def _credentials(headers: Sequence[tuple[bytes, bytes]], query: bytes) -> bytes | None:
    """Raw bytes of each credential under its header's name; None when one name comes twice."""
    found: dict[bytes, bytes] = {}
    for name, value in headers:
        if name in _CREDENTIAL_HEADERS:
            if name in found:
                return None
            found[name] = value
    if b"=" in query:
        for parameter, text in parse_qsl(query.decode("latin-1"), keep_blank_values=True):
            if parameter.lower() in KEY_PARAMETERS:
                if b"?" in found:
                    return None
                found[b"?"] = text.encode("latin-1", "replace")
    return b"".join(name + b"\x1f" + value + b"\x1e" for name, value in sorted(found.items()))


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
    if not isinstance(claims, dict) or not claims.get("iss") or not claims.get("sub"):
        return None
    tenant = claims.get("tid") or claims.get("org_id") or ""
    return b"jwt\x00" + orjson.dumps([claims["iss"], tenant, claims["sub"]])
