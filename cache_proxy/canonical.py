"""A request body -> the bytes that name it: strict reading, canonical form, keyed digests.

Two bodies that could deserve different answers must never get the same name; two spellings of
one body should. In doubt the names differ, which costs a miss and nothing else.

Plain functions of their arguments: no I/O, no clock, no randomness, no logging.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import Any

import orjson

from cache_proxy.errors import BadRequest

__all__ = [
    "canonical",
    "churn",
    "clean",
    "digest",
    "dump",
    "keyed",
    "load",
    "mac",
    "mask",
    "partition",
]

DIGEST_BYTES = 20
_MIN_KEY_BYTES = 16

# Claude Code writes a fresh checksum into the system text of every call.
_KNOWN_NONCES = re.compile(r"(?<![\w-])cch=[0-9a-f]{3,64}(?![\w-])")


def load(body: bytes) -> dict[str, Any]:
    """Read a JSON object as exactly what it says, or raise `BadRequest` (status 400).

    Refused: no JSON, no object at the root, NaN and infinities, bad UTF-8, lone surrogates, more
    than some 250 levels, a key given twice, numbers beyond a double or of thousands of digits.
    Integers of any other size stay exact.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise BadRequest("The request body is not valid JSON.") from None
    if type(document) is not dict:
        raise BadRequest("The request body must be a JSON object.")
    try:
        if orjson.dumps(document) == body:
            return document  # it reads back byte for byte: nothing was given twice or rounded
    except orjson.JSONEncodeError:
        raise BadRequest("The request body is nested too deeply.") from None
    return _load_slowly(body)


def _load_slowly(body: bytes) -> dict[str, Any]:
    # orjson lets the last of two equal keys win and rounds integers beyond 64 bits. It has
    # already judged syntax, encoding and depth, so nothing but numbers and keys is left to refuse.
    try:
        document: dict[str, Any] = json.loads(
            body, object_pairs_hook=_unique, parse_float=_finite, parse_int=int
        )
    except ValueError:
        raise BadRequest("The request body holds a number that is too large.") from None
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise BadRequest("The request body gives a key twice.")
    return members


def _finite(literal: str) -> float:
    value = float(literal)
    if math.isinf(value):
        raise ValueError
    return value


def canonical(value: Any) -> bytes:
    """One spelling for each JSON value: keys sorted, 1.0 as 1, -0.0 as 0, text untouched.

    Nothing is dropped in here: whether a null means "absent" depends on where it stands (it does
    not inside a JSON schema), so the protocols drop them where they know.
    """
    return dump(_plain(value), orjson.OPT_SORT_KEYS)


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is dict:
        return {k: v if type(v) is str else _plain(v) for k, v in value.items()}
    if kind is list:
        return [v if type(v) is str else _plain(v) for v in value]
    if kind is float and value.is_integer():
        return int(value)
    return value


def dump(value: Any, option: int = 0) -> bytes:
    """Compact UTF-8 JSON of any value that `load` can yield, integers beyond 64 bits included.

    Raises ValueError for values nested deeper than `load` lets pass.
    """
    try:
        return orjson.dumps(value, option=option)
    except orjson.JSONEncodeError:
        return _dump_slowly(value, bool(option & orjson.OPT_SORT_KEYS))


def _dump_slowly(value: Any, sort_keys: bool) -> bytes:
    try:
        return json.dumps(
            value,
            ensure_ascii=False,
            allow_nan=False,
            separators=(",", ":"),
            sort_keys=sort_keys,
        ).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None


def clean(text: str) -> str:
    """Unicode NFC, outer white space trimmed: all that an exact match forgives."""
    if text.isascii():
        return text.strip()
    return unicodedata.normalize("NFC", text).strip()


def mask(text: str, patterns: Iterable[re.Pattern[str]] = ()) -> str:
    """`text` with known per-call nonces, and what `patterns` match, each written as "*".

    For the key only; what goes upstream is never touched. Dates are not nonces: an answer may
    depend on them.
    """
    if "cch=" in text:
        text = _KNOWN_NONCES.sub("cch=*", text)
    for pattern in patterns:
        text = pattern.sub("*", text)
    return text


def mac(key: bytes, label: str, data: bytes) -> bytes:
    """20 bytes that name `data` for the use `label`, and mean nothing without the key."""
    return keyed(key, b"mac", (label.encode(), data))


def partition(key: bytes, parts: Sequence[tuple[str, bytes]]) -> bytes:
    """20 bytes that are equal exactly when the labelled parts are, order included."""
    return keyed(
        key, b"partition", [field for label, part in parts for field in (label.encode(), part)]
    )


def digest(key: bytes, partition: bytes, text: str | None) -> bytes:
    """20 bytes: the name of the entry for this user text in this partition. None is not ""."""
    if text is None:
        return keyed(key, b"digest", (partition,))
    return keyed(key, b"digest", (partition, text.encode()))


def keyed(key: bytes, use: bytes, fields: Sequence[bytes]) -> bytes:
    """20 bytes that are equal exactly when `use` (at most 16 bytes) and the fields are."""
    if len(key) < _MIN_KEY_BYTES:
        raise ValueError("a MAC key needs at least 16 bytes")  # no secret, no cache
    framed = b"".join([b"%d:%b" % (len(field), field) for field in fields])
    return blake2b(framed, digest_size=DIGEST_BYTES, key=key, person=use).digest()


def churn(key: bytes, rest: bytes) -> dict[str, str]:
    """A short keyed hash for each request field, so that statistics can name one that never rests.

    `rest` is `Request.rest`. The messages count under two names: "system" and "history".
    """
    shape: dict[str, Any] = json.loads(rest)
    fields: dict[str, Any] = dict(shape.get("fields", {}))
    messages: list[dict[str, Any]] = shape.get("messages", [])
    fields["system"] = [m for m in messages if m["role"] in ("system", "developer")]
    fields["history"] = [m for m in messages if m["role"] not in ("system", "developer")]
    for name in shape.keys() - {"fields", "messages"}:
        fields.setdefault(name, shape[name])
    return {name: mac(key, name, canonical(value))[:6].hex() for name, value in fields.items()}
