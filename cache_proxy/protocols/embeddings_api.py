"""The embeddings endpoint: a batch is cached item by item, and only the unknown ones are asked for.

Exact only: the bytes of an input are its name, nothing is trimmed or normalised. A vector is kept
as the very JSON text that upstream wrote.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from cache_proxy.canonical import canonical, dump
from cache_proxy.model import Usage
from cache_proxy.protocols import openai_request as fields
from cache_proxy.protocols.openai_answer import error, usage_of
from cache_proxy.protocols.openai_request import Unreadable

__all__ = [
    "MOST_INPUTS",
    "EmbeddingsRequest",
    "Split",
    "Unreadable",
    "apportion",
    "ask",
    "billed",
    "error",
    "join",
    "parse",
    "split",
]

_TAKEN = fields.DELIVERY | fields.IDENTITY | {"input", "model"}
_ITEM_MEMBERS = frozenset({"object", "index", "embedding"})
_VECTOR = re.compile(rb'"embedding"\s*:\s*(\[[^\[\]]*\]|"[^"\\]*")')

# What OpenAI itself takes.
MOST_INPUTS = 2_048

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class EmbeddingsRequest:
    """One body: its inputs one by one, and what must be equal for any of them to be reused."""

    model: str
    items: tuple[bytes, ...]  # canonical JSON of each input, a string or an array of tokens
    rest: bytes  # canonical JSON of the other fields
    end_user: str | None
    single: bool  # the input came bare, not as a list of inputs


@dataclass(frozen=True, slots=True)
class Split:
    """One answer taken apart."""

    pieces: tuple[bytes, ...]  # each input's vector as upstream wrote it, in the order asked
    model: str  # as upstream names it
    usage: Usage | None


def parse(document: Json, *, path_model: str = "") -> EmbeddingsRequest:
    """Read a body that `canonical.load` accepted. Raises `Unreadable`, and nothing else.

    More than `MOST_INPUTS` inputs count as unreadable.
    """
    model = fields.model_name(document, path_model)
    inputs, single = _inputs(document)
    return EmbeddingsRequest(
        model=model,
        items=tuple(canonical(item) for item in inputs),
        rest=canonical({"fields": fields.kept(document, _TAKEN) | {"model": model}}),
        end_user=fields.end_user(document),
        single=single,
    )


def _inputs(document: Json) -> tuple[list[Any], bool]:
    given = document.get("input")
    if type(given) is str:
        return [given], True
    if type(given) is not list or not given:
        raise Unreadable("input")
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given], True
    if len(given) > MOST_INPUTS:
        raise Unreadable("input")
    if kinds == {str}:
        return given, False
    if kinds == {list} and all(item and all(type(t) is int for t in item) for item in given):
        return given, False
    raise Unreadable("input")


def ask(document: Json, body: bytes, missing: Sequence[int]) -> bytes:
    """The body that asks upstream for the inputs numbered in `missing` only, in that order."""
    inputs, _ = _inputs(document)
    if list(missing) == list(range(len(inputs))):
        return body
    return dump({**document, "input": [inputs[n] for n in missing]})


def split(body: bytes, n: int) -> Split | None:
    """Take an answer for `n` inputs apart; None when it is anything but exactly that."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    data = document.get("data") if type(document) is dict else None
    found = _VECTOR.findall(body)
    if type(data) is not list or len(data) != n or len(found) != n or document.get("error"):
        return None
    pieces: dict[int, bytes] = {}
    for position, (item, piece) in enumerate(zip(data, found, strict=True)):
        if not _is_vector(item) or orjson.loads(piece) != item["embedding"]:
            return None
        pieces[item.get("index", position)] = piece
    if pieces.keys() != set(range(n)):
        return None
    usage, model = usage_of(document), document.get("model")
    return Split(tuple(pieces[i] for i in range(n)), model if type(model) is str else "", usage)


def billed(body: bytes) -> Usage | None:
    """The tokens that an answer was billed, whatever else it holds."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return usage_of(document) if type(document) is dict else None


def _is_vector(item: Any) -> bool:
    # An item with members of its own (a sparse vector, say) would not survive being taken apart.
    if (
        type(item) is not dict
        or item.keys() - _ITEM_MEMBERS
        or type(item.get("index", 0)) is not int
    ):
        return False
    vector = item.get("embedding")
    if type(vector) is list:
        return bool(vector) and all(type(x) is float or type(x) is int for x in vector)
    return type(vector) is str and bool(vector)


def join(model: str, pieces: Sequence[bytes], usage: Usage | None) -> bytes:
    """An answer made of `pieces`, in the order of the request. `model` as upstream named it."""
    items = b",".join(
        [b'{"object":"embedding","index":%d,"embedding":%b}' % pair for pair in enumerate(pieces)]
    )
    tokens = b""
    if usage is not None:
        total = usage.input
        tokens = b',"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (total, total)
    return b'{"object":"list","data":[%b],"model":%b%b}' % (items, dump(model), tokens)


def apportion(total: int, lengths: Sequence[int]) -> list[int]:
    """Share a batch's tokens out by the length of each input; the shares add up to the total."""
    if not lengths:
        return []
    lengths = [max(1, length) for length in lengths]
    whole = sum(lengths)
    shares = [total * length // whole for length in lengths]
    # The remainders of the divisions, largest first, take what rounding down left over.
    order = sorted(range(len(lengths)), key=lambda n: -(total * lengths[n] % whole))
    for n in order[: total - sum(shares)]:
        shares[n] += 1
    return shares
