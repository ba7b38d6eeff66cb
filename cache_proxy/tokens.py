"""How many tokens a request is, before any provider has counted it.

Exact where the model's vocabulary ships with the optional tokenizer (`[tokens]`), near for models
whose vocabulary is not public; without the tokenizer UTF-8 bytes / 4.5, rounded up. What a provider
bills is its own `usage` and never this. No network: vocabularies come with the package.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

from .canonical import dump

if TYPE_CHECKING:
    from quicktok import Tokenizer

__all__ = ["PART_TOKENS", "REPLY_TOKENS", "count", "of_message", "warm"]

# The first that matches; OpenAI's own of the last years for all the rest, which no public
# vocabulary fits (Claude, Gemini, DeepSeek, Mistral): nearer than bytes in any language.
_VOCABULARIES = (
    ("gpt-4o*", "o200k_base"),
    ("gpt-4.[1-9]*", "o200k_base"),
    ("gpt-4*", "cl100k_base"),
    ("gpt-3.5*", "cl100k_base"),
    ("text-embedding-*", "cl100k_base"),
    ("qwen*", "qwen3"),
    ("llama-3*", "llama3"),
    ("llama3*", "llama3"),
    ("meta-llama-3*", "llama3"),
    ("*", "o200k_base"),
)
_LONGEST = 100_000  # characters; a longer text is told by its bytes, not to hold up other requests

# OpenAI's cookbook, "How to count tokens with tiktoken": what frames each message, what a name
# costs more, and what primes the answer.
_FRAME_TOKENS = 3
_NAME_TOKENS = 1
REPLY_TOKENS = 3
# A picture at high detail, at the most tiles that a 2048 x 768 one can have (85 + 8 x 170), and at
# low detail; OpenAI's guide to vision, for gpt-4o. Files count as a picture: what is in them only
# the provider knows.
PART_TOKENS = 1_445
_LOW_DETAIL_TOKENS = 85
# Ten tokens a second of speech; 16 kB a second as MP3, which in base64 is 4/3 of that.
_AUDIO_CHARACTERS = 2_133


def count(text: str, model: str | None) -> int:
    """Tokens of a plain text as `model` reads it, by its bytes alone where that is None; special
    tokens in it are words like others."""
    vocabulary = None
    if model is not None and len(text) <= _LONGEST:
        vocabulary = _vocabulary(_name(model))
    if vocabulary is not None:
        tokens: int = vocabulary.count(text)
        return tokens
    return -(-2 * len(text.encode()) // 9)


def of_message(message: Mapping[str, Any], model: str | None) -> int:
    """Tokens of one message of a chat, its frame included.

    Tool calls and fields that are not known count as the JSON they are written in.
    """
    tokens = _FRAME_TOKENS + (_NAME_TOKENS if message.get("name") else 0)
    for name, value in message.items():
        if name == "content" and type(value) is list:
            tokens += sum(_of_part(part, model) for part in value)
        elif type(value) is str:
            tokens += count(value, model)
        elif value is not None:
            tokens += count(dump(value).decode(), model)
    return tokens


def _of_part(part: Any, model: str | None) -> int:
    if type(part) is not dict:
        return count(dump(part).decode(), model)
    kind, text = part.get("type"), part.get("text", part.get("refusal"))
    if type(text) is str:
        return count(text, model)
    details = part.get(kind) if type(kind) is str else None
    if type(details) is dict and details.get("detail") == "low":
        return _LOW_DETAIL_TOKENS
    if kind == "input_audio" and type(details) is dict:
        return -(-len(str(details.get("data"))) // _AUDIO_CHARACTERS)
    return PART_TOKENS


def warm() -> None:
    """Read every vocabulary: some two seconds and 190 MB, once. Nothing without the tokenizer."""
    for name in sorted({name for _, name in _VOCABULARIES}):
        _vocabulary(name)


@lru_cache(maxsize=256)  # asked for each text of a request
def _name(model: str) -> str:
    """The vocabulary of a model: its organisation and a fine-tune's prefix say nothing of it."""
    bare = model.lower().rpartition("/")[2].removeprefix("ft:")
    return next(name for glob, name in _VOCABULARIES if fnmatchcase(bare, glob))


@cache
def _vocabulary(name: str) -> Tokenizer | None:
    try:
        from quicktok import get_encoding
    except ImportError:
        return None
    return get_encoding(name)
