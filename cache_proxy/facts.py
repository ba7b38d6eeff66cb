"""What the guards compare: everything a text says that an answer hangs on, taken out once.

Plain functions of the text: no model, no clock, no I/O, no logging. A `Facts` is small, frozen
and made of strings and numbers only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import chain, pairwise

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
    negated: frozenset[str]  # the content words that they stand before
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
    passive: bool
    beside: frozenset[tuple[str, str]]  # content words with nothing between them
    between: tuple[tuple[str, str], ...]  # each number and the "from" or "to" it hangs on
    superlatives: frozenset[str]  # "best", "cheapest"; not of ways and methods
    moment: str  # "past", "present", "perfect", "future": what the question's verb says


_INDENTED = re.compile(r"\n([ \t]+\S.*)")
_FENCE = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
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
_OWNER = re.compile(r"\b(\w+)'s (\w+)")
_BEGINNING = re.compile(r"[^\w\n]{0,8}(?=\w)")
_SENTENCE = re.compile(r"[.?!:;\n](?:(?<!\n)\s{1,8}|(?<=\n)\s{0,40})[^\w\n]{0,8}(?=\w)")
_NOT_A_NAME = frozenset(["e.g", "i.e", "a.m", "p.m", "u.s", "u.k", "u.s.a", "etc", "ph.d"])
_NUMERIC = re.compile(r"(-?)([$€£₫#]?)(\d[\d.,:/']*)([a-zµ°%]*)")
_RANGE = re.compile(r"\d{1,3}-\d{1,3}")
_GROUPED = re.compile(r"\d{1,3}(?:[,']\d{3})+(?:\.\d+)?")
_GROUPED_BY_POINTS = re.compile(r"\d{1,3}(?:\.\d{3}){2,}")
_VIETNAMESE_GROUPED = re.compile(r"\d{1,3}(?:\.\d{3})+")
_DECIMAL_COMMA = re.compile(r"\d+,\d+")
_NO_CENTS = re.compile(r"\.0+$")
_MAYBE_NUMBER = re.compile("[0-9\u0080-\U0010ffff]")
_ORDINAL = frozenset(["st", "nd", "rd", "th"])
_NEXT_WORD_UNITS = frozenset("fcmgl")
_JOINERS = frozenset(["and", "or", "vs", "versus", "và", "hay", "hoặc"])
_ENDS = frozenset(["from", "to"])
_WAYS = frozenset(
    ["way", "ways", "method", "methods", "approach", "practice", "practices", "thing"]
)
_BE = (("is",), ("are",), ("was",), ("were",))
_NO_TERM = (("the",), ("my",), ("your",), ("our",), ("their",), ("this",), ("that",))
_HELPERS = (("you",), ("u",), ("someone",), ("somebody",), ("anyone",), ("anybody",))
_ME = frozenset(["me", "us"])
_DO = frozenset(["did", "does", "do"])
_REACH_OF_BE = 7
_WERE = frozenset(["is", "are", "was", "were", "been", "be", "being", "got"])
_MOMENTS: Mapping[str, str] = {
    "is": "present", "are": "present", "am": "present", "do": "present", "does": "present",
    "was": "past", "were": "past", "did": "past", "had": "past",
    "has": "perfect", "have": "perfect", "will": "future",
}  # fmt: skip
# The words among which the verb of a question stands: "at what age does".
_OPENING = 4
_DUTIES = frozenset([("have", "to"), ("has", "to"), ("need", "to"), ("needs", "to")])
_YES_OR_NO = lexicon.MODALITY.keys() | _DO
_WHICH = frozenset(["what", "which", "when", "where", "who"])
_WHICH_ONE = (("who",), ("whom",), ("which",), ("what",))
_BY_WHOM = frozenset([("by", "whom"), ("by", "who"), ("by", "which"), ("by", "what")])
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
_ASKING = frozenset(["is", "are", "was", "were", "do", "does", "did", "has", "have"])
_KNOWN: Mapping[str, str] = {
    word: name for word, name in lexicon.NAMES.items() if word not in lexicon.STOP
}
_STRICT_UNITS: Mapping[str, str] = {
    word: unit
    for word, unit in lexicon.UNITS.items()
    if unit and unit not in lexicon.LOOSE_UNITS and word not in lexicon.STOP
}
_NEGATING = lexicon.NEGATORS | _KEEP
_QUESTION_PARTICLES = frozenset(["không", "chưa"])
_TAG_SUBJECTS = frozenset(["i", "you", "he", "she", "it", "we", "they"])


def facts(text: str) -> Facts:
    """Read one text; linear in its length."""
    clean = wording.straight(text)
    fences = tuple(map(str.strip, _FENCE.findall(clean))) if "```" in clean else ()
    prose = _FENCE.sub(" ", clean) if fences else clean
    if "\n " in prose or "\n\t" in prose:
        # Code needs no fence to be code: encoders do not see how far a line is indented.
        fences += tuple(_INDENTED.findall(prose.strip()))
    folded = wording.fold(clean)
    shouted = prose.isupper()
    telling = not shouted and any(sign in prose for sign in _MAYBE_TELLING)
    spelt = _ROMAN.sub(_in_digits, prose) if any(x in prose for x in _MAYBE_ROMAN) else prose
    told = wording.unframed(
        wording.tokens(_TELLING_CASE.sub(_told_apart, spelt) if telling else spelt)
    )
    joined = wording.join(told)
    words = frozenset(joined)
    language = wording.language_of(clean, told)
    numbers, rest, counted = _numbers(joined, vietnamese=language == "vi")
    content, roles, hangs, coordinated = _structure(rest)
    names, acronyms = _capitals(spelt)
    turned = _negations(joined)
    known = {_KNOWN[word] for word in rest if word in _KNOWN}
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
        units=frozenset(_STRICT_UNITS[word] for word in rest if word in _STRICT_UNITS),
        negations=len(turned),
        negated=frozenset(filter(None, (_next_told(joined, at) for at in turned))),
        names=names,
        known=frozenset(known),
        acronyms=acronyms,
        literals=frozenset(_literals(prose)),
        code=tuple(sorted(_code(prose) if shouted else chain(_code(prose), _keywords(prose)))),
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
        passive=_passive(told),
        beside=frozenset(
            (lexicon.label(one), lexicon.label(other))
            for one, other in pairwise(rest)
            if one not in _NO_CONTENT and other not in _NO_CONTENT
        ),
        between=_between(joined, vietnamese=language == "vi") if len(numbers) > 1 else (),
        superlatives=_superlatives(told),
        moment=_moment(told),
    )


def _told_apart(found: re.Match[str]) -> str:
    return _IN_CAPITALS[found.group()]


def _in_digits(found: re.Match[str]) -> str:
    values = [_ROMAN_DIGITS[letter] for letter in found.group()]
    return str(sum(-x if x < y else x for x, y in zip(values, (*values[1:], 0), strict=True)))


def _labels(
    words: Sequence[str], table: Mapping[str, str], openings: wording.Openings
) -> frozenset[str]:
    found = {table[word] for word in words if word in table}
    found.update(table[phrase] for _, phrase in wording.phrases(words, openings))
    return frozenset(found)


def _quantity(words: Sequence[str]) -> frozenset[str]:
    labels = _labels(words, lexicon.QUANTITY, lexicon.QUANTITY_PHRASES)
    if "over" in words and any(
        word == "over" and (following in lexicon.NUMBERS or following[:1].isdigit())
        for word, following in pairwise(words)
    ):
        labels |= {"more than"}
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
    if not labels and 0 < len(content) <= _LONGEST_TERM and _defines(words):
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
    if opening[0] in _YES_OR_NO:
        duty = any(pair in _DUTIES for pair in pairwise(words))
        return frozenset(["must"]) if duty else frozenset()
    return frozenset()


def _owners(folded: str) -> frozenset[tuple[str, str]]:
    return frozenset(
        (lexicon.label(owner), lexicon.label(owned))
        for owner, owned in _OWNER.findall(folded)
        if owner not in lexicon.STOP and owned not in lexicon.STOP
    )


def _passive(words: Sequence[str]) -> bool:
    """ "Honey is made by bees", "Is vitamin C stored in the body?"."""
    return not _WERE.isdisjoint(words) and any(
        following.endswith("ed") or following in lexicon.PARTICIPLES
        for at, word in enumerate(words)
        if word in _WERE
        for following in words[at + 1 : at + _REACH_OF_BE]
    )


def _superlatives(words: Sequence[str]) -> frozenset[str]:
    """ "best" and "cheapest"; "the easiest way" is the best way."""
    if lexicon.SUPERLATIVES.keys().isdisjoint(words):
        return frozenset()
    return frozenset(
        lexicon.SUPERLATIVES[word]
        for word, following in pairwise((*words, ""))
        if word in lexicon.SUPERLATIVES and following not in _WAYS
    )


def _between(words: Sequence[str], *, vietnamese: bool) -> tuple[tuple[str, str], ...]:
    found = []
    role = ""
    for at, word in enumerate(words):
        if word in lexicon.MARKERS:
            role = word
        value = _value(words, at, vietnamese=vietnamese)[0] if role in _ENDS else ""
        if value:
            found.append((value, role))
    return tuple(sorted(found))


def _asks(words: Sequence[str]) -> str:
    """ "Who shot Burr?", "By whom was Burr shot?": the doer; "Who did Burr shoot?": the other."""
    passive = not _WERE.isdisjoint(words) and "by" in words
    if passive and (words[-1] == "by" or any(pair in _BY_WHOM for pair in pairwise(words))):
        return "doer, by"
    if words[:1] not in _WHICH_ONE or words[1:2] == ("if",):
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


def _negations(words: Sequence[str]) -> list[int]:
    """Where the words are that turn the sense round; what only closes or opens a question is none
    of them."""
    if _NEGATING.isdisjoint(words):
        return []
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
    return [
        at
        for at, word in enumerate(words[:end])
        if (word in lexicon.NEGATORS and not _courtesy(words, at))
        or (word in _KEEP and _keeps_from(words[at + 1 : at + _LONGEST_KEEP]))
    ]


def _next_told(words: Sequence[str], at: int) -> str:
    """The content word that follows, "" where none does."""
    following = (word for word in words[at + 1 : at + _LONGEST_KEEP] if word not in _NO_CONTENT)
    return lexicon.label(next(following, ""))


def _keeps_from(words: Sequence[str]) -> bool:
    """ "keep the dog from barking": not to let it."""
    return any(before == "from" and after.endswith("ing") for before, after in pairwise(words))


def _courtesy(words: Sequence[str], at: int) -> bool:
    """ "If you don't mind", "don't hesitate", "why or why not": these turn nothing round."""
    following = words[at + 1] if at + 1 < len(words) else ""
    if words[at] == "not" and following in ("mind", "hesitate"):
        return True
    # "Isn't it unsafe?" asks what "Is it unsafe?" asks; "Don't ask" does not.
    if words[at] == "not" and at == 1 and words[0] in _ASKING:
        return words[0] != "do" or following in _TAG_SUBJECTS
    return words[at] == "not" and at > 1 and not following and words[at - 1] in ("why", "if")


def _numbers(
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
    return "" if word in _NO_CONTENT or word in lexicon.NAMES else lexicon.label(word)


def _number(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str, int]:
    """Value, unit and how many words they took; 0 words when none begins here."""
    value, unit, used = _measure(words, at, vietnamese=vietnamese)
    return *_based(value, unit), used


def _measure(words: Sequence[str], at: int, *, vietnamese: bool) -> tuple[str, str, int]:
    if words[at] in _ARTICLES:  # "an hour and a half"
        unit = _unit_word(words[at + 1]) if at + 1 < len(words) else ""
        whole = unit and tuple(words[at + 2 : at + 5]) == _AND_A_HALF
        return ("3/2", unit, 5) if whole else ("", "", 0)
    value, unit = _value(words, at, vietnamese=vietnamese)
    if not value:
        return "", "", 0
    used = 1
    while value.replace(".", "", 1).isdecimal() and at + used < len(words):
        # "two hundred and forty"
        joined = words[at + used] == "and" and value.endswith("00") and at + used + 1 < len(words)
        scaled = _scaled(value, words[at + used + joined], spelt_out=words[at].isalpha())
        if scaled is None:
            break
        value, used = scaled, used + 1 + joined
    if value.isdecimal() and tuple(words[at + used : at + used + 3]) == _AND_A_HALF:
        value, used = f"{2 * int(value) + 1}/2", used + 3
    if "/" in value and not unit:
        # "half a cup", "a quarter of an acre", "half a dozen"
        beyond = at + used
        beyond += words[beyond : beyond + 1] in (["of"], ("of",))
        beyond += "".join(words[beyond : beyond + 1]) in _ARTICLES
        following = "".join(words[beyond : beyond + 1])
        if beyond > at + used and _unit_word(following):
            used = beyond - at
        elif beyond > at + used and lexicon.NUMBERS.get(following, "").startswith("x"):
            value = str(Fraction(value) * int(lexicon.NUMBERS[following][1:]))
            used = beyond + 1 - at
    if tuple(words[at + used : at + used + 3]) in _HALF_OF_DAY and not unit:
        half = _HALF_OF_DAY[tuple(words[at + used : at + used + 3])]
        if _clock(value, half):
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
    if not hour.isdecimal() or not 0 < int(hour) <= _NOON:
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
    for at, (word, following) in enumerate(zip(words, (*words[1:], ""), strict=False)):
        if word in _NO_CONTENT:
            if word in lexicon.MARKERS and not (word == "to" and _opens_verb(before, following)):
                role, since = word, at
            elif word in lexicon.CLAUSE and not (role in _SUBORDINATE and content):
                role, since = "", at
            joined = joined or word in _JOINERS
            # "parents help teachers", "dogs need vitamins"
            acts = word in _ACTS and before and before not in _NO_CONTENT
            if not acts or following in _NO_CONTENT:
                before = word
                continue
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


def _keywords(prose: str) -> list[str]:
    return _KEYWORD.findall(prose) if any(word in prose for word in _MAYBE_KEYWORD) else []


def _code(prose: str) -> Iterator[str]:
    if "`" in prose:
        for span in _SPAN.finditer(prose):
            yield " ".join(span.group(1).split())
        prose = _SPAN.sub(" ", prose)
    if not _SIGN.search(prose) or not _MAYBE_CODE.search(prose):
        return
    for found in _CODE.finditer(prose):
        yield found.group().strip()
