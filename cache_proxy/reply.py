"""What goes back to the client: status, headers, body. The cache's headers are told by the outcome.

Pure, but for the body of a miss, which is read from upstream as the client takes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from .model import Outcome
from .upstream.routes import Headers

__all__ = ["STALE", "Reply", "failure", "hit_headers", "passed_headers"]

_JSON = (b"content-type", b"application/json")
_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
# Nothing downstream may keep what was matched by meaning here.
_PRIVATE = (b"cache-control", b"private, no-store")
_NO_RETRY = (b"x-should-retry", b"false")
# Told of this answer by us alone.
_OURS = (b"x-cache", b"x-upstream-", b"x-trimmed")
_PLAIN = re.compile(r"[!-~]{1,200}")


# The reason of a hit that had expired, served because upstream failed.
STALE = "stale_if_error"


def _nothing() -> None:
    """A reply that is whole has nothing left to settle."""


@dataclass(slots=True)
class Reply:
    """`finish` is called once by whoever sends it, when sending has ended in any way."""

    status: int
    headers: Headers
    body: bytes | AsyncIterator[bytes]
    finish: Callable[[], None] = _nothing


def hit_headers(outcome: Outcome, *, stream: bool, length: int) -> Headers:
    """Fresh headers for a stored answer; none of upstream's are replayed."""
    detail = f"{outcome.tier} sim={outcome.similarity:.3f} thr={outcome.threshold:.3f}"
    if outcome.reason == STALE:
        detail = "stale"
    headers = [
        _STREAM if stream else _JSON,
        (b"content-length", b"%d" % length),
        _PRIVATE,
        (b"age", b"%d" % (outcome.age or 0)),
        (b"cache-status", f'cache-proxy; hit; ttl={outcome.ttl}; detail="{detail}"'.encode()),
        (b"x-cache", b"HIT"),
        (b"x-cache-tier", (outcome.tier or "").encode()),
        (b"x-cache-similarity", b"%.4f" % (outcome.similarity or 0.0)),
        (b"x-cache-threshold", b"%.4f" % (outcome.threshold or 0.0)),
        (b"x-cache-entry", outcome.entry.encode()),
    ]
    if outcome.reason:
        headers.append((b"x-cache-reason", outcome.reason.encode()))
    if outcome.saved_cost is not None:
        headers.append((b"x-cache-saved-usd", b"%.9f" % (outcome.saved_cost / 1e9)))
    return headers + _trimmed(outcome)


def passed_headers(outcome: Outcome, upstream: Headers, *, spent: bool = False) -> Headers:
    """Upstream's own headers, and why this was not a hit.

    `spent`: upstream was asked again in vain, which SDKs are told not to repeat.
    """
    dropped = (*_OURS, b"x-should-retry") if spent else _OURS
    word, forwarded = _words(outcome)
    status = f"cache-proxy; fwd={forwarded}; fwd-status={outcome.status}"
    if outcome.collapsed:
        status += "; collapsed"
    headers = [
        *((name, value) for name, value in upstream if not name.startswith(dropped)),
        (b"cache-status", f'{status}; detail="{outcome.reason}"'.encode()),
        (b"x-cache", word),
        (b"x-cache-reason", outcome.reason.encode()),
    ]
    if outcome.similarity is not None:
        headers.append((b"x-cache-similarity", b"%.4f" % outcome.similarity))
    if outcome.threshold is not None:
        headers.append((b"x-cache-threshold", b"%.4f" % outcome.threshold))
    if outcome.vetoes:
        headers.append((b"x-cache-veto", ", ".join(outcome.vetoes).encode()))
    if outcome.collapsed:
        headers.append((b"x-cache-collapsed", b"1"))
    if outcome.attempts > 1:
        headers.append((b"x-upstream-attempts", b"%d" % outcome.attempts))
    if outcome.provider:
        headers.append((b"x-upstream-provider", outcome.provider.encode()))
    if outcome.provider or outcome.answered_by:
        model = outcome.answered_by or outcome.model
        if _PLAIN.fullmatch(model):  # a client may write anything there
            headers.append((b"x-upstream-model", model.encode()))
    if spent:
        headers.append(_NO_RETRY)
    return headers + _trimmed(outcome)


def _trimmed(outcome: Outcome) -> Headers:
    """What was left out of the question, if anything was: nobody is answered in part unawares."""
    if outcome.trimmed == (0, 0):
        return []
    return [(b"x-trimmed", b"%d messages, %d tokens" % outcome.trimmed)]


def _words(outcome: Outcome) -> tuple[bytes, str]:
    """`X-Cache` and RFC 9211's reason for going forward."""
    if outcome.kind == "bypass":
        return b"BYPASS", "bypass"
    if outcome.shadow:
        return b"SHADOW", "request"
    if outcome.refresh:
        return b"REFRESH", "request"
    return b"MISS", "miss"


def failure(
    outcome: Outcome, body: bytes, *, retry: bool, retry_after: float | None = None
) -> Reply:
    """An error of our own, in the protocol's shape; `retry` False tells SDKs not to try again.

    `retry_after`: seconds until trying again makes sense.
    """
    told = passed_headers(outcome, [_JSON, (b"content-length", b"%d" % len(body))])
    # RFC 9211 2: `Cache-Status` speaks of upstream's answers and stored ones, not of our own.
    headers = [pair for pair in told if pair[0] != b"cache-status"]
    if retry_after is not None:
        headers.append((b"retry-after", b"%d" % math.ceil(retry_after)))
    return Reply(outcome.status, headers if retry else [*headers, _NO_RETRY], body)
