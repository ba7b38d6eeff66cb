"""What a text says about itself: its words, its language, whether it leans on now or on before.

Plain functions of the text, English and Vietnamese: no model, no clock, no I/O, no logging.
Coarse on purpose; when in doubt each errs to the side that costs a hit, not a wrong answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

from cache_proxy import lexicon

__all__ = [
    "TOKEN",
    "Openings",
    "anaphoric",
    "content_words",
    "expand",
    "fold",
    "join",
    "language",
    "language_of",
    "phrases",
    "straight",
    "time_bound",
    "tokens",
    "unframed",
]

Openings = Mapping[str, tuple[tuple[str, ...], ...]]

_STRAIGHT = str.maketrans({"’": "'", "‘": "'", "ʼ": "'", "“": '"', "”": '"', "„": '"', "−": "-"})
# A word with what is fastened to it: 7am, 500mg, v1.2, 1,000, node.js, c++, ord-48213, don't.
TOKEN = re.compile(
    r"-?[$€£₫#]?\d\w*(?:[.,:/'-]\w+)*(?:°[CFcf]?|%)?"
    r"|(?:(?<![\w.])\.(?=[a-z]))?\w+(?:[.'@/-]\w+)*(?:\+\+|\#)?"
)
_ENDINGS: Mapping[str, str] = {
    "re": "are", "ve": "have", "ll": "will", "d": "would", "m": "am",
}  # fmt: skip
_GLUED = frozenset({"non", "re", "un", "e", "pre", "anti", "de", "dis", "im", "in"})
_OTHER_SCRIPT = re.compile(
    "[\u0370-\u1cff\u2e80-\ua4cf\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff\ufb1d-\ufdff\ufe70-\ufefc]"
)
_LETTER = re.compile(r"[^\W\d_]")
_VIETNAMESE_LETTER = re.compile("[ăđơưạảấầẩẫậắằẳẵặẹẻẽếềểễệỉịọỏốồổỗộớờởỡợụủũứừửữựỳỵỷỹ]")
# Syllables that only Vietnamese typed without marks begins so.
_BARE_SYLLABLE = re.compile(r"(?:ngh?|nh|kh)[aeiouy]{1,3}(?:ng|nh|ch|[cmnpt])?")
# With one of these a courtesy may be what is asked about.
_ABOUT_WORDS = frozenset([
    "translate", "translation", "say", "phrase", "word", "words", "sentence", "mean", "means",
    "meaning", "synonym", "proofread", "rewrite", "rephrase", "correct", "reply", "respond",
    "spell", "pronounce", "write", "lyrics", "song",
])  # fmt: skip
_BEFORE_A_FRAME = (("hi",), ("hello",), ("hey",), ("please",), ("so",), ("but",), ("and",))
_BARE_STARTS = ("ng", "nh", "kh")
_QUOTED = re.compile(r"\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)")
# Chunks of text kept with the words read from them; a request's words repeat those of others.
_KEPT_CHUNKS = 16_384
_LONGEST_KEPT = 40  # characters


def straight(text: str) -> str:
    """The text in NFC, its quotes and minus signs straight."""
    if text.isascii():
        return text
    return unicodedata.normalize("NFC", text).translate(_STRAIGHT)


def fold(text: str) -> str:
    """The text in NFC and lower case, quotes straight, white space single, ends trimmed."""
    return " ".join(straight(text).lower().split())


def expand(word: str) -> tuple[str, ...]:
    """One lower-case token as the words it stands for: "don't" is do, not; "4-inch" is 4, inch."""
    if word.isalpha() and word not in lexicon.CONTRACTIONS:
        return (word,)
    if word in lexicon.CONTRACTIONS:
        return lexicon.CONTRACTIONS[word]
    if "'" in word:
        return _unfasten(word)
    if word.isalnum() or "@" in word:
        return (word,)
    if word[:1].isdigit() or word[0] == "-":
        number, _, rest = word.lstrip("-").partition("-")
        return (
            (number, *rest.split("-"))
            if rest[:1].isalpha() and number.replace(".", "").isdigit()
            else (word,)
        )
    if any(letter.isdigit() for letter in word):
        # "carbon-14" and "carbon 14"; not "ord-48213-x".
        first, dash, rest = word.partition("-")
        named = dash and len(first) > 2 and first.isalpha() and rest.isdigit()
        return (first, rest) if named else (word,)
    return tuple(part for half in word.split("/") for part in _unhyphen(half))


def _unfasten(word: str) -> tuple[str, ...]:
    while word.endswith("'s") and "'" in word[:-2]:
        word = word[:-2]
    base, _, tail = word.rpartition("'")
    if tail == "t" and base.endswith("n"):
        return (base[:-1], "not")
    if tail in _ENDINGS:
        return (base, _ENDINGS[tail])
    return expand(base) if tail == "s" and base else tuple(part for part in word.split("'") if part)


def _unhyphen(word: str) -> tuple[str, ...]:
    first, dash, rest = word.partition("-")
    if rest == "free":
        return ("no", first)
    if dash and first in _GLUED:
        return (first + rest.replace("-", ""),)
    return tuple(part for part in word.split("-") if part)


def tokens(text: str) -> tuple[str, ...]:
    """The lower-case words of a text in order, contractions written out, punctuation gone."""
    return tuple(
        word
        for chunk in straight(text).lower().split()
        for word in (_kept_words(chunk) if len(chunk) <= _LONGEST_KEPT else _words(chunk))
    )


def _words(chunk: str) -> tuple[str, ...]:
    """The words between two blanks; no token reaches over one."""
    return tuple(word for token in TOKEN.findall(chunk) for word in expand(token))


_kept_words = lru_cache(_KEPT_CHUNKS)(_words)


def phrases(words: Sequence[str], openings: Openings) -> Iterator[tuple[int, str]]:
    """Position and phrase, the words joined by a blank, for every listed phrase in `words`."""
    if openings.keys().isdisjoint(words):
        return
    for at, word in enumerate(words):
        if word not in openings:
            continue
        for phrase in openings[word]:
            if tuple(words[at : at + len(phrase)]) == phrase:
                yield at, " ".join(phrase)
                break


def unframed(words: Sequence[str]) -> Sequence[str]:
    """The words less what only frames them: "quick question", "thanks in advance"."""
    found = [(at, at + frame.count(" ") + 1) for at, frame in phrases(words, lexicon.FRAMES)]
    if not found or not _ABOUT_WORDS.isdisjoint(words):
        return words
    first, last = 0, len(words)
    for start, end in found:
        if start == first or words[first:start] in _BEFORE_A_FRAME:
            first = end
    for start, end in reversed(found):
        if end == last:
            last = start
    # Nothing but frames: then they are what is asked.
    return words[first:last] if first < last else words


def join(words: Sequence[str]) -> list[str]:
    """The words with listed phrases ("new zealand", "most expensive") made one word each."""
    starts = dict(phrases(words, lexicon.PHRASES))
    if not starts:
        return list(words)
    joined: list[str] = []
    free = 0
    for at, word in enumerate(words):
        if at < free:
            continue
        phrase = starts.get(at, word)
        free = at + phrase.count(" ") + 1
        joined.append(phrase)
    return joined


def content_words(text: str) -> tuple[str, ...]:
    """The words that carry the question, in order: tokens without function words."""
    return tuple(word for word in tokens(text) if word not in lexicon.STOP)


def language(text: str) -> str:
    """ "en", "vi", "other", or "" where code, numbers and names leave too little to judge by."""
    return language_of(text, tokens(text))


def language_of(text: str, words: Sequence[str]) -> str:
    """`language`, for a caller that has the text's tokens already."""
    if not text.isascii():
        foreign = len(_OTHER_SCRIPT.findall(text))
        if foreign and 2 * foreign > len(_LETTER.findall(text)):
            return "other"
    return _latin_language(words)


def _latin_language(words: Sequence[str]) -> str:
    marked = [word for word in words if not word.isascii()]
    english = sum(map(lexicon.ENGLISH_STOP.__contains__, words))
    unmarked = len(
        {
            word
            for word in words
            if word in lexicon.BARE_VIETNAMESE
            or (word.startswith(_BARE_STARTS) and _BARE_SYLLABLE.fullmatch(word))
        }
    )
    vietnamese = sum(1 for word in marked if _VIETNAMESE_LETTER.search(word))
    vietnamese += sum(map(lexicon.VIETNAMESE_STOP.__contains__, marked))
    if vietnamese > english or (unmarked > 1 and unmarked > english):
        return "vi"
    foreign = sum(map(lexicon.OTHER_STOP.__contains__, words))
    if foreign > english and foreign + bool(marked) > 1:
        return "other"
    return "en" if english else ""


def time_bound(text: str) -> bool:
    """Whether the right answer depends on when it is asked: "today", "latest", "hôm nay"."""
    words = tokens(_QUOTED.sub(" ", fold(text)))
    if not lexicon.TIMELY.isdisjoint(words):
        return True
    if any(True for _ in phrases(words, lexicon.TIMELY_PHRASES)):
        return True
    return _says_now(words) or _says_current(words)


def _says_now(words: Sequence[str]) -> bool:
    # "Now explain X" opens a turn, "now that" gives a reason and "and now it is gone" tells what
    # happened; none asks about the moment.
    return any(
        word == "now"
        and at > 0
        and words[at - 1] not in _TELLING_ON
        and (*words[at + 1 : at + 2], "")[0] not in _AFTER_NOW
        for at, word in enumerate(words)
    )


_TELLING_ON = frozenset(["and", "but", "so"])
_AFTER_NOW = frozenset(["that", "on", "then", "i", "it", "my", "we", "they"])


def _says_current(words: Sequence[str]) -> bool:
    """ "Current CEO" is about now; "electric current" and "current directory" are not."""
    if "current" not in words[:-1]:
        return False
    return lexicon.NOT_NOW.isdisjoint(words)


def anaphoric(text: str) -> bool:
    """Whether the turn means nothing without the turns before it: "and the second one?"."""
    words = tokens(text)
    turn = " ".join(words)
    if turn in lexicon.WHOLE_TURNS or (turn + " ").startswith(lexicon.OPENINGS):
        return True
    content = sum(1 for word in words if word not in lexicon.STOP)
    if content < 2 and not lexicon.POINTERS.isdisjoint(words):
        return True
    return content <= 2 and (turn + " ").startswith(lexicon.SHORT_OPENINGS)
