"""Chat Completions: one body in, one answer out, as JSON or as a stream.

Only the last user text is fuzzy; every turn before and after it, every tool and every field we do
not know is compared exactly. Bytes in, bytes out: knows no socket and no clock.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from cache_proxy.canonical import canonical, clean, mask
from cache_proxy.model import Answer, Request
from cache_proxy.protocols import openai_answer as answers
from cache_proxy.protocols import openai_request as fields
from cache_proxy.protocols.openai_answer import Said, error, usage_chunk
from cache_proxy.protocols.openai_request import Unreadable, ask_usage

__all__ = [
    "Reassembler",
    "Unreadable",
    "ask_usage",
    "error",
    "parse",
    "prepare",
    "render_json",
    "render_stream",
    "text_of",
    "usage_chunk",
    "whole",
]

_TAKEN = fields.DELIVERY | fields.IDENTITY | {"messages", "model"}
_TURN_DROPPED = frozenset({"cache_control"})  # a hint to the provider's own prompt cache
_SYSTEM = ("system", "developer")
_REASONING = ("reasoning_content", "reasoning", "reasoning_details")

# What OpenAI itself takes. To read more holds everybody else up for longer than a hit can save.
MOST_MESSAGES = 2_048
MOST_PARTS = 8_192  # of all messages together

Json = dict[str, Any]


def parse(
    document: Json,
    *,
    masks: Sequence[re.Pattern[str]] = (),
    question_marker: str = "",
    path_model: str = "",
) -> Request:
    """Read a body that `canonical.load` accepted. Raises `Unreadable`, and nothing else.

    More than `MOST_MESSAGES` messages or `MOST_PARTS` parts count as unreadable.

    `masks` match nonces in system text; they are blanked in the key only. With `question_marker`
    what stands before its last occurrence in the last user text is compared exactly.
    `path_model` is the model named by the URL, for a body that names none.
    """
    turns = [_turn(message, masks) for message in _messages(document)]
    if not turns:
        raise Unreadable("messages")
    model = fields.model_name(document, path_model)
    tools = fields.objects(document.get("tools"), "tools")
    functions = fields.objects(document.get("functions"), "tools")
    members = fields.kept(document, _TAKEN) | {"model": model}
    if tools:
        members["tools"] = [_tool(tool) for tool in tools]
    at, part = _last_text(turns)
    others = any(
        p["type"] != "text" for turn in turns[max(at, 0) :] for p in turn.get("content", ())
    )
    shape: Json = {"fields": members, "messages": turns}
    text = None
    if part is not None:
        before, question = fields.question(part.pop("text"), question_marker)
        text = clean(question)
        if before:
            shape["before"] = before
    return Request(
        operation="chat",
        model=model,
        stream=fields.flag(document, "stream"),
        include_usage=fields.includes_usage(document),
        text=text,
        rest=canonical(shape),
        turns=_count_turns(turns, at),
        declares_tools=bool(
            (tools and document.get("tool_choice") != "none")
            or (functions and document.get("function_call") != "none")
        ),
        tool_turns=any(_is_tool_turn(turn) for turn in turns),
        other_parts=others,
        web_search=fields.searches_web(document, model, tools),
        choices=fields.count(document, "n"),
        temperature=fields.number(document, "temperature"),
        end_user=fields.end_user(document),
    )


def _messages(document: Json) -> list[Json]:
    messages = fields.objects(document.get("messages"), "messages")
    if len(messages) > MOST_MESSAGES:
        raise Unreadable("messages")
    contents = (message.get("content") for message in messages)
    if sum(len(content) for content in contents if type(content) is list) > MOST_PARTS:
        raise Unreadable("messages")
    return messages


def _turn(message: Json, masks: Sequence[re.Pattern[str]]) -> Json:
    """A message in its one spelling: text as parts, a string being one of them."""
    role = message.get("role")
    if type(role) is not str:
        raise Unreadable("messages")
    turn = fields.kept(message, _TURN_DROPPED)
    content = turn.get("content")
    if type(content) is str:
        turn["content"] = [{"type": "text", "text": content}]
    elif content is not None:
        turn["content"] = [_part(part) for part in fields.objects(content, "messages")]
    if role in _SYSTEM:
        for part in turn.get("content", ()):
            if part["type"] == "text":
                part["text"] = mask(part["text"], masks)
    return turn


def _part(part: Json) -> Json:
    kind = part.get("type")
    if type(kind) is not str or (kind == "text" and type(part.get("text")) is not str):
        raise Unreadable("messages")
    return fields.kept(part, _TURN_DROPPED)


def _tool(tool: Json) -> Json:
    # Only where providers put it: deep in a schema the same word may be a parameter's name.
    tool = {name: value for name, value in tool.items() if name != "cache_control"}
    function = tool.get("function")
    if type(function) is dict and "cache_control" in function:
        tool["function"] = {k: v for k, v in function.items() if k != "cache_control"}
    return tool


def _last_text(turns: list[Json]) -> tuple[int, Json | None]:
    """The last user turn that carries text, and its last part that does; (-1, None) if none."""
    for at in range(len(turns) - 1, -1, -1):
        if turns[at]["role"] == "user":
            for part in reversed(turns[at].get("content", ())):
                if part["type"] == "text" and not fields.blank(part["text"]):
                    return at, part
    return -1, None


def _count_turns(turns: list[Json], at: int) -> int:
    """User turns; at least 2 when anybody but the system spoke before or after the last one."""
    users: int = sum(turn["role"] == "user" for turn in turns)
    if at < 0:
        return users
    alone = all(turn["role"] in _SYSTEM for n, turn in enumerate(turns) if n != at)
    return users if alone else max(users, 2)


def _is_tool_turn(turn: Json) -> bool:
    return turn["role"] in ("tool", "function") or "tool_calls" in turn or "function_call" in turn


def _says(content: Any) -> bool:
    if type(content) is str:
        return not fields.blank(content)
    return bool(content)


def _said(choice: Json) -> Said:
    message = choice.get("message")
    if type(message) is not dict:
        return Said(empty=True, refused=False, tool_calls=False)
    content = message.get("content")
    parts = content if type(content) is list else ()
    refused = bool(message.get("refusal")) or any(
        type(part) is dict and part.get("type") == "refusal" for part in parts
    )
    calls = bool(message.get("tool_calls") or message.get("function_call"))
    silent = not (_says(content) or refused or calls or message.get("audio"))
    return Said(empty=silent, refused=refused, tool_calls=calls)


def whole(body: bytes) -> Answer:
    """The facts of a non-streamed answer; an error object or what cannot be parsed is `error`."""
    return answers.whole(body, _said)


class Reassembler(answers.Reassembler):
    """Feed it each event's data; `answer()` is the completion as it would have come whole."""

    object_name = "chat.completion"

    def _fold(self, choice: Json, piece: Json) -> None:
        message = choice.setdefault("message", {"role": "assistant", "content": None})
        for name, value in piece.items():
            if name == "delta":
                answers.fold(message, value or {})
            elif name == "logprobs" and value is not None:
                answers.fold(choice, {name: value})
            elif value is not None and name != "index":
                choice[name] = value

    def _settled(self, choice: Json) -> Json:
        settled = super()._settled(choice)
        calls = settled["message"].get("tool_calls")
        for call in calls if type(calls) is list else ():
            if type(call) is dict:
                call.pop("index", None)  # only a stream numbers them
        return {"finish_reason": None, **settled}

    def _said(self, choice: Json) -> Said:
        return _said(choice)


def text_of(body: bytes) -> str:
    """What the first choice of an answer says, for comparing it with another's."""
    content = orjson.loads(body)["choices"][0]["message"].get("content")
    if type(content) is list:
        return " ".join(str(part.get("text", "")) for part in content if type(part) is dict)
    return content or ""


def prepare(body: bytes) -> bytes:
    """An answer's body as it is stored, ready for `render_json` and `render_stream`."""
    return answers.prepare(body, "chatcmpl-")


def render_json(entry_body: bytes, request: Request, new_id: str, now: int) -> bytes:
    """The stored answer under a fresh id and date, all else as upstream wrote it.

    `new_id` is the random part alone: the stored prefix ("chatcmpl-", "gen-") goes before it.
    """
    return answers.render_json(entry_body, new_id, now)


def render_stream(entry_body: bytes, request: Request, new_id: str, now: int) -> list[bytes]:
    """The stored answer as the events of a stream, `[DONE]` included, each ready to be sent."""
    stored: Json = orjson.loads(answers.render_json(entry_body, new_id, now))
    choices: list[Json] = stored.pop("choices")
    usage = stored.pop("usage", None)
    base = stored | {"object": "chat.completion.chunk"}
    tail = {"usage": None} if request.include_usage else {}
    events = [
        answers.event({**base, "choices": [piece], **tail})
        for choice in choices
        for piece in _pieces(choice)
    ]
    if request.include_usage and usage is not None:
        events.append(answers.event({**base, "choices": [], "usage": usage}))
    events.append(answers.DONE_EVENT)
    return events


def _pieces(choice: Mapping[str, Any]) -> list[Json]:
    """One choice as the pieces a client expects: role, reasoning, content, the rest, the finish."""
    message = {k: v for k, v in choice["message"].items() if v is not None}
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
    role = {"role": message.pop("role", "assistant")}
    content = {"content": message.pop("content")} if "content" in message else {}
    reasoning = {name: message.pop(name) for name in _REASONING if name in message}
    outside = {k: v for k, v in choice.items() if k not in ("index", "message", "logprobs")}
    logprobs = choice.get("logprobs")

    index = choice.get("index", 0)
    spoken = [delta for delta in (reasoning, content, message) if delta]
    bearer = content or (spoken[0] if spoken else outside)  # log-probabilities go with the text
    if bearer is outside and logprobs is not None:
        outside["logprobs"] = logprobs
    pieces = [{"index": index, "delta": role | {"content": "" if content else None}}]
    for delta in spoken:
        beside = {"logprobs": logprobs} if delta is bearer and logprobs is not None else {}
        pieces.append({"index": index, "delta": delta, **beside})
    for piece in pieces:
        piece["finish_reason"] = None
    return [*pieces, {"index": index, "delta": {}, **outside}]
