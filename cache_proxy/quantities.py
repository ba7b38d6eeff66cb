"""How much, how many and when: the numbers of a text with their units, in one spelling.

"Two weeks", "14 days"; "1/2 kg", "half a kilo"; "noon", "12 pm". Plain functions of the words of
one text, English and Vietnamese: no model, no clock, no I/O, no logging.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from fractions import Fraction

from cache_proxy import lexicon

__all__ = ["between", "numbers"]

_NUMERIC = re.compile(r"(-?)([$€£₫#]?)(\d[\d.,:/']*)([a-zµ°%]*)")
_LONGEST = 15  # digits; what goes on is no number
_RANGE = re.compile(r"\d{1,3}-\d{1,3}")
_GROUPED = re.compile(r"\d{1,3}(?:[,']\d{3})+(?:\.\d+)?")
_GROUPED_BY_POINTS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}")
_VIETNAMESE_GROUPED = re.compile(r"\d{1,3}(?:\.\d{3})+")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")
_NO_CENTS = re.compile(r"\.0+$")
_MAYBE_NUMBER = re.compile("[0-9\u0080-\U0010ffff]")
_ORDINAL = frozenset(["st", "nd", "rd", "th"])
_NEXT_WORD_UNITS = frozenset("fcmglw")
_ENDS = frozenset(["from", "to"])
_HALVES = ("am", "pm")
_HALF_OF_DAY: Mapping[tuple[str, ...], str] = {
    ("in", "the", "morning"): "am",
    ("in", "the", "afternoon"): "pm",
    ("in", "the", "evening"): "pm",
}
_MONTHS = frozenset(map(lexicon.label, [
    "january", "february", "march", "april", "maymonth", "june", "july", "august", "september",
    "october", "november", "december",
]))  # fmt: skip
_ARTICLES = ("a", "an")
_AND_A_HALF = ("and", "a", "half")
_MAY_COUNT = lexicon.NUMBERS.keys() | _ARTICLES
_FRACTION = re.compile(r"[1-9]/[2-9]")
_PLAIN_NUMBER = re.compile(r"\d{1,12}(?:\.\d{1,6}|/[1-9]\d{0,5})?")
_SMALLER: Mapping[str, Mapping[str, str]] = {
    "s": {"ms": "1/1000", "min": "60", "h": "3600", "day": "86400", "week": "604800"},
    "month": {"year": "12", "decade": "120", "century": "1200"},
    "mg": {"mcg": "1/1000", "g": "1000", "kg": "1000000"},
    "m": {"mm": "1/1000", "cm": "1/100", "km": "1000"},
    "ml": {"l": "1000"},
    "inch": {"foot": "12", "yard": "36"},
    "w": {"kw": "1000"},
}
# Factor and smallest unit; what law and habit keep apart (a month and 30 days) stays apart.
_BASES: Mapping[str, tuple[Fraction, str]] = {
    unit: (Fraction(factor), base)
    for base, units in _SMALLER.items()
    for unit, factor in units.items()
}
_NOON = 12


def between(words: Sequence[str], *, vietnamese: bool) -> tuple[tuple[str, str], ...]:
    """The numbers that something runs from or to, each with its word."""
    found = []
    role = ""
    for at, word in enumerate(words):
        if word in lexicon.MARKERS:
            role = word
        value = _value(words, at, vietnamese=vietnamese)[0] if role in _ENDS else ""
        if value:
            found.append((value, role))
    return tuple(sorted(found))


def numbers(
    words: list[str], *, vietnamese: bool
) -> tuple[list[tuple[str, str]], list[str], tuple[tuple[str, str], ...]]:
    """The numbers with their units, the words that are no part of one, and what each counts."""
    found: list[tuple[str, str]] = []
    counted: list[tuple[str, str]] = []
    spelt = vietnamese or not lexicon.NUMBERS.keys().isdisjoint(words)
    if not spelt and not _MAYBE_NUMBER.search(" ".join(words)):
        return found, words, ()
    rest: list[str] = []
    counting = _MAY_COUNT if "half" in words else lexicon.NUMBERS.keys()
    at = 0
    while at < len(words):
        word = words[at]
        if word.isalpha() and word not in counting and not vietnamese:
            rest.append(word)
            at += 1
            continue
        if word in lexicon.NAMES or words[at : at + 2] == ["first", "time"]:
            rest.append(word)  # "2fa"; "for the first time" counts nothing
            at += 1
            continue
        value, unit, used = _number(words, at, vietnamese=vietnamese)
        at += used or 1
        if used and value.endswith("th") and _dates(words, at - used, at):
            value = value[:-2]  # "December 25th"
        if used:
            found.append((value, unit))
            counted.append((value, _thing(words[at]) if at < len(words) else ""))
        else:
            rest.append(word)
    return found, rest, tuple(counted)


def _dates(words: Sequence[str], at: int, after: int) -> bool:
    """Whether the ordinal there is a day of a month."""
    beyond = after + (words[after : after + 1] == ["of"])
    around = (*words[max(0, at - 1) : at], *words[beyond : beyond + 1])
    return any(lexicon.label(word) in _MONTHS for word in around)


def _thing(word: str) -> str:
    return "" if word in lexicon.NO_CONTENT or word in lexicon.NAMES else lexicon.label(word)


def _number(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str, int]:
    """Value, unit and how many words they took; 0 words when none begins here."""
    value, unit, used = _measure(words, at, vietnamese=vietnamese)
    return *_based(value, unit), used


def _measure(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str, int]:
    """As `_number`, in the unit that is named."""
    if words[at] in _ARTICLES:  # "an hour and a half"
        unit = _unit_word(words[at + 1]) if at + 1 < len(words) else ""
        whole = unit and tuple(words[at + 2 : at + 5]) == _AND_A_HALF
        return ("3/2", unit, 5) if whole else ("", "", 0)
    value, unit = _value(words, at, vietnamese=vietnamese)
    if not value:
        return "", "", 0
    used = 1
    while (
        len(value) <= _LONGEST and value.replace(".", "", 1).isdecimal() and at + used < len(words)
    ):
        # "two hundred and forty"
        joined = words[at + used] == "and" and value.endswith("00") and at + used + 1 < len(words)
        scaled = _scaled(value, words[at + used + joined], spelt_out=words[at].isalpha())
        if scaled is None:
            break
        value, used = scaled, used + 1 + joined
    if value.isdecimal() and tuple(words[at + used : at + used + 3]) == _AND_A_HALF:
        value, used = f"{2 * int(value) + 1}/2", used + 3
    if _FRACTION.fullmatch(value) and not unit:
        value, used = _part_of(value, words, at, used)
    half = _HALF_OF_DAY.get(tuple(words[at + used : at + used + 3]), "")
    if half and not unit and _clock(value, half):
        return _clock(value, half), "", used + 3
    if not unit and at + used < len(words):
        unit = _unit_word(words[at + used])
        used += bool(unit)
        # "375 degrees Fahrenheit" and "375 F" say the same.
        if unit == "degree" and at + used < len(words) and _unit_word(words[at + used]):
            unit = _unit_word(words[at + used])
            used += 1
    if unit == "%" and words[at + used : at + used + 1] == ["off"]:
        return value, "% off", used + 1
    if unit in _HALVES and _clock(value, unit):
        return _clock(value, unit), "", used
    return value, unit, used


def _part_of(value: str, words: Sequence[str], at: int, used: int) -> tuple[str, int]:
    """ "half a cup", "a quarter of an acre": little words up to the unit; "half a dozen" is 6."""
    little = 0
    while at + used + little < len(words) and words[at + used + little] in ("of", *_ARTICLES):
        little += 1
    following = "".join(words[at + used + little : at + used + little + 1])
    if little and _unit_word(following):
        return value, used + little
    scale = lexicon.NUMBERS.get(following, "")
    if little and scale.startswith("x"):
        return str(Fraction(value) * int(scale[1:])), used + little + 1
    return value, used


def _based(value: str, unit: str) -> tuple[str, str]:
    """In the smallest unit of its kind: 2 weeks are 14 days, half a kilo is 500 g."""
    if not unit or not _PLAIN_NUMBER.fullmatch(value):
        return value, unit
    factor, base = _BASES.get(unit, (Fraction(1), unit))
    return str(Fraction(value) * factor), base


def _value(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str]:
    word = words[at]
    if not word.isalpha() and any(letter.isdigit() for letter in word):
        return _digits(word, vietnamese=vietnamese)
    spelt = lexicon.NUMBERS.get(word) or (
        lexicon.VIETNAMESE_NUMBERS.get(word) if vietnamese else None
    )
    # "Which one is better" counts nothing; "one week" does.
    if not spelt or (word == "one" and not _counts(words, at + 1)):
        return "", ""
    return spelt.removeprefix("x"), ""


def _counts(words: Sequence[str], at: int) -> bool:
    """Whether the "one" before it counts: "one week", "one and a half"."""
    if at < len(words) and _unit_word(words[at]):
        return True
    if tuple(words[at : at + 3]) == _AND_A_HALF:
        return True
    # "between one and a hundred"
    end = "".join([*words[at + 1 : at + 3], ""][words[at + 1 : at + 2] == ["a"] :][:1])
    return words[at : at + 1] in (["and"], ["to"]) and (end.isdigit() or end in lexicon.NUMBERS)


def _digits(word: str, *, vietnamese: bool) -> tuple[str, str]:
    whole = _NUMERIC.fullmatch(word)
    if whole is None:
        plain = word.lstrip("-")
        if _RANGE.fullmatch(plain):
            return plain, ""
        plain = plain.replace("-", "")
        return (plain[1:], "") if re.fullmatch(r"v\d[\d.]*", plain) else (plain, "")
    sign, mark, digits, suffix = whole.groups()
    value = sign + _ungrouped(digits, vietnamese=vietnamese)
    if suffix in _ORDINAL:
        return value + "th", ""
    if suffix == "k":
        return _times(value, "1000"), mark
    return value, lexicon.UNITS.get(suffix, suffix) or lexicon.UNITS.get(mark, mark)


def _clock(value: str, half: str) -> str:
    """ "8" and "pm" is 20:00; "" when that is no hour."""
    hour, _, minute = value.partition(":")
    if len(hour) > 2 or not hour.isdecimal() or not 0 < int(hour) <= _NOON:
        return ""
    return f"{int(hour) % _NOON + (_NOON if half == 'pm' else 0)}:{minute or '00'}"


def _ungrouped(digits: str, *, vietnamese: bool) -> str:
    if digits.isdecimal():
        return digits
    points = _VIETNAMESE_GROUPED if vietnamese else _GROUPED_BY_POINTS
    if _GROUPED.fullmatch(digits):
        digits = digits.replace(",", "").replace("'", "")
    elif points.fullmatch(digits):
        digits = digits.replace(".", "")
    elif _DECIMAL_COMMA.fullmatch(digits):
        digits = digits.replace(",", ".")
    return _NO_CENTS.sub("", digits) if digits.count(".") == 1 and digits.endswith("00") else digits


def _scaled(value: str, word: str, *, spelt_out: bool) -> str | None:
    """ "two" + "hundred" is 200, "twenty" + "five" is 25; None when the word is no part of it."""
    spelt = lexicon.NUMBERS.get(word, "")
    if spelt.startswith("x"):
        return _times(value, spelt[1:])
    fits = spelt.isdigit() and spelt_out and len(spelt) < len(value)
    if fits and value.isdecimal() and int(value) % 10 ** len(spelt) == 0:
        return str(int(value) + int(spelt))
    return None


def _times(value: str, scale: str) -> str:
    try:
        return format((Decimal(value) * Decimal(scale)).normalize(), "f")
    except ArithmeticError:
        return f"{value}x{scale}"


def _unit_word(word: str) -> str:
    """The unit a word after a number stands for, or ""."""
    if len(word) == 1 and word not in _NEXT_WORD_UNITS and word.isascii():
        return ""
    return lexicon.UNITS.get(word, "")
