"""Tasks: a model name such as `task/fast_summary` stands for a model and how to ask it.

What the caller says itself goes before what the task says. A task may carry a context template,
which becomes system text in front of the caller's own; it is filled from the body's
`metadata.task`, and that member stays here. Plain functions of their arguments: a task is written
into the request before anything is looked up, so the cache only ever sees what would be sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadRequest, ConfigError

__all__ = ["PREFIX", "Task", "Tasks", "asks", "written"]

Json = dict[str, Any]

PREFIX = "task/"
_VALUES = ("user_history", "domain", "language")
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_TOLD = "metadata.task"
# The names under which a request limits its answer, by the end of its path; whichever is there, the
# caller has spoken. The last is the one for reasoning models.
_LIMITS = {
    b"/chat/completions": ("max_tokens", "max_completion_tokens"),
    b"/completions": ("max_tokens",),
    b"/responses": ("max_output_tokens",),
    b"/messages": ("max_tokens",),
}
# Where instructions stand outside the messages.
_INSTRUCTIONS = {b"/completions": "prompt", b"/responses": "instructions", b"/messages": "system"}
# OpenAI's reasoning models refuse `max_tokens`.
_COMPLETION_TOKENS = re.compile(r"(?:.*/)?(?:o\d|gpt-(?:[5-9]|\d\d))")


@dataclass(frozen=True, slots=True)
class Task:
    """What `task/<name>` stands for. None and "" leave a field to the caller or the provider."""

    model: str
    max_tokens: int | None = None
    temperature: float | None = None
    priority: str = ""
    template: str = ""


class Tasks:
    """The configured tasks. Raises ConfigError for a template with an unknown value."""

    def __init__(self, tasks: Mapping[str, Task]) -> None:
        for name, task in tasks.items():
            for value in _PLACEHOLDER.findall(task.template):
                if value not in _VALUES:
                    known = ", ".join(f"{{{known}}}" for known in _VALUES)
                    raise ConfigError(
                        f"tasks: the template of {name} knows no {{{value}}}; there are {known}."
                    )
        self._tasks = dict(tasks)

    def named(self, model: str) -> Task | None:
        """The task that a model name means, None for any other name.

        Raises BadRequest (404, code `model_not_found`) for a task that is not configured.
        """
        if not model.startswith(PREFIX):
            return None
        task = self._tasks.get(model.removeprefix(PREFIX))
        if task is None:
            known = ", ".join(PREFIX + name for name in self._tasks)
            raise BadRequest(
                f"There is no such task; there are {known}.", 404, code="model_not_found"
            )
        return task


def asks(path: bytes) -> bool:
    """Whether a request of this path asks a model for words, so that it may name a task."""
    return path.endswith(tuple(_LIMITS))


def written(task: Task, document: Json, path: bytes) -> Json:
    """The request that a task stands for, its members in the caller's order, the task's after.

    `path` says which protocol's names it is written in; one that is not known gets the model alone.
    Raises BadRequest where `metadata.task` is not what a template can be filled with.
    """
    values, request = _values(document)
    request["model"] = task.model
    limits = next((names for suffix, names in _LIMITS.items() if path.endswith(suffix)), ())
    if not limits:
        return request
    if task.max_tokens is not None and all(request.get(name) is None for name in limits):
        reasoning = _COMPLETION_TOKENS.match(task.model.lower()) is not None
        request[limits[-1] if reasoning else limits[0]] = task.max_tokens
    if task.temperature is not None and request.get("temperature") is None:
        request["temperature"] = task.temperature
    if context := _filled(task.template, values):
        _instruct(request, path, context)
    return request


def _instruct(request: Json, path: bytes, context: str) -> None:
    """Put the context before what the caller lays down itself, where the protocol has it."""
    turns = request.get("messages")
    if path.endswith(b"/chat/completions"):
        if type(turns) is list:
            request["messages"] = [{"role": "system", "content": context}, *turns]
        return
    name = next(name for suffix, name in _INSTRUCTIONS.items() if path.endswith(suffix))
    own = request.get(name)
    if own is None or own == "":
        request[name] = context
    elif type(own) is str:
        request[name] = f"{context}\n\n{own}"
    elif type(own) is list and name == "system":
        request[name] = [{"type": "text", "text": context}, *own]


def _values(document: Json) -> tuple[dict[str, str], Json]:
    """What the caller told of itself, and the request without it."""
    request = dict(document)
    metadata = request.get("metadata")
    if type(metadata) is not dict or "task" not in metadata:
        return {}, request
    left = {name: value for name, value in metadata.items() if name != "task"}
    if left:
        request["metadata"] = left
    else:
        del request["metadata"]
    told = metadata["task"]
    if type(told) is not dict or not set(told) <= set(_VALUES):
        raise BadRequest(f"{_TOLD} is an object of {', '.join(_VALUES)}.")
    values = {name: value for name, value in told.items() if value is not None}
    if any(type(value) is not str for value in values.values()):
        raise BadRequest(f"The values of {_TOLD} are strings.")
    return {name: value.strip() for name, value in values.items()}, request


def _filled(template: str, values: Mapping[str, str]) -> str:
    """The template with its values; a line that misses one is left out.

    One pass over the template: braces within a value are the caller's own text.
    """
    lines = [
        _PLACEHOLDER.sub(lambda place: values[place[1]], line)
        for line in template.splitlines()
        if all(values.get(name) for name in _PLACEHOLDER.findall(line))
    ]
    return "\n".join(lines).strip()
