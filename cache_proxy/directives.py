"""What the caller asks of the cache by header. Callers may only tighten, never loosen.

Pure. `Cache-Control` follows RFC 9111 5.2.1; the rest are `X-Cache-*` headers of our own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import get_args

from .errors import BadRequest
from .model import Directives, Mode

__all__ = ["directives"]

_MODES: frozenset[str] = frozenset(get_args(Mode))
_PLAIN = Directives()
_WHOLE = re.compile(r"[0-9]{1,10}")
_MOST_TAGS = 32
_LONGEST_NAME = 200


def directives(headers: Sequence[tuple[bytes, bytes]]) -> Directives:
    """Read the request's headers, names in lower case. BadRequest names the bad one."""
    own = [
        (name, value.decode("latin-1").strip())
        for name, value in headers
        if name == b"cache-control" or name.startswith(b"x-cache-")
    ]
    if not own:
        return _PLAIN
    asked: dict[str, object] = {}
    for name, value in own:
        _READERS.get(name, _unknown)(value, asked)
    return Directives(**asked)  # type: ignore[arg-type]


def _cache_control(value: str, asked: dict[str, object]) -> None:
    for part in value.lower().split(","):
        name, _, argument = part.strip().partition("=")
        if name in ("no-cache", "no-store", "only-if-cached"):
            asked[name.replace("-", "_")] = True
        elif name == "max-age":
            # A nonsense age means no age is young enough: RFC 9111 has stale for unparsable.
            argument = argument.strip('"')
            asked["max_age"] = int(argument) if _WHOLE.fullmatch(argument) else 0


def _mode(value: str, asked: dict[str, object]) -> None:
    if value.lower() not in _MODES:
        raise BadRequest(f"X-Cache-Mode is one of {', '.join(sorted(_MODES))}.")
    asked["mode"] = value.lower()


def _threshold(value: str, asked: dict[str, object]) -> None:
    try:
        number = float(value)
    except ValueError:
        number = -1.0
    if not 0.0 <= number <= 1.0:
        raise BadRequest("X-Cache-Threshold is a number from 0 to 1.")
    asked["threshold"] = number


def _ttl(value: str, asked: dict[str, object]) -> None:
    if not _WHOLE.fullmatch(value) or int(value) == 0:
        raise BadRequest("X-Cache-TTL is a whole number of seconds above 0.")
    asked["ttl"] = int(value)


def _namespace(value: str, asked: dict[str, object]) -> None:
    if len(value) > _LONGEST_NAME:
        raise BadRequest(f"X-Cache-Namespace has at most {_LONGEST_NAME} characters.")
    asked["namespace"] = value


def _tags(value: str, asked: dict[str, object]) -> None:
    tags = tuple(dict.fromkeys(tag.strip() for tag in value.split(",") if tag.strip()))
    if len(tags) > _MOST_TAGS or any(len(tag) > _LONGEST_NAME for tag in tags):
        raise BadRequest(
            f"X-Cache-Tags lists at most {_MOST_TAGS} tags of {_LONGEST_NAME} characters."
        )
    asked["tags"] = tags


def _unknown(value: str, asked: dict[str, object]) -> None:
    """Headers of that prefix which are not ours stay without meaning."""


_READERS = {
    b"cache-control": _cache_control,
    b"x-cache-mode": _mode,
    b"x-cache-threshold": _threshold,
    b"x-cache-ttl": _ttl,
    b"x-cache-namespace": _namespace,
    b"x-cache-tags": _tags,
}
