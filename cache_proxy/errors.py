"""Errors, named by what the caller may do about them."""

from __future__ import annotations

from typing import Literal

__all__ = ["BadRequest", "ConfigError", "MemoryUnavailable", "NoRoute", "UpstreamUnavailable"]


class MemoryUnavailable(Exception):
    """Store, index or encoder cannot serve now: forward the request as if there were no cache.

    `part` is a closed label ("store", "encoder"), fit for headers and counters; the cause
    hangs on `__cause__` and is never shown to a client.
    """

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


class UpstreamUnavailable(Exception):
    """No answer came from upstream; `status_hint` is what the client should be told (502, 504).

    `reason`: after all but "timeout" and "broken" the request surely was not sent. `retry_after`:
    seconds until asking again makes sense. `retry`: may the client try again by itself?
    """

    def __init__(
        self,
        message: str,
        status_hint: int,
        *,
        reason: Literal["connect", "timeout", "broken", "rate_limited", "shed", "open"] = "broken",
        retry_after: float | None = None,
        retry: bool = True,
    ) -> None:
        super().__init__(message)
        self.status_hint = status_hint
        self.reason = reason
        self.retry_after = retry_after
        self.retry = retry


class BadRequest(Exception):
    """The client's bytes cannot be a request of this protocol; the message never quotes them.

    `code` is the word by which programs tell it from others.
    """

    def __init__(self, message: str, status: int = 400, *, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class NoRoute(BadRequest):
    """No configured provider is for this request."""

    def __init__(self, message: str, status: int = 404, *, code: str = "model_not_found") -> None:
        super().__init__(message, status, code=code)


class ConfigError(Exception):
    """Stop at start; the one-sentence message names the setting."""
