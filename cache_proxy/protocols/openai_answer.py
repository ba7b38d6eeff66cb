"""What the OpenAI-shaped protocols share on the way out: answers put together, told, re-dated.

A stored answer is the non-streamed JSON with id and date at its very front, so that a hit puts in
fresh ones by joining bytes and parses nothing.
"""

from __future__ import annotations

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import orjson

from cache_proxy.canonical import dump
from cache_proxy.model import Answer, Usage

__all__ = [
    "DONE_EVENT",
    "Reassembler",
    "Said",
    "error",
    "event",
    "fold",
    "prepare",
    "render_json",
    "settle",
    "usage_chunk",
    "usage_of",
    "whole",
]

_DONE = b"[DONE]"
_ID_PREFIX = re.compile(r"[A-Za-z]{1,16}[-_]")
# They belong to the one call that upstream answered, not to the answer.
_STALE = frozenset({"id", "created", "x_groq", "request_id"})
# In a delta these come whole, in the first piece or in every one; all other text comes in parts.
_WHOLE_TEXTS = frozenset({"role", "id", "type", "name", "format"})


class Said(NamedTuple):
    """What one choice amounts to."""

    empty: bool
    refused: bool
    tool_calls: bool


class _Pieces(list[str]):
    """Text still arriving; joined once, since adding to a string each time is quadratic."""


def usage_of(document: Mapping[str, Any]) -> Usage | None:
    """The tokens that upstream billed; None when it named none that can be understood."""
    usage = document.get("usage")
    if type(usage) is not dict:
        return None
    spent = _tokens(usage, "prompt_tokens")
    made = _tokens(usage, "completion_tokens")
    if spent is None and made is None:
        return None
    cached = _tokens(usage.get("prompt_tokens_details"), "cached_tokens")
    if cached is None:
        cached = _tokens(usage, "prompt_cache_hit_tokens")  # DeepSeek's name for it
    reasoning = _tokens(usage.get("completion_tokens_details"), "reasoning_tokens")
    return Usage(input=spent or 0, output=made or 0, cached=cached or 0, reasoning=reasoning or 0)


def _tokens(usage: Any, name: str) -> int | None:
    value = usage.get(name) if type(usage) is dict else None
    return value if type(value) is int and value >= 0 else None


def failed(body: bytes) -> Answer:
    """An error object, or nothing that can be read as an answer."""
    return Answer(body, None, (), False, empty=True, refused=False, tool_calls=False, error=True)


def tell(document: Any, body: bytes, said: Callable[[dict[str, Any]], Said], done: bool) -> Answer:
    """The facts of a non-streamed answer; `done` says whether it arrived to its end."""
    if type(document) is not dict or document.get("error") is not None:
        return failed(body)
    choices = document.get("choices")
    if type(choices) is not list or any(type(choice) is not dict for choice in choices):
        return failed(body)
    finished = tuple(_word(choice.get("finish_reason")) for choice in choices)
    facts = [said(choice) for choice in choices]
    return Answer(
        body=body,
        usage=usage_of(document),
        finished=finished,
        terminal=done,
        empty=not facts or any(fact.empty for fact in facts),
        refused="content_filter" in finished or any(fact.refused for fact in facts),
        tool_calls=any(fact.tool_calls for fact in facts),
        error="error" in finished or any(choice.get("error") is not None for choice in choices),
    )


def _word(finish_reason: Any) -> str:
    return finish_reason if type(finish_reason) is str else ""


def whole(body: bytes, said: Callable[[dict[str, Any]], Said]) -> Answer:
    """A non-streamed answer's facts; what cannot be parsed counts as an error."""
    try:
        document = orjson.loads(body)
    except ValueError:
        return failed(body)
    return tell(document, body, said, done=True)


class Reassembler(ABC):
    """Puts a stream's events together into the answer as it would have come without a stream.

    The caller caps the bytes it feeds; memory is a small multiple of them. Never raises: what
    cannot be understood makes the answer an error, which nobody keeps.
    """

    object_name = ""

    def __init__(self) -> None:
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._done = False
        self._broken = False

    def feed(self, event_data: bytes) -> None:
        """Take one event's data."""
        if event_data == _DONE:
            self._done = True
            return
        try:
            self._take(orjson.loads(event_data))
        except (ValueError, TypeError, AttributeError, RecursionError):
            self._broken = True  # whatever shape that was, it is no chunk of this protocol

    def _take(self, chunk: dict[str, Any]) -> None:
        if chunk.get("error") is not None:
            raise ValueError
        for name, value in chunk.items():
            if value is not None and name not in ("choices", "object"):
                self._head[name] = value
        for piece in chunk.get("choices") or ():
            index = piece.get("index", 0)
            if type(index) is not int:
                raise ValueError
            self._fold(self._choices.setdefault(index, {"index": index}), piece)

    @abstractmethod
    def _fold(self, choice: dict[str, Any], piece: dict[str, Any]) -> None:
        """Add a chunk's piece of one choice to what has come of it."""

    @abstractmethod
    def _said(self, choice: dict[str, Any]) -> Said:
        """What a choice says, as far as it must be known before it is kept."""

    def _settled(self, choice: dict[str, Any]) -> dict[str, Any]:
        settled: dict[str, Any] = settle(choice)
        return settled

    def answer(self) -> Answer:
        """What has arrived so far; `terminal` once the end was said and every choice finished."""
        try:
            return self._answer()
        except (ValueError, RecursionError):  # nested beyond all reason
            return failed(b"")

    def _answer(self) -> Answer:
        choices = [self._settled(self._choices[index]) for index in sorted(self._choices)]
        usage = {name: self._head[name] for name in self._head if name == "usage"}
        head = {name: self._head[name] for name in self._head if name != "usage"}
        document = {**head, "object": self.object_name, "choices": choices, **usage}
        body = dump(document)
        if self._broken:
            return failed(body)
        finished = bool(choices) and all(_word(c.get("finish_reason")) for c in choices)
        return tell(document, body, self._said, done=self._done and finished)


def fold(target: dict[str, Any], piece: Mapping[str, Any]) -> None:
    """Add a delta to what came before: text joins, lists grow, objects merge, else last wins."""
    for name, value in piece.items():
        if value is None:
            continue
        match value:
            case str() if name in _WHOLE_TEXTS:
                target[name] = value or target.get(name, value)
            case str():
                _list(target, name, _Pieces).append(value)
            case dict():
                if type(target.get(name)) is not dict:
                    target[name] = {}
                fold(target[name], value)
            case list():
                _extend(_list(target, name, list), value)
            case _:
                target[name] = value


def _list(target: dict[str, Any], name: str, kind: type[list[Any]]) -> list[Any]:
    if type(target.get(name)) is not kind:
        target[name] = kind()
    grown: list[Any] = target[name]
    return grown


def _extend(grown: list[Any], items: list[Any]) -> None:
    for item in items:
        if type(item) is dict and type(item.get("index")) is int:
            fold(_at(grown, item["index"]), item)
        else:
            grown.append(item)


def _at(grown: list[Any], index: int) -> dict[str, Any]:
    # The newest is nearly always the one meant, so the search runs from the back.
    for item in reversed(grown):
        if type(item) is dict and item.get("index") == index:
            return item
    grown.append({"index": index})
    added: dict[str, Any] = grown[-1]
    return added


def settle(value: Any) -> Any:
    """The same value with all arrived text joined."""
    if type(value) is _Pieces:
        return "".join(value)
    if type(value) is dict:
        return {name: settle(member) for name, member in value.items()}
    if type(value) is list:
        return [settle(member) for member in value]
    return value


def usage_chunk(event_data: bytes) -> bool:
    """Whether this is the extra chunk that carries usage and no choice."""
    if b'"usage"' not in event_data or b'"delta"' in event_data:
        return False
    try:
        chunk = orjson.loads(event_data)
    except orjson.JSONDecodeError:
        return False
    return type(chunk) is dict and chunk.get("choices") == [] and type(chunk.get("usage")) is dict


def prepare(body: bytes, default_prefix: str) -> bytes:
    """An answer's body as it is stored: the prefix of its id and a zero date at the very front.

    `body` is that of an `Answer` without `error`. Ids of the one call it came from are left out.
    Raises ValueError for an answer that could not be written again as it was: nested too deeply,
    or holding integers beyond 64 bits.
    """
    document = orjson.loads(body)
    prefix = _ID_PREFIX.match(str(document.get("id")))
    front = {"id": prefix[0] if prefix else default_prefix, "created": 0}
    stored = dump(front | {k: v for k, v in document.items() if k not in _STALE})
    if b"e+" in stored:  # how orjson writes the floats that it makes of such integers
        json.loads(body, parse_int=_in_64_bits)
    return stored


def _in_64_bits(literal: str) -> int:
    value = int(literal)
    if not -(2**63) <= value < 2**64:
        raise ValueError("an integer beyond 64 bits")
    return value


def render_json(stored: bytes, new_id: str, now: int) -> bytes:
    """The stored answer as JSON. `new_id` is what follows the prefix; `now` is in Unix seconds."""
    front = stored.index(b'","created":0', 7)
    return b'%b%b","created":%d%b' % (stored[:front], new_id.encode(), now, stored[front + 13 :])


def event(chunk: Mapping[str, Any]) -> bytes:
    return b"data: " + dump(chunk) + b"\n\n"


DONE_EVENT = b"data: " + _DONE + b"\n\n"


def error(message: str, status: int, code: str) -> bytes:
    """An error body in OpenAI's shape; the status decides its type."""
    kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return dump({"error": {"message": message, "type": kind, "param": None, "code": code}})
