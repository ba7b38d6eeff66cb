"""Labelled question pairs in one shape: the project's own trap set and public sets by path.

Our own pairs and conversations lie in benchmarks/traps; LABELS.md there holds the label rules.
A third of them is held out: chosen by the id alone (`held_out`), kept in files of its own, read
by `load_held_out` only. Whatever tunes or trains may call `load` and `load_conversations`, which
refuse a held-out name; tests/test_traps.py reads the training code and fails where it tries.
A file that is not there is an empty list: the public sets are not part of this repository.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = [
    "HELD_OUT_CONVERSATIONS",
    "HELD_OUT_FILES",
    "PUBLIC",
    "PUBLIC_FOLDER",
    "TUNING_CONVERSATIONS",
    "TUNING_FILES",
    "Conversations",
    "Pair",
    "held_out",
    "load",
    "load_conversations",
    "load_held_out",
    "load_held_out_conversations",
]

HERE = Path(__file__).resolve().parent
TRAPS = HERE / "traps"
PUBLIC_FOLDER = HERE.parent.parent / "shared" / "data"

TUNING_FILES = ("pairs.en.jsonl", "pairs.vi.jsonl", "near.en.jsonl", "blind.en.jsonl")
HELD_OUT_FILES = (
    "held_out.pairs.en.jsonl",
    "held_out.pairs.vi.jsonl",
    "held_out.blind.en.jsonl",
)
TUNING_CONVERSATIONS = ("conversations.jsonl",)
HELD_OUT_CONVERSATIONS = ("held_out.conversations.jsonl",)


class Pair(NamedTuple):
    """Two prompts and whether one stored answer serves both."""

    a: str
    b: str
    same: bool
    kind: str  # what the pair tests: "negation", "synonym"; "" where a public set does not say
    source: str  # the file or public set it came from
    id: str = ""  # only our own pairs carry one
    domain: str = ""


class Conversations(NamedTuple):
    """Two chats that end in a user turn and whether one stored answer serves both."""

    a: tuple[dict[str, str], ...]
    b: tuple[dict[str, str], ...]
    same: bool
    kind: str
    id: str


def held_out(name: str) -> bool:
    """Whether the pair of this id is kept from tuning: a third, fixed once and for all."""
    return zlib.crc32(name.encode()) % 3 == 0


def load(name: str, data: Path = PUBLIC_FOLDER) -> list[Pair]:
    """The pairs of one of TUNING_FILES, or of one of PUBLIC below the folder `data`."""
    if name in PUBLIC:
        return list(PUBLIC[name](data))
    return _pairs(_known(name, TUNING_FILES))


def load_held_out(name: str) -> list[Pair]:
    """The pairs of one of HELD_OUT_FILES: for the final measuring and nothing before it."""
    return _pairs(_known(name, HELD_OUT_FILES))


def load_conversations(name: str = TUNING_CONVERSATIONS[0]) -> list[Conversations]:
    return _conversations(_known(name, TUNING_CONVERSATIONS))


def load_held_out_conversations(name: str = HELD_OUT_CONVERSATIONS[0]) -> list[Conversations]:
    """As `load_held_out`: for the final measuring only."""
    return _conversations(_known(name, HELD_OUT_CONVERSATIONS))


def _known(name: str, allowed: tuple[str, ...]) -> str:
    if name not in allowed:
        raise ValueError(f"{name!r} may not be read here; known here: {', '.join(allowed)}")
    return name


def _pairs(name: str) -> list[Pair]:
    return [
        Pair(row["a"], row["b"], row["same"], row["kind"], name, row["id"], row["domain"])
        for row in _rows(TRAPS / name)
    ]


def _conversations(name: str) -> list[Conversations]:
    return [
        Conversations(
            tuple(row["messages_a"]), tuple(row["messages_b"]), row["same"], row["kind"], row["id"]
        )
        for row in _rows(TRAPS / name)
    ]


def _rows(path: Path) -> Iterator[Any]:
    if not path.exists():
        return
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _quora(data: Path) -> Iterator[Pair]:
    for row in _rows(data / "quora/pairs.jsonl.gz"):
        yield Pair(row["a"], row["b"], bool(row["same"]), "", "quora")


def _kmemo(data: Path) -> Iterator[Pair]:
    for path in sorted((data / "kmemo").glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["pairs"]:
            kind = row.get("category", "")
            yield Pair(row["a"], row["b"], bool(row["shouldMatch"]), kind, "kmemo")


def _cannot(data: Path) -> Iterator[Pair]:
    path = data / "cannot/sem_anto_neg.tsv"
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        a, b, label = line.split("\t")
        # Its label 1 marks a contradiction: "You're not fat." against "You're fat."
        yield Pair(a, b, label != "1", "negation", "cannot")


# Another sum with another working, even where the last number comes out equal by chance.
_OTHER_SUM = {"numerical substitution", "adding operation", "reversing operation"}


def _gsmplus(data: Path) -> Iterator[Pair]:
    for row in _rows(data / "gsmplus/first_half.jsonl.gz"):
        kind = row["perturbation_type"]
        same = row["seed_answer"] == row["answer"] and kind not in _OTHER_SUM
        yield Pair(row["seed_question"], row["question"], same, kind, "gsmplus")


def _banking(data: Path) -> Iterator[Pair]:
    """Each question with a question of its own intent and with the closest words of another."""
    path = data / "banking77/train.csv"
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="") as lines:
        rows = [(row["text"].strip(), row["category"]) for row in csv.DictReader(lines)]
    words = [frozenset(re.findall(r"\w+", text.lower())) for text, _ in rows]
    holders: defaultdict[str, list[int]] = defaultdict(list)
    intents: defaultdict[str, list[int]] = defaultdict(list)
    for at, (_, intent) in enumerate(rows):
        intents[intent].append(at)
        for word in words[at]:
            holders[word].append(at)
    dice = random.Random(77)
    for at, (text, intent) in enumerate(rows):
        twin = dice.choice(intents[intent])
        if rows[twin][0] != text:
            yield Pair(text, rows[twin][0], True, "same intent", "banking77")
        rare = sorted(words[at], key=lambda word: (len(holders[word]), word))[:3]
        near = {other for word in rare for other in holders[word][:100]}
        strangers = sorted(other for other in near if rows[other][1] != intent)
        if strangers:
            rival = max(strangers, key=lambda other: _overlap(words[at], words[other]))
            yield Pair(text, rows[rival][0], False, "other intent", "banking77")


def _overlap(a: frozenset[str], b: frozenset[str]) -> float:
    return len(a & b) / len(a | b)


def _xquad(data: Path) -> Iterator[Pair]:
    """Vietnamese against its English twin, and against itself with the first number raised."""
    for row in _rows(data / "xquad/questions_en_vi.jsonl"):
        yield Pair(row["vi"], row["en"], False, "language", "xquad")
        changed = re.sub(r"\d+", lambda found: str(int(found[0]) + 1), row["vi"], count=1)
        if changed != row["vi"]:
            yield Pair(row["vi"], changed, False, "number", "xquad")


PUBLIC: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "quora": _quora,
    "kmemo": _kmemo,
    "cannot": _cannot,
    "gsmplus": _gsmplus,
    "banking77": _banking,
    "xquad": _xquad,
}
