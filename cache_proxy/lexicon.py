"""The word lists, read once into constant tables; wording and guards look things up here.

Nothing but tables: no judgement, no text of a request, no state after import.
In the files `#` opens a comment line and `_` joins the words of a phrase (a blank in the tables).
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from functools import lru_cache
from importlib.resources import files
from itertools import permutations

__all__ = [
    "ANTONYMS",
    "BARE_VIETNAMESE",
    "BEFORE_ME",
    "BEFORE_VERB",
    "CLAUSE",
    "CONTRACTIONS",
    "DIRECTIONS",
    "ENGLISH_STOP",
    "FORM",
    "FORM_PHRASES",
    "FRAMES",
    "JOINERS",
    "KIN",
    "LOOKALIKES",
    "LOOSE_UNITS",
    "MARKERS",
    "MODALITY",
    "MODALITY_PHRASES",
    "NAMES",
    "NEGATORS",
    "NOT_NOW",
    "NO_CONTENT",
    "NUMBERS",
    "OPENINGS",
    "OTHER_STOP",
    "PARTICIPLES",
    "PARTICLES",
    "PARTIES",
    "PARTS",
    "PHRASES",
    "PLAIN",
    "POINTERS",
    "QUANTITY",
    "QUANTITY_PHRASES",
    "QUESTION",
    "QUESTION_PHRASES",
    "RARITY",
    "SHORT_OPENINGS",
    "STOP",
    "SUPERLATIVES",
    "SYNONYMS",
    "TENSE",
    "TENSE_PHRASES",
    "TIMELY",
    "TIMELY_PHRASES",
    "UNITS",
    "UNTOLD",
    "VERBS",
    "VIETNAMESE_NUMBERS",
    "VIETNAMESE_STOP",
    "WHOLE_TURNS",
    "bare",
    "label",
    "misspelt",
    "stem",
]

# Words kept with their stems at most; a request's words repeat those of others.
_KEPT_WORDS = 16_384
# Shorter words are one slip away from too many others.
_SHORTEST_SLIP = 4
# Two rare words are two words, unless they are as long as this and two letters changed places.
_LONG = 7
# Letters that make another word at the end of one: sugar, sugary.
_ENDINGS = frozenset("ydrsnt")
_VOWELS = frozenset("aeiouy")
_BARE = str.maketrans({"đ": "d", "Đ": "D"})


@lru_cache(_KEPT_WORDS)
def stem(word: str) -> str:
    """The word without its common English endings; a label for comparing, not a word.

    British and American spellings and doubled letters fall together. Over-merging is possible
    and harmless here: it only ever makes two words count as equal when both were shortened.
    """
    if len(word) < 4 or not word.isascii() or not word.isalpha():
        return word
    if len(word) == 4 and word[1:] in ("ies", "ied"):
        word = word[:-1]  # dies, tied
    for ending, put in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch"), ("xes", "x")):
        if word.endswith(ending):
            word = word[: -len(ending)] + put
            break
    else:
        if word.endswith("s") and word[-2] not in "sui":
            word = word[:-1]
    if word.endswith("ied"):
        word = word[:-3] + "y"
    for ending in ("ing", "ed"):
        rest = word[: -len(ending)]
        if word.endswith(ending) and len(rest) > 2 and _VOWELS & set(rest):
            word = rest
            break
    if len(word) > 5 and word.endswith("ly"):
        word = word[:-2]
    word = word.removesuffix("e") if len(word) > 3 else word
    if len(word) > 3 and word[-1] == word[-2]:
        word = word[:-1]
    if len(word) > 5 and word.endswith("is"):
        word = word[:-2] + "iz"
    if len(word) > 4 and "our" in word[2:]:
        word = word[:2] + word[2:].replace("our", "or")
    if len(word) > 3 and word.endswith(("tr", "br")):
        word = word[:-1] + "er"
    return word


@lru_cache(_KEPT_WORDS)
def label(word: str) -> str:
    """What the word counts as: a known name's first spelling, a synonym's stem or its own."""
    if word in NAMES and word not in STOP:
        return NAMES[word]
    short = stem(word)
    return SYNONYMS.get(short, short)


def misspelt(one: str, other: str) -> bool:
    """Whether one is the other with one slip, and no word itself: delivery, delivry."""
    if one in LOOKALIKES or other in LOOKALIKES:
        return False
    if _known(one) == _known(other):
        return not _known(one) and len(one) >= _LONG and _two_swapped(one, other)
    return any(_one_slip(one, word) for word in MEMBERS.get(other, (other,))) or any(
        _one_slip(word, other) for word in MEMBERS.get(one, (one,))
    )


def _known(word: str) -> bool:
    return word in RARITY or word in SYNONYMS or word in MEMBERS


def _two_swapped(one: str, other: str) -> bool:
    at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), len(one))
    turned = one[:at] + one[at : at + 2][::-1] + one[at + 2 :]
    return at > 0 and one != other and turned == other


def _one_slip(one: str, other: str) -> bool:
    """One letter left out, put in, changed, or two neighbours that changed places."""
    short, long = sorted((one, other), key=len)
    if len(short) < _SHORTEST_SLIP or len(long) - len(short) > 1 or one[0] != other[0]:
        return False
    if not (one.isalpha() and other.isalpha()) or (long[:-1] == short and long[-1] in _ENDINGS):
        return False
    at = next((i for i, letter in enumerate(short) if letter != long[i]), len(short))
    if len(short) < len(long):
        return short[at:] == long[at + 1 :]
    return short[at + 1 :] == long[at + 1 :] or (
        short[at : at + 2] == long[at : at + 2][::-1] and short[at + 2 :] == long[at + 2 :]
    )


def bare(text: str) -> str:
    """The text without Vietnamese (or any combining) marks."""
    marked = unicodedata.normalize("NFD", text.translate(_BARE))
    return "".join(letter for letter in marked if not unicodedata.combining(letter))


def _words(line: str) -> list[str]:
    return [word.replace("_", " ") for word in line.split()]


def _lines(*names: str) -> list[str]:
    folder = files("cache_proxy") / "words"
    read = ((folder / f"{name}.txt").read_text(encoding="utf-8") for name in names)
    lines = (
        unicodedata.normalize("NFC", line).strip() for text in read for line in text.split("\n")
    )
    return [line for line in lines if line and not line.startswith("#")]


def _set(*names: str) -> frozenset[str]:
    return frozenset(word for line in _lines(*names) for word in _words(line))


def _groups(*names: str, label_is_member: bool = True) -> dict[str, str]:
    table: dict[str, str] = {}
    for line in _lines(*names):
        label, *members = _words(line)
        for member in [label, *members] if label_is_member else members:
            table.setdefault(member.strip("."), label.strip("."))
    return table


def _antonyms() -> dict[str, frozenset[str]]:
    table: dict[str, set[str]] = {}
    plain = [tuple(_words(line)) for line in _lines("en.antonyms", "vi.antonyms")]
    unmarked = [tuple(map(bare, _words(line))) for line in _lines("vi.antonyms")]
    for one, other in plain + [pair for pair in unmarked if pair[0] != pair[1]]:
        left, right = label(one), label(other)
        table.setdefault(left, set()).add(right)
        table.setdefault(right, set()).add(left)
    return {word: frozenset(words - {word}) for word, words in table.items()}


def _synonyms() -> dict[str, str]:
    table = {stem(word): stem(told) for word, told in _groups("en.synonyms", "vi.synonyms").items()}
    return {word: _last(told, table) for word, told in table.items()}


def _last(told: str, table: Mapping[str, str]) -> str:
    """ "talk speak", "speak spoken": spoken is talk."""
    while table.get(told, told) != told:
        told = table[told]
    return told


def _members() -> dict[str, tuple[str, ...]]:
    table: dict[str, set[str]] = {}
    for word, told in SYNONYMS.items():
        table.setdefault(told, {told}).add(word)
    return {told: tuple(sorted(words)) for told, words in table.items()}


def _kin() -> frozenset[tuple[str, str]]:
    lines = ([label(word) for word in _words(line)] for line in _lines("en.kin"))
    return frozenset(pair for line in lines for pair in permutations(line, 2))


def _rarity() -> dict[str, float]:
    return {
        word: float(value) for value, *words in map(_words, _lines("en.rarity")) for word in words
    }


def _units() -> tuple[dict[str, str], frozenset[str]]:
    table: dict[str, str] = {}
    loose: set[str] = set()
    for line in _lines("en.units"):
        label, *members = _words(line.lstrip("~"))
        for member in (label, *members):
            table.setdefault(member.strip("."), label)
        if line.startswith("~"):
            loose.add(label)
    return table, frozenset(loose)


def _openings(tables: Iterable[Iterable[str]]) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """First word -> the phrases it opens, longest first, for a greedy match over tokens."""
    found: dict[str, set[tuple[str, ...]]] = {}
    for table in tables:
        for entry in table:
            words = tuple(entry.split())
            if len(words) > 1:
                found.setdefault(words[0], set()).add(words)
    return {first: tuple(sorted(some, key=len, reverse=True)) for first, some in found.items()}


CONTRACTIONS: Mapping[str, tuple[str, ...]] = {
    line.split()[0]: tuple(line.split()[1:]) for line in _lines("en.contractions")
}
ENGLISH_STOP = _set("en.stop")
VIETNAMESE_STOP = _set("vi.stop")
BARE_VIETNAMESE = _set("vi.bare")
OTHER_STOP = _set("other.stop") - ENGLISH_STOP
STOP = ENGLISH_STOP | VIETNAMESE_STOP
PLAIN = _set("en.plain", "vi.plain")
UNTOLD = STOP | PLAIN
MARKERS = _set("en.markers", "vi.markers")
JOINERS = frozenset(["and", "or", "vs", "versus", "và", "hay", "hoặc"])
# What carries no question.
NO_CONTENT = UNTOLD | MARKERS | JOINERS
BEFORE_VERB = _set("en.before_verb")
VERBS = _set("en.verbs")
BEFORE_ME = _set("en.objects")
CLAUSE = _set("en.clause")
DIRECTIONS = _set("en.directions", "vi.directions")
POINTERS = _set("en.pointers", "vi.pointers")
NOT_NOW = _set("en.not_now")
PARTICLES = _set("vi.particles")
NEGATORS = _set("en.negators", "vi.negators")
NAMES: Mapping[str, str] = _groups("en.names", "vi.names")
UNITS, LOOSE_UNITS = _units()
NUMBERS: Mapping[str, str] = dict(line.split() for line in _lines("en.numbers"))
VIETNAMESE_NUMBERS: Mapping[str, str] = dict(line.split() for line in _lines("vi.numbers"))
SYNONYMS: Mapping[str, str] = _synonyms()
# A label and all that count as it.
MEMBERS: Mapping[str, tuple[str, ...]] = _members()
# Keyed by label, so that "decreased" meets "increasing".
ANTONYMS: Mapping[str, frozenset[str]] = _antonyms()
KIN = _kin()
LOOKALIKES = _set("en.lookalikes")
FRAMES = _openings([_set("en.frames")])
FORM: Mapping[str, str] = _groups("en.form", "vi.form", label_is_member=False)
TIMELY = _set("en.timely", "vi.timely") | {bare(phrase) for phrase in _set("vi.timely")}
_TURNS = _lines("en.anaphora", "vi.anaphora")
WHOLE_TURNS = frozenset(turn for turn in _TURNS if turn[-1] not in ".~")
OPENINGS = tuple(turn.removesuffix("...") for turn in _TURNS if turn.endswith("..."))
SHORT_OPENINGS = tuple(turn.removesuffix("~") for turn in _TURNS if turn.endswith("~"))
TIMELY_PHRASES = _openings([TIMELY])
FORM_PHRASES = _openings([FORM])
QUESTION: Mapping[str, str] = _groups("en.question", "vi.question", label_is_member=False)
QUESTION_PHRASES = _openings([QUESTION])
MODALITY: Mapping[str, str] = _groups("en.modality", "vi.modality", label_is_member=False)
MODALITY_PHRASES = _openings([MODALITY])
QUANTITY: Mapping[str, str] = _groups("en.quantity", "vi.quantity", label_is_member=False)
QUANTITY_PHRASES = _openings([QUANTITY])
TENSE: Mapping[str, str] = _groups("en.tense", "vi.tense", label_is_member=False)
TENSE_PHRASES = _openings([TENSE])
RARITY: Mapping[str, float] = _rarity()
PARTICIPLES = _set("en.participles")
PARTS = _set("en.parts")
PARTIES = frozenset(map(label, _set("en.parties")))
SUPERLATIVES: Mapping[str, str] = _groups("en.superlatives")
PHRASES = _openings(
    [
        _set("en.antonyms", "vi.antonyms"),
        ANTONYMS,
        NAMES,
        NEGATORS,
        SYNONYMS,
        _groups("en.synonyms", "vi.synonyms"),
    ]
)
