"""An error of our own, in the shape that the request's protocol gives its errors.

Plain functions of their arguments.
"""

from __future__ import annotations

from ..canonical import dump
from . import openai_answer

__all__ = ["fault"]

_ANTHROPIC = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}
_GOOGLE = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


def fault(protocol: str, message: str, status: int, code: str) -> bytes:
    """The body for a status of 400 or more; `code` shows where the protocol has a place for it."""
    if protocol == "anthropic":
        otherwise = "api_error" if status >= 500 else "invalid_request_error"
        error = {"type": _ANTHROPIC.get(status, otherwise), "message": message}
        return dump({"type": "error", "error": error})
    if protocol == "gemini":
        otherwise = "INTERNAL" if status >= 500 else "INVALID_ARGUMENT"
        word = _GOOGLE.get(status, otherwise)
        return dump({"error": {"code": status, "message": message, "status": word}})
    return openai_answer.error(message, status, code)
