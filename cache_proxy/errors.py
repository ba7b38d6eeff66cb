"""Errors, named by what the caller may do about them."""

from __future__ import annotations

__all__ = ["BadRequest", "ConfigError", "MemoryUnavailable", "UpstreamUnavailable"]


class MemoryUnavailable(Exception):
    """Store, index or encoder cannot serve now: forward the request as if there were no cache.

    `part` is a closed label ("store", "encoder"), fit for headers and counters; the cause
    hangs on `__cause__` and is never shown to a client.
    """

    def __init__(self, part: str) -> None:
        super().__init__(part)
        self.part = part


class UpstreamUnavailable(Exception):
    """No answer came from upstream; `status_hint` is what the client should be told (502, 504)."""

    def __init__(self, message: str, status_hint: int) -> None:
        super().__init__(message)
        self.status_hint = status_hint


class BadRequest(Exception):
    """The client's bytes cannot be a request of this protocol; the message never quotes them."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class ConfigError(Exception):
    """Stop at start; the one-sentence message names the setting."""
