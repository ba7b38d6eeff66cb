"""What only the written form tells: capitals, quotes, links, identifiers and code.

Plain functions of the prose of one text: no model, no clock, no I/O, no logging.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from cache_proxy import lexicon, wording

__all__ = ["capitals", "code", "in_words", "literals"]

_SPAN = re.compile(r"`([^`\n]+)`")
# Here and below a pattern that begins with plain signs is found without trying every place.
_QUOTED = re.compile(r"\"([^\"\n]{2,})\"|'(?<!\w')([^'\n]{2,})'(?!\w)")
# Bounded and possessive where they repeat: a hostile prompt must not cost more than its length.
_LINK = re.compile(
    r"(?:https?://|www\.)[^\s<>\"')]+[^\s<>\"').,;:?!]"
    r"|(?<![\w.+-])[\w.+-]+@[\w-]+(?:\.[\w-]+)+"
)
_IDENTIFIER = re.compile(
    r"\b(?:\w+_\w+|[a-z]+[A-Z]\w*|\w+(?:\.\w+){0,8}(?=\(\))"
    r"|(?=\w*[a-zA-Z])\w++(?:\.(?=\w*[a-zA-Z])\w++)+)\b"
)
_CODE = re.compile(
    r"(?<![\w-])--?[A-Za-z][\w-]*"  # flags
    r"|</?\w+>|\\\w|\$(?!\d)\w*[A-Za-z]\w*"  # tags, escapes, variables
    r"|(?<![cC])(?:[=!<>]=+|[<>]{2,}|&&|\|\||[-=]>|:=|\+\+|[-+*/%]=|\*\*|//(?!\S*\.))"
    r"|[=<>^|×÷√](?=\s*[\w(])|(?<=[\w)])\s*[+*](?=\s*[\w(])|(?<=[\d)])\s+[-/](?=\s+[\d(])"
    r"|(?<=\d)!(?=\s*[?=*/+)-])|(?:is|of|calculate|compute|evaluate) \d+!(?![=!])"  # 5!
)
# Cheap looks first: most prompts are prose.
_MAYBE_IDENTIFIER = re.compile(
    r"[_(.A-Z](?:(?<=_)|(?<=\()(?=\))|(?<=\w\.)(?=\w*[a-zA-Z])|(?<=[a-z][A-Z]))"
)
_SIGN = re.compile(r"[-=<>^|×÷√\\$&*+/!]")
_MAYBE_CODE = re.compile(r"[=<>^|×÷√\\&*+]|\$\w*[A-Za-z]|(?<!\w)-|/[/\s]|\d!")
# Function words in lower case, names in capitals: "Go", "May", "vitamin A".
_TELLING_CASE = re.compile(
    r"US(?<=\bUS)\b|Go(?<=[a-z,] Go)(?=[\s?.,]|$)|BC(?<=\d BC)\b"
    r"|May(?<=[a-z,\d] May)\b|may(?<=\bin may)\b|May(?<=\bMay)(?= \d)"
    r"|A(?<=[a-z] A)(?=[?.,;:]|$| [a-z])"
)
# "Henry VIII", "World War II"; a lone I, V or X is one only behind what is counted so.
_ROMAN = re.compile(
    r"(?<=[a-z] )(?:X{1,3}(?:IX|IV|V?I{1,3}|V)|IX|IV|VI{1,3}|I{2,3})\b"
    r"|(?<=\bWar )I\b|(?<=\b[Tt]ype )[IV]\b|(?<=\b[Pp]hase )[IV]\b|(?<=\b[Pp]art )[IVX]\b"
    r"|(?<=\bElizabeth )I\b|(?<=\bCharles )[IVX]\b|(?<=\bJames )[IV]\b|(?<=\bGeorge )[IV]\b"
    r"|(?<=\bNapoleon )I\b|(?<=\bWilliam )[IV]\b"
)
_ROMAN_DIGITS = {"I": 1, "V": 5, "X": 10}
_MAYBE_TELLING = ("US", "Go", "BC", "May", "in may", " A")
_MAYBE_ROMAN = (
    "II", "IV", "IX", "VI", "XI", "XV", "XX", "War I", "ype I", "ype V", "hase I", "hase V",
    "art I", "art V", "art X", "abeth I", "les I", "les V", "les X", "mes I", "mes V", "rge I",
    "rge V", "eon I", "iam I", "iam V",
)  # fmt: skip
_MAYBE_KEYWORD = ("ALL", "ANY", "NOT")
# "UNION ALL", "NOT NULL": function words that only capitals make part of a language.
_KEYWORD = re.compile(r"\b[A-Z]{2,} (?:ALL|ANY|NOT)\b|\b(?:ALL|ANY|NOT) [A-Z]{2,}\b")
_IN_CAPITALS = {
    "US": "U.S",
    "Go": "golang",
    "BC": "bce",
    "May": "maymonth",
    "may": "maymonth",
    "A": "lettera",
}
_BEGINNING = re.compile(r"[^\w\n]{0,8}(?=\w)")
_SENTENCE = re.compile(r"[.?!:;\n](?:(?<!\n)\s{1,8}|(?<=\n)\s{0,40})[^\w\n]{0,8}(?=\w)")
_NOT_A_NAME = frozenset(["e.g", "i.e", "a.m", "p.m", "u.s", "u.k", "u.s.a", "etc", "ph.d"])


def in_words(prose: str) -> tuple[str, str]:
    """With roman numbers in digits; and with other words too for those that only capitals tell from
    little ones."""
    # Where roman numbers are what is asked about, they stay.
    roman = any(x in prose for x in _MAYBE_ROMAN) and "oman " not in prose
    spelt = _ROMAN.sub(_in_digits, prose) if roman else prose
    if prose.isupper() or not any(sign in prose for sign in _MAYBE_TELLING):
        return spelt, spelt
    return spelt, _TELLING_CASE.sub(_told_apart, spelt)


def _told_apart(found: re.Match[str]) -> str:
    return _IN_CAPITALS[found.group()]


def _in_digits(found: re.Match[str]) -> str:
    values = [_ROMAN_DIGITS[letter] for letter in found.group()]
    return str(sum(-x if x < y else x for x, y in zip(values, (*values[1:], 0), strict=True)))


def capitals(prose: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names told by their capitals, and acronyms; none where capitals are mere style."""
    capital = _capitalised(prose)
    if len(capital) > 3 and _mostly(capital, prose):
        return frozenset(), frozenset()
    starts = {match.end() for match in _SENTENCE.finditer(prose)}
    if beginning := _BEGINNING.match(prose):
        starts.add(beginning.end())
    names: set[str] = set()
    acronyms: set[str] = set()
    for at, word in capital:
        if word.isupper() and len(word) > 1:
            acronyms.add(word.lower())
        # The F of "72 F" is a unit.
        elif (
            at in starts
            or (len(word) == 1 and prose[at - 2 : at - 1].isdigit())
            or word == "I"
            or word.startswith("I'")
        ):
            continue
        names.update(map(lexicon.label, _plain(word)))
    return frozenset(names), frozenset(acronyms)


def _capitalised(prose: str) -> list[tuple[int, str]]:
    """Where the words that begin with a capital stand; most chunks of text hold none."""
    found: list[tuple[int, str]] = []
    at = 0
    for chunk in prose.split():
        if chunk.islower():
            continue
        at = prose.index(chunk, at)
        if chunk.isalpha():
            if chunk[0].isupper():
                found.append((at, chunk))
        else:
            told = wording.TOKEN.finditer(chunk)
            found += [(at + word.start(), word[0]) for word in told if word[0][0].isupper()]
        at += len(chunk)
    return found


def _mostly(capital: Sequence[tuple[int, str]], prose: str) -> bool:
    """Whether more than half of the words are these; the plain ones are counted first."""
    most = 2 * len(capital)
    return most > sum(map(str.isalpha, prose.split())) and most > len(wording.TOKEN.findall(prose))


def _plain(word: str) -> list[str]:
    return [part for part in wording.expand(word.lower()) if part not in lexicon.UNTOLD]


def literals(prose: str) -> Iterator[str]:
    """Quotes, links, file names and identifiers, folded."""
    if '"' in prose or "'" in prose:
        for quoted in _QUOTED.finditer(prose):
            yield wording.fold(quoted.group(1) or quoted.group(2)).strip(" .,?!")
    if "@" in prose or "://" in prose or "www." in prose:
        for link in _LINK.finditer(prose):
            yield link.group().lower()
    if not _MAYBE_IDENTIFIER.search(prose):
        return
    for found in _IDENTIFIER.finditer(prose):
        word = found.group().lower()
        if word not in lexicon.NAMES and word not in _NOT_A_NAME:
            yield word


def code(prose: str) -> Iterator[str]:
    """Spans, operators, flags, tags and the like, as they are written."""
    if any(word in prose for word in _MAYBE_KEYWORD) and not prose.isupper():
        yield from _KEYWORD.findall(prose)
    if "`" in prose:
        for span in _SPAN.finditer(prose):
            yield " ".join(span.group(1).split())
        prose = _SPAN.sub(" ", prose)
    if not _SIGN.search(prose) or not _MAYBE_CODE.search(prose):
        return
    for found in _CODE.finditer(prose):
        yield found.group().strip()
