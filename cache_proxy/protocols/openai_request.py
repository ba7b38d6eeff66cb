"""What the OpenAI-shaped protocols share on the way in: reading fields, and asking for usage.

Bytes and plain JSON values in and out. Nothing here repairs a request: what cannot be read for
certain is `Unreadable`, and goes upstream byte for byte without the cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from cache_proxy.canonical import canonical, dump

__all__ = [
    "DELIVERY",
    "IDENTITY",
    "Reason",
    "Unreadable",
    "ask_usage",
    "blank",
    "count",
    "end_user",
    "flag",
    "includes_usage",
    "kept",
    "model_name",
    "number",
    "objects",
    "question",
    "searches_web",
]

Reason = Literal["field", "input", "messages", "metadata", "model", "prompt", "tools"]

# They change how an answer is delivered, billed, filed or cached upstream, never what it says.
DELIVERY = frozenset(
    {
        "stream",
        "stream_options",
        "metadata",  # less metadata.user_id, which is identity
        "store",
        "prompt_cache_key",
        "prompt_cache_retention",
        "service_tier",
        "cache_control",
    }
)
# Who is asking. They partition too, but on their own, so that a setting can ignore them.
IDENTITY = frozenset({"user", "safety_identifier"})

_SEARCH_FIELDS = ("web_search_options", "search_parameters", "enable_search")
_SEARCH_MODELS = ("-search-preview", "-search-api", ":online", "sonar", "groq/compound")


class Unreadable(Exception):
    """A field has a type we do not know how to compare. Forward the bytes, keep the cache out."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason: Reason = reason


def kept(members: Mapping[str, Any], dropped: frozenset[str]) -> dict[str, Any]:
    """The members that partition: nulls and empty lists say the same as absence, so they go."""
    return {
        name: value
        for name, value in members.items()
        if value is not None and value != [] and name not in dropped
    }


def model_name(document: Mapping[str, Any], path_model: str) -> str:
    model = document.get("model")
    if model is None:
        return path_model  # Azure names it in the path, some local servers not at all
    if type(model) is not str:
        raise Unreadable("model")
    return model


def flag(document: Mapping[str, Any], name: str) -> bool:
    value = document.get(name)
    if value is None or type(value) is bool:
        return bool(value)
    raise Unreadable("field")


def number(document: Mapping[str, Any], name: str) -> float | None:
    value = document.get(name)
    if value is None or type(value) is float:
        return value
    if type(value) is int and abs(value) < 2**63:
        return float(value)
    raise Unreadable("field")


def count(document: Mapping[str, Any], name: str) -> int:
    """A whole number of things, 1 when it is not given."""
    value = number(document, name)
    if value is None:
        return 1
    if not value.is_integer():
        raise Unreadable("field")
    return int(value)


def objects(value: Any, reason: Reason) -> list[dict[str, Any]]:
    """A list of JSON objects; nothing at all is an empty one."""
    if value is None:
        return []
    if type(value) is not list or any(type(item) is not dict for item in value):
        raise Unreadable(reason)
    return value


def includes_usage(document: Mapping[str, Any]) -> bool:
    options = document.get("stream_options")
    if options is None:
        return False
    if type(options) is not dict:
        raise Unreadable("field")
    return flag(options, "include_usage")


def end_user(document: Mapping[str, Any]) -> str | None:
    """Who the app says is asking, as canonical JSON that no other set of names can spell."""
    named = {name: document[name] for name in IDENTITY if document.get(name) is not None}
    metadata = document.get("metadata")
    if metadata is not None:
        if type(metadata) is not dict:
            raise Unreadable("metadata")
        if metadata.get("user_id") is not None:
            named["metadata.user_id"] = metadata["user_id"]
    return canonical(named).decode() if named else None


def searches_web(document: Mapping[str, Any], model: str, tools: Iterable[dict[str, Any]]) -> bool:
    """Whether the answer may depend on what the web says today."""
    if any(document.get(name) not in (None, False, []) for name in _SEARCH_FIELDS):
        return True
    if any(mark in model for mark in _SEARCH_MODELS):
        return True
    plugins = document.get("plugins")
    if plugins is not None and b'"web"' in dump(plugins):
        return True
    return any(str(tool.get("type")).startswith(("web_search", "browser_search")) for tool in tools)


def question(text: str, marker: str) -> tuple[str, str]:
    """(what is compared exactly, what may be reworded): parted after the marker's last place."""
    if marker and marker in text:
        before, _, asked = text.rpartition(marker)
        if not blank(asked):
            return before + marker, asked
    return "", text


def blank(text: str) -> bool:
    return not text or text.isspace()


def ask_usage(body: bytes, document: Mapping[str, Any]) -> bytes:
    """The body with the usage chunk asked for, when it streams and has not asked itself.

    Nearly always a splice that leaves every other byte alone; only a body that already holds
    other `stream_options` is written anew, since a key must not stand there twice.
    """
    if not flag(document, "stream") or includes_usage(document):
        return body
    if "stream_options" not in document:
        brace = body.index(b"{") + 1
        return body[:brace] + b'"stream_options":{"include_usage":true},' + body[brace:]
    options = {**(document["stream_options"] or {}), "include_usage": True}
    return dump({**document, "stream_options": options})
