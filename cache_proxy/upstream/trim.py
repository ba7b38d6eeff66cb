"""Makes a conversation fit its model's context window: the oldest whole turns are left out.

System text stays, the newest turn stays, and nothing is cut in the middle. A turn begins where the
user takes the word, so a tool's call and its result stand or fall together. Dropping single
messages was rejected, since it leaves results without calls, and summing up too: it puts words into
somebody's mouth. What is left out is told in a header; what cannot fit is refused, not mangled.

Plain functions of their arguments; the lengths come from `tokens`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.resources import files
from typing import Any, TypeGuard

from .. import tokens
from ..canonical import dump
from ..errors import BadRequest

__all__ = ["TooLong", "Trimmed", "Trimmer", "shipped_windows", "trim"]

Json = dict[str, Any]

_SYSTEM = ("system", "developer")
_WEIGHED = 100_000  # tokens of what is left out
# What a provider reads besides the messages.
_READ_TOO = ("tools", "functions", "response_format")


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What is left, in its order, and how many messages and about how many tokens were left out."""

    messages: list[Json]
    dropped: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class TooLong:
    """Does not fit: about the tokens of all messages, and those of what must stay."""

    tokens: int
    least: int


def trim(
    messages: list[Json],
    room: int,
    weigh: Callable[[Json], int],
    guess: Callable[[Json], int],
) -> Trimmed | TooLong:
    """Leave out the oldest turns until the rest weighs no more than `room` tokens.

    Weighed from the newest back and only until the room is full; what is left out may be of any
    length, and is guessed at from `_WEIGHED` tokens on.
    """
    turns = _turns(messages)
    spoken = {n for turn in turns for n in turn}
    # System text and the newest turn, which stay whatever they weigh.
    stay = [message for n, message in enumerate(messages) if n not in spoken]
    stay += [messages[n] for n in (turns[-1] if turns else ())]
    held = sum(map(weigh, stay))
    first = max(0, len(turns) - 1)  # of the turns that stay
    while first:
        weight = _weight((messages[n] for n in turns[first - 1]), weigh, room - held)
        if held + weight > room:
            break
        first, held = first - 1, held + weight
    gone = [n for turn in turns[:first] for n in turn]
    freed = 0
    for n in gone:
        freed += (weigh if freed < _WEIGHED else guess)(messages[n])
    if held > room:
        return TooLong(held + freed, held)
    if not gone:
        return Trimmed(messages)
    away = set(gone)
    left = [message for n, message in enumerate(messages) if n not in away]
    return Trimmed(left, len(gone), freed)


def _weight(turn: Iterable[Json], weigh: Callable[[Json], int], room: int) -> int:
    """What these weigh, or something above `room` where that is less."""
    weight = 0
    for message in turn:
        weight += weigh(message)
        if weight > room:
            break
    return weight


def _turns(messages: Sequence[Json]) -> list[list[int]]:
    """The places of each turn's messages, oldest turn first; system text belongs to none."""
    turns: list[list[int]] = []
    tied: list[int] = []  # for each turn, the last one that must not be parted from it
    called: dict[Any, int] = {}
    before = None
    for n, message in enumerate(messages):
        role = message.get("role")
        if role in _SYSTEM:
            continue
        if not turns or (role == "user" and before != "user"):
            turns.append([])
            tied.append(len(tied))
        before = role
        here = len(turns) - 1
        turns[here].append(n)
        if "tool_calls" in message or "function_call" in message:
            called |= dict.fromkeys(_calls(message), here)
        answered = message.get("tool_call_id") if role == "tool" else message.get("name")
        if role in ("tool", "function") and (at := called.get(str(answered))) is not None:
            tied[at] = here  # the user spoke between a call and its result
    return _joined(turns, tied)


def _calls(message: Json) -> list[str]:
    """What its tool calls will be answered under."""
    calls = message.get("tool_calls")
    found = [call.get("id") for call in calls if type(call) is dict] if type(calls) is list else []
    function = message.get("function_call")
    if type(function) is dict:
        found.append(function.get("name"))
    return [str(name) for name in found]


def _joined(turns: list[list[int]], tied: list[int]) -> list[list[int]]:
    joined: list[list[int]] = []
    end = -1
    for n, turn in enumerate(turns):
        if n <= end:
            joined[-1] += turn
        else:
            joined.append(list(turn))
        end = max(end, tied[n])
    return joined


@dataclass(frozen=True, slots=True)
class Trimmer:
    """Knows how much each model can read.

    `windows` are (glob over `model` or `provider/model`, tokens), the first that matches counts;
    `reserve` tokens, and no more than a quarter of the window, are kept for an answer whose length
    the request does not limit.
    """

    windows: Sequence[tuple[str, int]]
    reserve: int

    def window(self, provider: str, model: str) -> int | None:
        """Tokens of question and answer together; None when nobody said."""
        named = model.lower()
        names = {named, f"{provider.lower()}/{named}", named.rpartition("/")[2]}
        for glob, size in self.windows:
            if any(fnmatchcase(name, glob.lower()) for name in names):
                return size
        return None

    def fit(self, document: Json, provider: str, model: str) -> tuple[Json, tuple[int, int]]:
        """A chat request that fits, the same document or a shorter one, and what was left out.

        That is counted in messages and tokens. A model of unknown window and messages of an unknown
        shape are left alone. Raises BadRequest, code `context_length_exceeded`.
        """
        messages = document.get("messages")
        window = self.window(provider, model)
        if window is None or not _readable(messages):
            return document, (0, 0)
        answer = _answer_tokens(document) or min(self.reserve, window // 4)
        if all(map(_is_text, messages)) and len(dump(document)) <= window - answer:
            return document, (0, 0)  # no token is shorter than a byte
        fixed = tokens.REPLY_TOKENS + sum(
            tokens.count(dump(document[name]).decode(), model)
            for name in _READ_TOO
            if document.get(name)
        )
        room = window - answer - fixed
        weigh, guess = (partial(tokens.of_message, model=name) for name in (model, None))
        match trim(messages, room, weigh, guess):
            case Trimmed(left, dropped, freed):
                shorter = document if left is messages else {**document, "messages": left}
                return shorter, (dropped, freed)
            case TooLong(has, least):
                raise BadRequest(
                    f"The request has about {has + fixed} tokens, {least + fixed} of them in what "
                    f"is never left out: system text, tools and the newest turn. At most "
                    f"{max(0, window - answer)} fit: the model reads {window}, of which {answer} "
                    "are kept for the answer.",
                    code="context_length_exceeded",
                )


def _readable(messages: Any) -> TypeGuard[list[Json]]:
    return type(messages) is list and all(type(message) is dict for message in messages)


def _is_text(message: Json) -> bool:
    content = message.get("content")
    return type(content) is not list or all(
        type(part) is dict and part.get("type") == "text" for part in content
    )


def _answer_tokens(document: Json) -> int:
    """The longest answer asked for, 0 when none is named."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = document.get(name)
        if type(value) is int and value > 0:
            return value
    return 0


def shipped_windows() -> list[tuple[str, int]]:
    """The packaged table (`windows.toml`), in its order."""
    text = files(__package__).joinpath("windows.toml").read_text("utf-8")
    tables: list[Mapping[str, Any]] = tomllib.loads(text)["window"]
    return [(glob, table["tokens"]) for table in tables for glob in table["models"]]
