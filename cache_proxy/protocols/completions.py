"""Legacy Completions: a prompt in, text out, with the same functions as `chat`.

Only a single text prompt is fuzzy; lists of prompts and token arrays are compared exactly. Bytes
in, bytes out: knows no socket and no clock.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import orjson

from cache_proxy.canonical import canonical, clean
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

_TAKEN = fields.DELIVERY | fields.IDENTITY | {"prompt", "model"}

Json = dict[str, Any]


def parse(
    document: Json,
    *,
    masks: Sequence[re.Pattern[str]] = (),
    question_marker: str = "",
    path_model: str = "",
) -> Request:
    """Read a body that `canonical.load` accepted. Raises `Unreadable`, and nothing else.

    `masks` has nothing to do here, since there is no system text; the other arguments are as in
    `chat.parse`.
    """
    prompt = document.get("prompt")
    if type(prompt) is list and len(prompt) == 1 and type(prompt[0]) is str:
        prompt = prompt[0]
    model = fields.model_name(document, path_model)
    shape: Json = {"fields": fields.kept(document, _TAKEN) | {"model": model}}
    text = None
    if type(prompt) is str and not fields.blank(prompt):
        before, question = fields.question(prompt, question_marker)
        text = clean(question)
        if before:
            shape["before"] = before
        # A raw prompt is continued, not answered: its outer white space steers the model.
        shape["margins"] = _margins(question)
    else:
        shape["prompt"] = _exact(prompt)
    return Request(
        operation="completions",
        model=model,
        stream=fields.flag(document, "stream"),
        include_usage=fields.includes_usage(document),
        text=text,
        rest=canonical(shape),
        turns=1,
        declares_tools=False,
        tool_turns=False,
        other_parts=False,
        web_search=fields.searches_web(document, model, ()),
        choices=fields.count(document, "n") * _prompts(prompt),
        temperature=fields.number(document, "temperature"),
        end_user=fields.end_user(document),
    )


def _margins(text: str) -> list[str]:
    left = len(text) - len(text.lstrip())
    return [text[:left], text[len(text.rstrip()) :]]


def _exact(prompt: Any) -> Any:
    """A prompt that is no single text, if it is one of the known kinds."""
    if prompt is None or type(prompt) is str:
        return prompt
    if type(prompt) is not list or not prompt:
        raise Unreadable("prompt")
    kinds = {type(item) for item in prompt}
    if kinds == {list} and all(type(token) is int for item in prompt for token in item):
        return prompt
    if kinds in ({str}, {int}):
        return prompt
    raise Unreadable("prompt")


def _prompts(prompt: Any) -> int:
    """How many prompts there are; each has its own choices."""
    return len(prompt) if type(prompt) is list and type(prompt[0]) is not int else 1


def _said(choice: Json) -> Said:
    text = choice.get("text")
    silent = type(text) is not str or not text.strip()
    return Said(empty=silent, refused=False, tool_calls=False)


def whole(body: bytes) -> Answer:
    """The facts of a non-streamed answer; an error object or what cannot be parsed is `error`."""
    return answers.whole(body, _said)


class Reassembler(answers.Reassembler):
    """Feed it each event's data; `answer()` is the completion as it would have come whole."""

    object_name = "text_completion"

    def _fold(self, choice: Json, piece: Json) -> None:
        for name, value in piece.items():
            if name in ("text", "logprobs"):
                answers.fold(choice, {name: value})
            elif value is not None and name != "index":
                choice[name] = value

    def _settled(self, choice: Json) -> Json:
        return {"text": "", "finish_reason": None, **super()._settled(choice)}

    def _said(self, choice: Json) -> Said:
        return _said(choice)


def text_of(body: bytes) -> str:
    """What the first choice of an answer says, for comparing it with another's."""
    return str(orjson.loads(body)["choices"][0].get("text") or "")


def prepare(body: bytes) -> bytes:
    """An answer's body as it is stored, ready for `render_json` and `render_stream`."""
    return answers.prepare(body, "cmpl-")


def render_json(entry_body: bytes, request: Request, new_id: str, now: int) -> bytes:
    """The stored answer under a fresh id and date; `new_id` is what follows the id's prefix."""
    return answers.render_json(entry_body, new_id, now)


def render_stream(entry_body: bytes, request: Request, new_id: str, now: int) -> list[bytes]:
    """The stored answer as the events of a stream, `[DONE]` included, each ready to be sent."""
    stored: Json = orjson.loads(answers.render_json(entry_body, new_id, now))
    choices: list[Json] = stored.pop("choices")
    usage = stored.pop("usage", None)
    tail = {"usage": None} if request.include_usage else {}
    events = [
        answers.event({**stored, "choices": [piece], **tail})
        for choice in choices
        for piece in _pieces(choice)
    ]
    if request.include_usage and usage is not None:
        events.append(answers.event({**stored, "choices": [], "usage": usage}))
    events.append(answers.DONE_EVENT)
    return events


def _pieces(choice: Json) -> list[Json]:
    index = choice.get("index", 0)
    spoken = {"text": choice.get("text", ""), "logprobs": choice.get("logprobs")}
    outside = {k: v for k, v in choice.items() if k not in ("index", "text", "logprobs")}
    return [
        {"index": index, **spoken, "finish_reason": None},
        {"index": index, "text": "", "logprobs": None, **outside},
    ]
