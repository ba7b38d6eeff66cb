"""The bytes of an entry as the store keeps it.

Plain functions of their arguments: no I/O, no clock. It is header, vector, small facts,
body. Header and vector come first, under a checksum of their own, so that a rebuild reads that
range alone. Nothing here can run code from what it reads, and no entry is believed before its
keyed checksum held.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Protocol

import orjson

from cache_proxy.model import Entry, Usage

__all__ = [
    "HEAD_BYTES",
    "Corrupt",
    "Head",
    "head_length",
    "pack",
    "unpack",
    "unpack_head",
]

_MAGIC = b"SCP"
_SCHEMA = 2
# magic, schema, fingerprint, partition, digest, epoch, created, expires, then three lengths.
_FIELDS = struct.Struct(">3sB8s20s20sQQQIII")
_SUM = 16  # bytes; a forged or flipped entry passes once in 2^128
_HEAD_SUM = _FIELDS.size  # checksum over fields and vector
_WHOLE_SUM = _HEAD_SUM + _SUM  # checksum over everything but itself
HEAD_BYTES = _WHOLE_SUM + _SUM  # the vector starts here


class Corrupt(Exception):
    """These bytes are not an entry that we wrote: cut, flipped, forged or of another schema."""


@dataclass(frozen=True, slots=True)
class Head:
    """What a rebuild of the index needs of an entry, without its body."""

    digest: bytes
    partition: bytes
    fingerprint: bytes
    expires: int
    epoch: int
    vector: bytes  # fp16, little-endian; empty when only the exact tier may serve it


class _Hash(Protocol):
    def copy(self) -> _Hash: ...
    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...


@lru_cache(maxsize=8)
def _keyed(key: bytes) -> _Hash:
    # Copying a keyed state costs half of keying a new one.
    return blake2b(key=key, digest_size=_SUM)


def _checksum(key: bytes, *parts: bytes) -> bytes:
    state = _keyed(key).copy()
    for part in parts:
        state.update(part)
    return state.digest()


def pack(entry: Entry, vector: bytes, key: bytes) -> bytes:
    """Entry and vector (fp16 bytes, may be empty) as one value. `key` is 1 to 64 secret bytes.

    Raises Corrupt for an entry that could not be read back: wrong widths, text that is no UTF-8.
    """
    if (len(entry.fingerprint), len(entry.partition), len(entry.digest)) != (8, 20, 20):
        raise Corrupt("fingerprint, partition and digest are 8, 20 and 20 bytes wide")
    try:
        meta = orjson.dumps(_facts(entry))
        fields = _FIELDS.pack(
            _MAGIC,
            _SCHEMA,
            entry.fingerprint,
            entry.partition,
            entry.digest,
            entry.epoch,
            entry.created,
            entry.expires,
            len(vector),
            len(meta),
            len(entry.body),
        )
    except (orjson.JSONEncodeError, struct.error) as exc:
        raise Corrupt("a field cannot be encoded") from exc
    head = fields + _checksum(key, fields, vector)
    whole = _checksum(key, head, vector, meta, entry.body)
    return b"".join((head, whole, vector, meta, entry.body))


def _facts(entry: Entry) -> tuple[object, ...]:
    """What a rebuild has no use for, in the order in which `unpack` reads it."""
    usage = entry.usage
    return (
        entry.text,
        entry.model,
        entry.provider,
        entry.tenant,
        entry.namespace,
        entry.tags,
        None if usage is None else (usage.input, usage.output, usage.cached, usage.reasoning),
        entry.cost,
        entry.gist,
    )


def unpack(data: bytes, key: bytes) -> tuple[Entry, bytes]:
    """The entry and its vector, all checked. Raises Corrupt; never anything else."""
    fields = _fields(data)
    fingerprint, partition, digest, epoch, created, expires, vector_len, meta_len, body_len = fields
    meta_at = HEAD_BYTES + vector_len
    body_at = meta_at + meta_len
    if len(data) != body_at + body_len:
        raise Corrupt("cut or padded")
    # One pass over all bytes; the head's own checksum is covered by it.
    if _checksum(key, data[:_WHOLE_SUM], data[HEAD_BYTES:]) != data[_WHOLE_SUM:HEAD_BYTES]:
        raise Corrupt("checksum")
    # Behind a keyed checksum these are our own bytes: what `pack` wrote, `loads` reads.
    text, model, provider, tenant, namespace, tags, usage, cost, gist = orjson.loads(
        data[meta_at:body_at]
    )
    entry = Entry(
        digest,
        partition,
        fingerprint,
        epoch,
        created,
        expires,
        text,
        model,
        provider,
        tenant,
        namespace,
        tuple(tags),
        None if usage is None else Usage(*usage),
        cost,
        data[body_at:],
        gist,
    )
    return entry, data[HEAD_BYTES:meta_at]


def head_length(data: bytes) -> int:
    """How many bytes `unpack_head` needs of this value. Raises Corrupt."""
    vector_len: int = _fields(data)[6]
    return HEAD_BYTES + vector_len


def unpack_head(data: bytes, key: bytes) -> Head:
    """The head of a value of which at least `head_length` bytes are here. Raises Corrupt."""
    fingerprint, partition, digest, epoch, _, expires, vector_len, _, _ = _fields(data)
    vector = data[HEAD_BYTES : HEAD_BYTES + vector_len]
    if len(vector) != vector_len:
        raise Corrupt("cut")
    if _checksum(key, data[: _FIELDS.size], vector) != data[_HEAD_SUM:_WHOLE_SUM]:
        raise Corrupt("checksum")
    return Head(digest, partition, fingerprint, expires, epoch, vector)


def _fields(data: bytes) -> tuple[Any, ...]:
    """The fixed fields after magic and schema, unverified."""
    if len(data) < HEAD_BYTES:
        raise Corrupt("cut")
    magic, schema, *fields = _FIELDS.unpack_from(data)
    if magic != _MAGIC or schema != _SCHEMA:
        raise Corrupt("magic or schema")
    return tuple(fields)
