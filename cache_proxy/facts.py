"""What the guards compare: everything a text says that an answer hangs on, taken out once.

Plain functions of the text: no model, no clock, no I/O, no logging. A `Facts` is small, frozen
and made of strings and numbers only.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import pairwise

from cache_proxy import lexicon, wording

__all__ = ["Facts", "facts"]


@dataclass(frozen=True, slots=True)
class Facts:
    """One text, read for comparing. Words are stems, with synonyms and known names made one."""

    text: str  # folded, framing punctuation gone: equal here is equal altogether
    language: str
    words: frozenset[str]  # every word as written, lower case, phrases joined
    stems: frozenset[str]  # the same words as stems, phrases also in parts
    content: tuple[str, ...]  # stems that carry the question, in order, numbers taken out
    telling: frozenset[str]  # those of them that neither turn nor measure it
    roles: tuple[str, ...]  # the preposition each content word hangs on, "" for none
    hangs: tuple[int, ...]  # and which one of them in the text
    coordinated: frozenset[tuple[str, str]]  # neighbours joined by "and", "or", "vs"
    numbers: tuple[tuple[str, str], ...]  # value and unit, sorted
    units: frozenset[str]  # units named without a number
    negations: int
    names: frozenset[str]  # capitalised, as stems
    known: frozenset[str]  # names from the lists, whatever their case
    acronyms: frozenset[str]
    literals: frozenset[str]  # quotes, links, file names, identifiers; folded
    code: tuple[str, ...]  # operators, flags, tags, escapes and code spans, exact, sorted
    fences: tuple[str, ...]  # fenced blocks and indented lines, exact
    form: frozenset[str]
    question: frozenset[str]
    opens: str  # the first word where that is "why", or "is", "does": to be answered with "yes"
    modality: frozenset[str]  # of a yes-or-no question: leave, duty, advice, future
    quantity: frozenset[str]
    tense: frozenset[str]
    suffers: bool  # "me" is whom something is done to, and not only who wants to be told
    owners: frozenset[tuple[str, str]]  # "the bank's fee": bank, fee
    asks: str  # whether "who" or "which" is the "doer" or the one it is done to, the "other"
    counted: tuple[tuple[str, str], ...]  # each number as it comes and the word it stands before
    moment: str  # "past", "present", "perfect", "future": what the question's verb says


_INDENTED = re.compile(r"\n([ \t]+\S.*)")
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_SPAN = re.compile(r"`([^`\n]+)`")
_QUOTED = re.compile(r"\"([^\"\n]{2,})\"|(?<!\w)'([^'\n]{2,})'(?!\w)")
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
    r"|</?\w+>|\\\w|\$\w*[A-Za-z]\w*"  # tags, escapes, variables
    r"|(?<![cC])(?:[=!<>]=+|[<>]{2,}|&&|\|\||[-=]>|:=|\+\+|[-+*/%]=|\*\*|//(?!\S*\.))"
    r"|[=<>^|×÷√](?=\s*[\w(])|(?<=[\w)])\s*[+*](?=\s*[\w(])|(?<=[\d)])\s+[-/](?=\s+[\d(])"
    r"|(?<=\d)!(?=\s*[?=*/+)-])|(?:is|of|calculate|compute|evaluate) \d+!(?![=!])"  # 5!
)
# Cheap looks first: most prompts are prose.
_MAYBE_IDENTIFIER = re.compile(r"[_(]|\w\.\w|[a-z][A-Z]")
_MAYBE_CODE = re.compile(r"[=<>^|×÷√\\$&*+%]|(?<!\w)-|/[/\s]|\d!")
# Function words in lower case, names in capitals: "Go", "May", "vitamin A".
_TELLING_CASE = re.compile(
    r"\bUS\b|(?<=[a-z,] )Go(?=[\s?.,]|$)|(?<=\d )BC\b"
    r"|(?<=[a-z,\d] )May\b|(?<=\bin )may\b|\bMay(?= \d)"
    r"|(?<=[a-z] )A(?=[?.,;:]|$| [a-z])"
)
_MAYBE_TELLING = ("US", "Go", "BC", "ay", " A")
_IN_CAPITALS = {
    "US": "U.S",
    "Go": "golang",
    "BC": "bce",
    "May": "maymonth",
    "may": "maymonth",
    "A": "lettera",
}
_OWNER = re.compile(r"(\w+)'s (\w+)")
_SENTENCE = re.compile(r"(?:^|[.?!:;]\s{1,8}|\n\s{0,40})[^\w\n]{0,8}(?=\w)")
_NOT_A_NAME = frozenset(["e.g", "i.e", "a.m", "p.m", "u.s", "u.k", "u.s.a", "etc", "ph.d"])
_NUMERIC = re.compile(r"(-?)([$€£₫#]?)(\d[\d.,:/']*)([a-zµ°%]*)")
_ORDINAL = frozenset(["st", "nd", "rd", "th"])
_NEXT_WORD_UNITS = frozenset("fcmgl")
_JOINERS = frozenset(["and", "or", "vs", "versus", "và", "hay", "hoặc"])
_BE = (("is",), ("are",), ("was",), ("were",))
_NO_TERM = (("the",), ("my",), ("your",), ("our",), ("their",), ("this",), ("that",))
_HELPERS = (("you",), ("u",), ("someone",), ("somebody",), ("anyone",), ("anybody",))
_ME = frozenset(["me", "us"])
_DO = frozenset(["did", "does", "do"])
_WERE = frozenset(["is", "are", "was", "were", "been", "be", "being", "got"])
_MOMENTS: Mapping[str, str] = {
    "is": "present", "are": "present", "am": "present", "do": "present", "does": "present",
    "was": "past", "were": "past", "did": "past", "had": "past",
    "has": "perfect", "have": "perfect", "will": "future",
}  # fmt: skip
# The words among which the verb of a question stands: "at what age does".
_OPENING = 4
_DUTIES = frozenset([("have", "to"), ("has", "to"), ("need", "to"), ("needs", "to")])
_WHICH = frozenset(["what", "which", "when", "where", "who"])
_WHICH_ONE = (("who",), ("whom",), ("which",), ("what",))
_BY_WHOM = frozenset([("by", "whom"), ("by", "who"), ("by", "which"), ("by", "what")])
_HALVES = ("am", "pm")
_ACTS = frozenset(["help", "teach", "ask", "need", "want", "give", "show", "tell", "know"])
_NOON = 12
_BEFORE_A_KIND = frozenset([
    "the", "this", "that", "which", "each", "every", "any", "no", "another", "as", "than", "or",
    "can", "could", "should", "would", "will", "must", "do", "does", "did", "if", "when", "how",
    "what", "may", "might", "has", "is", "was", "where", "why",
])  # fmt: skip
_HOW_LONG = frozenset(
    ("many", unit) for unit in ["seconds", "minutes", "hours", "days", "weeks", "months", "years"]
)
_LONGEST_TERM = 2
_LONGEST_MODALITY = 6
_KEEP = frozenset(["keep", "keeps", "kept", "keeping"])
_LONGEST_KEEP = 7
# A clause hung on with one of these reaches over its own verb: "when it is bought used".
_SUBORDINATE = frozenset(["when", "if", "while", "unless", "until", "because", "after", "before"])
_NO_CONTENT = lexicon.UNTOLD | lexicon.MARKERS | _JOINERS
# What turns or measures a question is compared by guards of its own.
_TURNING = frozenset(
    lexicon.label(word)
    for phrase in (*lexicon.NEGATORS, *lexicon.QUANTITY)
    for word in (phrase, *phrase.split())
)
_QUESTION_PARTICLES = frozenset(["không", "chưa"])
_TAG_SUBJECTS = frozenset(["i", "you", "he", "she", "it", "we", "they"])


def facts(text: str) -> Facts:
    """Read one text; linear in its length."""
    clean = unicodedata.normalize("NFC", text).translate(wording.STRAIGHT)
    fences = tuple(map(str.strip, _FENCE.findall(clean))) if "```" in clean else ()
    prose = _FENCE.sub(" ", clean) if fences else clean
    if "\n " in prose or "\n\t" in prose:
        # Code needs no fence to be code: encoders do not see how far a line is indented.
        fences += tuple(_INDENTED.findall(prose.strip()))
    folded = wording.fold(clean)
    shouted = prose.isupper()
    telling = not shouted and any(sign in prose for sign in _MAYBE_TELLING)
    told = wording.tokens(_TELLING_CASE.sub(_told_apart, prose) if telling else prose)
    joined = wording.join(told)
    words = frozenset(joined)
    language = wording.language_of(clean, told)
    numbers, rest, counted = _numbers(joined, vietnamese=language == "vi")
    content, roles, hangs, coordinated = _structure(rest)
    names, acronyms = _capitals(prose)
    known = {lexicon.NAMES[word] for word in rest if _is_known(word)}
    return Facts(
        text=folded.strip(" .?!,;:\"'"),
        language=language,
        words=words,
        stems=frozenset(map(lexicon.label, words.union(told))) | known,
        content=content,
        telling=frozenset(content) - _TURNING,
        roles=roles,
        hangs=hangs,
        coordinated=coordinated,
        numbers=tuple(sorted(numbers)),
        units=frozenset(_strict_units(rest)),
        negations=_negations(joined),
        names=names,
        known=frozenset(known),
        acronyms=acronyms,
        literals=frozenset(_literals(prose)),
        code=tuple(sorted(_code(prose))),
        fences=fences,
        form=_labels(told, lexicon.FORM, lexicon.FORM_PHRASES),
        question=_question(told, content),
        opens=told[0] if told and (told[0] in _MOMENTS or told[0] == "why") else "",
        modality=_modality(told),
        quantity=_quantity(told),
        tense=_labels(told, lexicon.TENSE, lexicon.TENSE_PHRASES),
        suffers=not words.isdisjoint(_ME)
        and any(word in _ME and before not in lexicon.BEFORE_ME for before, word in pairwise(told)),
        owners=_owners(folded) if "'s " in folded else frozenset(),
        asks=_asks(told),
        counted=counted,
        moment=_moment(told),
    )


def _told_apart(found: re.Match[str]) -> str:
    return _IN_CAPITALS[found.group()]


def _is_known(word: str) -> bool:
    return word in lexicon.NAMES and word not in lexicon.STOP


def _labels(
    words: Sequence[str], table: Mapping[str, str], openings: wording.Openings
) -> frozenset[str]:
    single = {table[word] for word in words if word in table}
    return frozenset(single | {table[found] for _, found in wording.phrases(words, openings)})


def _quantity(words: Sequence[str]) -> frozenset[str]:
    labels = _labels(words, lexicon.QUANTITY, lexicon.QUANTITY_PHRASES)
    if "one" in words and any(
        word == "one" and before not in _BEFORE_A_KIND and after not in _NO_CONTENT
        for before, word, after in zip(("", *words), words, words[1:], strict=False)
    ):
        return labels | {"one"}
    return labels


def _question(words: Sequence[str], content: Sequence[str]) -> frozenset[str]:
    labels = _labels(words, lexicon.QUESTION, lexicon.QUESTION_PHRASES)
    if "many" in labels and any(pair in _HOW_LONG for pair in pairwise(words)):
        return frozenset(["long"])
    # "What is a closure?" wants a definition; "What is the price?" wants anything.
    if not labels and len(content) <= _LONGEST_TERM and _defines(words):
        return frozenset(["definition"])
    # The "how" in "how many" asks for no manner.
    return labels - {"manner"} if len(labels) > 1 else labels


def _defines(words: Sequence[str]) -> bool:
    return tuple(words[:1]) == ("what",) and words[1:2] in _BE and words[2:3] not in _NO_TERM


def _modality(words: Sequence[str]) -> frozenset[str]:
    """What a yes-or-no question opens with; "can you", "could someone" only ask politely."""
    start = next((at for at, word in enumerate(words) if word not in lexicon.PLAIN), len(words))
    opening = words[start : start + _LONGEST_MODALITY]
    if not opening or opening[1:2] in _HELPERS:
        return frozenset()
    if opening[0] in lexicon.MODALITY and opening[2:4] not in _DUTIES:
        return frozenset([lexicon.MODALITY[opening[0]]])
    found = next(wording.phrases(opening, lexicon.MODALITY_PHRASES), None)
    # Vietnamese asks behind the subject: "Tôi có bắt buộc nghỉ không?".
    if found is not None and (found[0] == 0 or found[1].startswith("có ")):
        return frozenset([lexicon.MODALITY[found[1]]])
    # "What must I bring?" is not "What can I bring?"; "how can I", "what should I" ask for advice.
    if opening[0] in _WHICH:
        told = {lexicon.MODALITY[word] for word in opening[1:3] if word in lexicon.MODALITY}
        return frozenset(told & {"must", "may"})
    # "Do all the tenants have to sign?"
    if opening[0] in ("do", "does", "did", *lexicon.MODALITY):
        duty = any(pair in _DUTIES for pair in pairwise(words))
        return frozenset(["must"]) if duty else frozenset()
    return frozenset()


def _owners(folded: str) -> frozenset[tuple[str, str]]:
    return frozenset(
        (lexicon.label(owner), lexicon.label(owned))
        for owner, owned in _OWNER.findall(folded)
        if owner not in lexicon.STOP and owned not in lexicon.STOP
    )


def _asks(words: Sequence[str]) -> str:
    """ "Who shot Burr?", "By whom was Burr shot?": the doer; "Who did Burr shoot?": the other."""
    passive = not _WERE.isdisjoint(words) and "by" in words
    if passive and (words[-1] == "by" or any(pair in _BY_WHOM for pair in pairwise(words))):
        return "doer, by"
    if words[:1] not in _WHICH_ONE:
        return ""
    opening = words[1:_OPENING]
    if not _DO.isdisjoint(opening) or passive:
        return "other"
    return "doer" if _WERE.isdisjoint(opening) else ""


def _moment(words: Sequence[str]) -> str:
    """Of the first word that tells: "Who was", "Who used to", "Who owned", "Who owns"."""
    told = next((_MOMENTS[word] for word in words[:_OPENING] if word in _MOMENTS), "")
    if told or words[:1] not in _WHICH_ONE or len(words) < 2:
        return told
    if words[1:3] == ("used", "to") or words[1].endswith("ed"):
        return "past"
    return "present" if words[1].endswith("s") else ""


def _negations(words: Sequence[str]) -> int:
    """How many words turn the sense round; what only closes a question is none of them."""
    end = len(words)
    while end and words[end - 1] in lexicon.PARTICLES:
        end -= 1
    if end and words[end - 1] in _QUESTION_PARTICLES:
        end -= 1
    # "You are afraid, are not you?", "Is it banned or not?": the tag only asks.
    if (end > 4 and words[end - 2] == "not" and words[end - 1] in _TAG_SUBJECTS) or (
        end > 2 and (words[end - 2], words[end - 1]) == ("or", "not")
    ):
        end -= 2
    return sum(
        1
        for at, word in enumerate(words[:end])
        if (word in lexicon.NEGATORS and not _courtesy(words, at))
        or (word in _KEEP and _keeps_from(words[at + 1 : at + _LONGEST_KEEP]))
    )


def _keeps_from(words: Sequence[str]) -> bool:
    """ "keep the dog from barking": not to let it."""
    return any(before == "from" and after.endswith("ing") for before, after in pairwise(words))


def _courtesy(words: Sequence[str], at: int) -> bool:
    """ "If you don't mind", "don't hesitate", "why or why not": these turn nothing round."""
    following = words[at + 1] if at + 1 < len(words) else ""
    if words[at] == "not" and following in ("mind", "hesitate"):
        return True
    return words[at] == "not" and at > 1 and not following and words[at - 1] in ("why", "if")


def _numbers(
    words: Sequence[str], *, vietnamese: bool
) -> tuple[list[tuple[str, str]], list[str], tuple[tuple[str, str], ...]]:
    """The numbers with their units, the words that are no part of one, and what each counts."""
    found: list[tuple[str, str]] = []
    counted: list[tuple[str, str]] = []
    rest: list[str] = []
    at = 0
    while at < len(words):
        if words[at].isalpha() and words[at] not in lexicon.NUMBERS and not vietnamese:
            rest.append(words[at])
            at += 1
            continue
        if words[at] in lexicon.NAMES or words[at : at + 2] == ["first", "time"]:
            rest.append(words[at])  # "2fa"; "for the first time" counts nothing
            at += 1
            continue
        value, unit, used = _number(words, at, vietnamese=vietnamese)
        at += used or 1
        if used:
            found.append((value, unit))
            counted.append((value, _thing(words[at]) if at < len(words) else ""))
        else:
            rest.append(words[at - 1])
    return found, rest, tuple(counted)


def _thing(word: str) -> str:
    return "" if word in _NO_CONTENT or word in lexicon.NAMES else lexicon.label(word)


def _number(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str, int]:
    """Value, unit and how many words they took; 0 words when none begins here."""
    value, unit = _value(words, at, vietnamese=vietnamese)
    if not value:
        return "", "", 0
    used = 1
    while value.isdecimal() and at + used < len(words):
        scaled = _scaled(value, words[at + used])
        if scaled is None:
            break
        value, used = scaled, used + 1
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


def _value(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str]:
    word = words[at]
    if not word.isalpha() and any(letter.isdigit() for letter in word):
        return _digits(word, vietnamese=vietnamese)
    spelt = lexicon.NUMBERS.get(word) or (
        lexicon.VIETNAMESE_NUMBERS.get(word) if vietnamese else None
    )
    # "Which one is better" counts nothing; "one week" does.
    if not spelt or (word == "one" and not (at + 1 < len(words) and _unit_word(words[at + 1]))):
        return "", ""
    return spelt.removeprefix("x"), ""


def _digits(word: str, *, vietnamese: bool) -> tuple[str, str]:
    whole = _NUMERIC.fullmatch(word)
    if whole is None:
        plain = word.lstrip("-").replace("-", "")
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
    if not hour.isdecimal() or not 0 < int(hour) <= _NOON:
        return ""
    return f"{int(hour) % _NOON + (_NOON if half == 'pm' else 0)}:{minute or '00'}"


def _ungrouped(digits: str, *, vietnamese: bool) -> str:
    if re.fullmatch(r"\d{1,3}(?:[,']\d{3})+(?:\.\d+)?", digits):
        digits = digits.replace(",", "").replace("'", "")
    elif re.fullmatch(
        r"\d{1,3}(?:\.\d{3}){2,}" if not vietnamese else r"\d{1,3}(?:\.\d{3})+", digits
    ):
        digits = digits.replace(".", "")
    elif re.fullmatch(r"\d+,\d+", digits):
        digits = digits.replace(",", ".")
    return (
        re.sub(r"\.0+$", "", digits) if digits.count(".") == 1 and digits.endswith("00") else digits
    )


def _scaled(value: str, word: str) -> str | None:
    """ "two" + "hundred" is 200, "twenty" + "five" is 25; None when the word is no part of it."""
    spelt = lexicon.NUMBERS.get(word, "")
    if spelt.startswith("x"):
        return _times(value, spelt[1:])
    if spelt.isdigit() and value.endswith("0") and len(spelt) < len(value) and len(value) == 2:
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


def _strict_units(words: Sequence[str]) -> Iterator[str]:
    for word in words:
        unit = lexicon.UNITS.get(word)
        if unit and unit not in lexicon.LOOSE_UNITS and word not in lexicon.STOP:
            yield unit


def _structure(
    words: Sequence[str],
) -> tuple[tuple[str, ...], tuple[str, ...], tuple[int, ...], frozenset[tuple[str, str]]]:
    content: list[str] = []
    hangs: list[int] = []
    since = 0
    roles: list[str] = []
    coordinated: set[tuple[str, str]] = set()
    role = last = before = ""
    joined = False
    for at, word in enumerate(words):
        following = words[at + 1] if at + 1 < len(words) else ""
        if word in lexicon.MARKERS and not (word == "to" and _opens_verb(before, following)):
            role, since = word, at
        elif word in lexicon.CLAUSE and not (role in _SUBORDINATE and content):
            role, since = "", at
        joined = joined or word in _JOINERS
        if word not in _NO_CONTENT or (
            # "parents help teachers", "dogs need vitamins"
            word in _ACTS and before not in _NO_CONTENT and before and following not in _NO_CONTENT
        ):
            label = lexicon.label(word)
            if joined:
                coordinated.add((min(last, label), max(last, label)))
            content.append(label)
            roles.append(role)
            hangs.append(since)
            last, joined = label, False
        before = word
    return tuple(content), tuple(roles), tuple(hangs), frozenset(coordinated)


def _opens_verb(before: str, following: str) -> bool:
    return before in lexicon.BEFORE_VERB or following in lexicon.VERBS


def _capitals(prose: str) -> tuple[frozenset[str], frozenset[str]]:
    """Names told by their capitals, and acronyms; none where capitals are mere style."""
    starts = {match.end() for match in _SENTENCE.finditer(prose)}
    told = [(match.start(), match.group()) for match in wording.TOKEN.finditer(prose)]
    capital = [(at, word) for at, word in told if word[:1].isupper()]
    if len(capital) > 3 and 2 * len(capital) > len(told):
        return frozenset(), frozenset()
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


def _plain(word: str) -> list[str]:
    return [
        part for part in wording.expand(word.lower()) if part not in lexicon.STOP | lexicon.PLAIN
    ]


def _literals(prose: str) -> Iterator[str]:
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


def _code(prose: str) -> Iterator[str]:
    if "`" in prose:
        for span in _SPAN.finditer(prose):
            yield " ".join(span.group(1).split())
        prose = _SPAN.sub(" ", prose)
    if not _MAYBE_CODE.search(prose):
        return
    for found in _CODE.finditer(prose):
        yield found.group().strip()
