"""What a prompt says, as text: read once, when its answer is stored, and kept with the entry.

Reading a prompt of 50 to 250 characters takes 80 to 200 microseconds, unpacking what was read some
20. What other rules or word lists read is not believed: it would be compared with what these read.

Plain functions of their arguments: no I/O after import, no clock, no logging.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from hashlib import blake2b
from importlib.resources import files
from typing import Any

import orjson

from cache_proxy.facts import Facts, facts

__all__ = ["LONGEST", "gist", "unpack"]

LONGEST = 1_000  # characters; longer prompts are hardly ever within an encoder's window

_RULES = ("facts.py", "lexicon.py", "marks.py", "quantities.py", "wording.py")


def _version() -> str:
    """A digest of all that decides how a prompt is read."""
    folder = files("cache_proxy")
    words = sorted((folder / "words").iterdir(), key=lambda file: file.name)
    told = b"".join(file.read_bytes() for file in (*(folder / name for name in _RULES), *words))
    return blake2b(told, digest_size=8).hexdigest()


_VERSION = _version()
_NAMES = tuple(field.name for field in fields(Facts))


def _pairs(of: type) -> Callable[[list[list[str]]], Any]:
    return lambda value: of(map(tuple, value))


# What a field is where a prompt says nothing; most fields of most prompts.
_NOTHING = tuple(getattr(facts(""), name) for name in _NAMES)


def _makers() -> tuple[Callable[[Any], Any] | None, ...]:
    """How each field comes back from JSON: a set, a tuple, either of pairs, or as it is."""
    return tuple(
        None
        if not isinstance(nothing, tuple | frozenset)
        else _pairs(type(nothing))
        if "[tuple[" in field.type
        else type(nothing)
        for nothing, field in zip(_NOTHING, fields(Facts), strict=True)
    )


_MAKERS = _makers()


def gist(text: str) -> str:
    """What this prompt says; "" for one that is too long to be worth it."""
    if not text or len(text) > LONGEST:
        return ""
    told = facts(text)
    return _VERSION + orjson.dumps([_plain(getattr(told, name)) for name in _NAMES]).decode()


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, frozenset) else value


def unpack(kept: str) -> Facts | None:
    """What `gist` kept; None when there is nothing, or other rules read it."""
    if not kept.startswith(_VERSION):
        return None
    values = orjson.loads(kept[len(_VERSION) :])
    told = (
        nothing if not value else make(value) if make else value
        for nothing, make, value in zip(_NOTHING, _MAKERS, values, strict=True)
    )
    return Facts(*told)
