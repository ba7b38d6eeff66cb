"""Who may use the proxy at all: tokens of its own, where upstream does not see the client's key.

Pure. Knows the tokens' SHA-256 only.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from .tenancy import presented

__all__ = ["ClientTokens"]


class ClientTokens:
    """`digests`: SHA-256 of each token in hex; none at all lets everybody in."""

    def __init__(self, digests: frozenset[str]) -> None:
        self._digests = sorted(digests)

    def admit(self, headers: Sequence[tuple[bytes, bytes]], query: bytes) -> bool:
        """Whether some credential of the request is one of the tokens; equally slow for all."""
        if not self._digests:
            return True
        found = False
        for key in presented(headers, query):
            digest = hashlib.sha256(key).hexdigest()
            for known in self._digests:
                found = hmac.compare_digest(known, digest) or found
        return found
