"""The project's own trap set: its shape, its label rules, and the third that no tuning may see."""

from __future__ import annotations

import ast
import gzip
import json
import re
from itertools import chain
from pathlib import Path
from statistics import median

import pytest

from benchmarks import pairs
from benchmarks.pairs import (
    HELD_OUT_CONVERSATIONS,
    HELD_OUT_FILES,
    TUNING_CONVERSATIONS,
    TUNING_FILES,
    Conversations,
    Pair,
    held_out,
    load,
    load_conversations,
    load_held_out,
    load_held_out_conversations,
)
from cache_proxy.wording import fold, language

ROOT = Path(__file__).resolve().parent.parent
TRAPS = ROOT / "benchmarks" / "traps"

TRAP_KINDS = {
    "antonym", "code", "comparison", "direction", "entity", "form", "modality", "negation",
    "number", "quantifier", "question-type", "role", "scope", "substitution", "tense",
}  # fmt: skip
GENUINE_KINDS = {
    "abbreviation", "contraction", "length", "number-spelling", "order", "plural", "politeness",
    "register", "rewording", "statement", "synonym", "typo", "voice",
}  # fmt: skip
TRAP_CONVERSATION_KINDS = TRAP_KINDS | {"assistant", "system"}
GENUINE_CONVERSATION_KINDS = {"chatter", "identical-history", "reworded-history", "self-contained"}
DOMAINS = {
    "banking", "cooking", "geography", "health", "history", "home", "hr", "law", "programming",
    "science", "shopping", "support", "travel", "leisure", "education",
}  # fmt: skip

TUNING = [pair for name in TUNING_FILES for pair in load(name)]
HELD_OUT = [pair for name in HELD_OUT_FILES for pair in load_held_out(name)]
ALL = TUNING + HELD_OUT
CHATS = load_conversations() + load_held_out_conversations()


def written_in(code: str) -> list[Pair]:
    """Of the set proper: what was added for tuning alone is neither halved nor held out."""
    return [pair for pair in ALL if f"pairs.{code}." in pair.source]


def overlap(pair: Pair) -> float:
    a, b = (set(re.findall(r"\w+", fold(text))) for text in (pair.a, pair.b))
    return len(a & b) / len(a | b)


def raw(name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (TRAPS / name).read_text(encoding="utf-8").splitlines()]


# The set itself


@pytest.mark.parametrize(("code", "least"), [("en", 420), ("vi", 220)])
def test_each_language_has_its_number_of_pairs_half_of_them_genuine(code: str, least: int) -> None:
    """A kept share and a trapped share are both worth printing only if both halves are large."""
    found = written_in(code)
    assert len(found) >= least
    assert 0.45 <= sum(pair.same for pair in found) / len(found) <= 0.55


def test_there_are_640_pairs() -> None:
    """Few traps served is a claim with an interval: below this many it is too wide to print."""
    assert len(ALL) >= 640


def test_conversations_are_mostly_traps() -> None:
    """A hit on a changed earlier detail is the worst error a chat can get."""
    assert sum(not chat.same for chat in CHATS) >= 44
    assert sum(chat.same for chat in CHATS) >= 16


def test_each_kind_is_a_known_one_on_its_own_side_and_none_is_missing() -> None:
    """Figures by kind mean something only when a kind names one thing."""
    assert {pair.kind for pair in ALL if not pair.same} == TRAP_KINDS
    assert {pair.kind for pair in ALL if pair.same} == GENUINE_KINDS
    assert {pair.domain for pair in ALL} == DOMAINS
    assert {chat.kind for chat in CHATS if not chat.same} <= TRAP_CONVERSATION_KINDS
    assert {chat.kind for chat in CHATS if chat.same} == GENUINE_CONVERSATION_KINDS


def test_the_label_rules_name_every_kind() -> None:
    """Whoever reads a figure by kind finds what the kind is."""
    rules = (TRAPS / "LABELS.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([a-z-]+)` \|", rules, re.MULTILINE))
    assert named == (
        TRAP_CONVERSATION_KINDS | GENUINE_KINDS | GENUINE_CONVERSATION_KINDS
    )  # both ways: no kind unexplained, none explained that is not there


def test_every_text_is_in_the_language_of_its_file() -> None:
    """Vietnamese is told from English before anything else is judged."""
    vietnamese = [text for pair in written_in("vi") for text in (pair.a, pair.b)]
    english = [text for pair in written_in("en") for text in (pair.a, pair.b)]
    assert [text for text in vietnamese if language(text) != "vi"] == []
    assert [text for text in english if language(text) in ("vi", "other")] == []


def test_no_pair_is_there_twice_and_none_asks_itself() -> None:
    """A pair counted twice makes an interval narrower than it is."""
    keys = [frozenset((fold(pair.a), fold(pair.b))) for pair in ALL]
    assert all(len(key) == 2 for key in keys)
    assert len(set(keys)) == len(keys)
    chats = [json.dumps(sorted([chat.a, chat.b], key=str)) for chat in CHATS]
    assert len(set(chats)) == len(chats)


def test_ids_are_unique_and_rows_have_no_other_fields() -> None:
    """An id decides for ever on which side its pair lies."""
    ids = [pair.id for pair in ALL] + [chat.id for chat in CHATS]
    assert len(set(ids)) == len(ids)
    for name in (*TUNING_FILES, *HELD_OUT_FILES):
        assert {tuple(row) for row in raw(name)} == {("id", "a", "b", "same", "kind", "domain")}
        assert {type(row["same"]) for row in raw(name)} == {bool}
    for name in (*TUNING_CONVERSATIONS, *HELD_OUT_CONVERSATIONS):
        assert {tuple(row) for row in raw(name)} == {
            ("id", "messages_a", "messages_b", "same", "kind")
        }


def test_traps_are_near_and_a_third_of_the_genuine_pairs_are_far() -> None:
    """A trap that shares no words is caught by any cosine; a genuine pair that shares all, too."""
    genuine = [overlap(pair) for pair in ALL if pair.same]
    assert median(overlap(pair) for pair in ALL if not pair.same) >= 0.6
    assert sum(share < 0.5 for share in genuine) >= len(genuine) / 3


@pytest.mark.parametrize(
    "chat", [chat for chat in CHATS if not chat.same], ids=lambda chat: chat.id
)
def test_a_conversation_trap_ends_alike_and_differs_in_one_earlier_message(
    chat: Conversations,
) -> None:
    """I2: only what stands before the last turn tells these two apart."""
    assert chat.a[-1] == chat.b[-1]
    assert len(chat.a) == len(chat.b)
    assert sum(one != other for one, other in zip(chat.a, chat.b, strict=True)) == 1


def test_every_conversation_ends_in_a_user_turn_and_has_one_before_it() -> None:
    for messages in chain.from_iterable((chat.a, chat.b) for chat in CHATS):
        assert len(messages) >= 2
        assert messages[-1]["role"] == "user"
        assert {message["role"] for message in messages} <= {"system", "user", "assistant"}
        assert all(message["content"].strip() for message in messages)


# The third that no tuning may see


def test_the_id_alone_decides_which_file_a_pair_is_in() -> None:
    """Nobody can move a pair to the side where it looks better."""
    assert [pair.id for pair in TUNING if held_out(pair.id)] == []
    assert [pair.id for pair in HELD_OUT if not held_out(pair.id)] == []
    assert [chat.id for chat in load_conversations() if held_out(chat.id)] == []
    assert [chat.id for chat in load_held_out_conversations() if not held_out(chat.id)] == []


def test_about_a_third_is_held_out() -> None:
    for kept, whole in (
        (len(load_held_out(HELD_OUT_FILES[0])), len(written_in("en"))),
        (len(load_held_out(HELD_OUT_FILES[1])), len(written_in("vi"))),
        (len(load_held_out_conversations()), len(CHATS)),
    ):
        assert 0.28 <= kept / whole <= 0.40


def test_no_held_out_text_stands_in_a_tuning_file() -> None:
    """What was seen in tuning cannot serve as unseen."""
    seen = {fold(text) for pair in TUNING for text in (pair.a, pair.b)}
    seen |= {fold(chat[-1]["content"]) for both in load_conversations() for chat in both[:2]}
    unseen = {fold(text) for pair in HELD_OUT for text in (pair.a, pair.b)}
    unseen |= {
        fold(chat[-1]["content"]) for both in load_held_out_conversations() for chat in both[:2]
    }
    assert seen & unseen == set()


@pytest.mark.parametrize("name", [*HELD_OUT_FILES, "../traps/" + HELD_OUT_FILES[0]])
def test_the_tuning_loader_refuses_held_out_files(name: str) -> None:
    with pytest.raises(ValueError, match="may not be read here"):
        load(name)


def test_the_tuning_loader_for_conversations_refuses_held_out_files() -> None:
    with pytest.raises(ValueError, match="may not be read here"):
        load_conversations(HELD_OUT_CONVERSATIONS[0])


# Names of benchmarks.pairs that lead to held-out rows; every private name there might.
_FORBIDDEN = {"HELD_OUT_CONVERSATIONS", "HELD_OUT_FILES", "TRAPS"}
_FORBIDDEN |= {"load_held_out", "load_held_out_conversations"}
# What tunes: these may not borrow from the measuring command either.
TRAINERS = ("benchmarks/train_score.py", "cache_proxy/tune.py", "cache_proxy/certify.py")
MEASURING = ("benchmarks/pairs.py", "benchmarks/accuracy.py")


def reaches(source: str) -> list[str]:
    """What in a module leads to the held-out files: names, path strings, star imports."""
    tree = ast.parse(source)
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found: list[str] = []
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in _FORBIDDEN:
                found.append(name)
            case ast.ImportFrom(module="benchmarks.pairs", names=names):
                found += [
                    item.name
                    for item in names
                    if item.name in _FORBIDDEN or item.name.startswith(("_", "*"))
                ]
            case ast.Attribute(value=ast.Name(id="pairs"), attr=name) if name.startswith("_"):
                found.append(name)
            case ast.BinOp(op=ast.Div(), right=ast.Constant(value="traps")):
                found.append("/ traps")
            case ast.Call(args=args):
                found += [
                    "(traps)"
                    for arg in args
                    if isinstance(arg, ast.Constant) and arg.value == "traps"
                ]
            case ast.Constant(value=str(text)) if id(node) not in prose:
                if "held_out." in text or re.search(r"traps/|/traps$", text):
                    found.append(text)
            case _:
                pass
    return found


def imported(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {item.name for item in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{item.name}" for item in node.names} | {str(node.module)}
    return names


@pytest.mark.parametrize(
    "source",
    [
        "from benchmarks.pairs import HELD_OUT_FILES",
        "from benchmarks.pairs import load_held_out as load",
        "from benchmarks.pairs import _pairs",
        "from benchmarks.pairs import *",
        "from benchmarks import pairs\nrows = pairs.load_held_out_conversations()",
        "open('benchmarks/traps/held_out.pairs.en.jsonl')",
        "rows = sorted((HERE / 'traps').glob('*.jsonl'))",
        "rows = glob('benchmarks/traps/*.jsonl')",
        "rows = HERE.joinpath('traps').iterdir()",
        "from benchmarks import pairs\nrows = pairs._rows(path)",
    ],
)
def test_each_way_to_the_held_out_files_is_noticed(source: str) -> None:
    assert reaches(source)


def test_the_tuning_files_may_be_read() -> None:
    source = '"""Never the held_out. files in traps/."""\n'
    source += "from benchmarks.pairs import TUNING_FILES, load\n"
    source += "rows = [pair for name in TUNING_FILES for pair in load(name)]\n"
    source += "shares = {'traps': 0.0}\n"
    assert reaches(source) == []


def test_only_the_accuracy_command_opens_the_held_out_files() -> None:
    """A figure on pairs that tuning has seen says nothing about the next user's prompts."""
    modules = [path for top in ("cache_proxy", "embeddings", "benchmarks") for path in
               (ROOT / top).rglob("*.py")]  # fmt: skip
    assert len(modules) > 20
    guilty = {
        str(path.relative_to(ROOT)): ways
        for path in modules
        if path.relative_to(ROOT).as_posix() not in MEASURING
        and (ways := reaches(path.read_text(encoding="utf-8")))
    }
    assert guilty == {}


@pytest.mark.parametrize("name", TRAINERS)
def test_training_code_borrows_nothing_from_the_measuring_command(name: str) -> None:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not there")
    borrowed = imported(path.read_text(encoding="utf-8"))
    assert not any("accuracy" in module for module in borrowed)


# The public sets


def test_a_public_set_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert [load(name, tmp_path) for name in pairs.PUBLIC] == [[]] * len(pairs.PUBLIC)


def test_public_labels_are_read_the_way_they_are_meant(tmp_path: Path) -> None:
    """In the negation set 1 marks a contradiction; other sums with one result are other sums."""
    for folder in ("quora", "kmemo", "cannot", "gsmplus", "banking77", "xquad"):
        (tmp_path / folder).mkdir()
    with gzip.open(tmp_path / "quora/pairs.jsonl.gz", "wt", encoding="utf-8") as out:
        out.write('{"a": "one", "b": "two", "same": 1}\n{"a": "one", "b": "three", "same": 0}\n')
    near = {"pairs": [{"a": "x", "b": "y", "shouldMatch": False, "category": "unit"}]}
    (tmp_path / "kmemo/some.json").write_text(json.dumps(near), encoding="utf-8")
    (tmp_path / "cannot/sem_anto_neg.tsv").write_text(
        "premise\thypothesis\tlabel\nIt rains.\tIt is dry.\t1\nIt rains.\tRain falls.\t0\n",
        encoding="utf-8",
    )
    sums = [("problem understanding", "3"), ("reversing operation", "3"), ("critical thinking", "")]
    with gzip.open(tmp_path / "gsmplus/first_half.jsonl.gz", "wt", encoding="utf-8") as out:
        for kind, answer in sums:
            row = {"question": "q", "seed_question": "s", "answer": answer, "seed_answer": "3"}
            out.write(json.dumps({**row, "perturbation_type": kind}) + "\n")
    (tmp_path / "banking77/train.csv").write_text(
        "text,category\nMy card is late,arrival\nWhere is my card,arrival\nMy card is lost,lost\n",
        encoding="utf-8",
    )
    (tmp_path / "xquad/questions_en_vi.jsonl").write_text(
        '{"id": "1", "en": "What happened in 1990?", "vi": "Năm 1990 có gì?"}\n', encoding="utf-8"
    )

    def labels(name: str) -> list[tuple[bool, str]]:
        return [(pair.same, pair.kind) for pair in load(name, tmp_path)]

    assert labels("quora") == [(True, ""), (False, "")]
    assert labels("kmemo") == [(False, "unit")]
    assert labels("cannot") == [(False, "negation"), (True, "negation")]
    assert labels("gsmplus") == [
        (True, "problem understanding"),
        (False, "reversing operation"),
        (False, "critical thinking"),
    ]
    assert {pair.b for pair in load("banking77", tmp_path) if not pair.same} == {
        "My card is lost",
        "My card is late",
    }
    assert [pair.b for pair in load("xquad", tmp_path)] == [
        "What happened in 1990?",
        "Năm 1991 có gì?",
    ]
