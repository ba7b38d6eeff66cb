"""What the guards compare: everything a text says that an answer hangs on, taken out once.

Plain functions of the text: no model, no clock, no I/O, no logging. A `Facts` is small, frozen
and made of strings and numbers only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from cache_proxy import lexicon, marks, quantities, wording

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
_OWNER = re.compile(r"\b(\w+)'s (\w+)")
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
_ACTS = frozenset(["help", "teach", "ask", "need", "want", "give", "show", "tell", "know"])
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
# What turns or measures a question is compared by guards of its own.
_TURNING = frozenset(
    lexicon.label(word)
    for phrase in (*lexicon.NEGATORS, *lexicon.QUANTITY)
    for word in (phrase, *phrase.split())
)
_SUBJECTS = frozenset([
    "i", "you", "he", "she", "it", "we", "they", "there", "this", "that", "the", "a", "an", "my",
    "your", "his", "her", "our", "their",
])  # fmt: skip
_ASKING = frozenset(["is", "are", "was", "were", "do", "does", "did", "has", "have"])
_KNOWN: Mapping[str, str] = {
    word: name for word, name in lexicon.NAMES.items() if word not in lexicon.STOP
}
_BEFORE_A_UNIT = frozenset(["in", "to", "into", "many"])
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
    spelt, clear = marks.in_words(prose)
    told = wording.unframed(wording.tokens(clear))
    joined = wording.join(told)
    words = frozenset(joined)
    language = wording.language_of(clean, told)
    vietnamese = language == "vi"
    numbers, rest, counted = quantities.numbers(joined, vietnamese=vietnamese)
    content, roles, hangs, coordinated = _structure(rest)
    names, acronyms = marks.capitals(spelt)
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
        units=_units(rest),
        negations=len(turned),
        negated=frozenset(filter(None, (_next_told(joined, at) for at in turned))),
        names=names,
        known=frozenset(known),
        acronyms=acronyms,
        literals=frozenset(marks.literals(prose)),
        code=tuple(sorted(marks.code(prose))),
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
            if one not in lexicon.NO_CONTENT and other not in lexicon.NO_CONTENT
        ),
        between=quantities.between(joined, vietnamese=vietnamese) if len(numbers) > 1 else (),
        superlatives=_superlatives(told),
        moment=_moment(told),
    )


def _units(words: Sequence[str]) -> frozenset[str]:
    """Units that no number has: "in miles", "how many weeks"."""
    named = {_STRICT_UNITS[word] for word in words if word in _STRICT_UNITS}
    for before, word in pairwise(words):
        if before in _BEFORE_A_UNIT and len(word) > 1 and word in lexicon.UNITS:
            named.add(lexicon.UNITS[word])
    return frozenset(named)


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
        word == "one" and before not in _BEFORE_A_KIND and after not in lexicon.NO_CONTENT
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
    following = (
        word for word in words[at + 1 : at + _LONGEST_KEEP] if word not in lexicon.NO_CONTENT
    )
    return lexicon.label(next(following, ""))


def _keeps_from(words: Sequence[str]) -> bool:
    """ "keep the dog from barking": not to let it."""
    return any(before == "from" and after.endswith("ing") for before, after in pairwise(words))


def _courtesy(words: Sequence[str], at: int) -> bool:
    """ "If you don't mind", "don't hesitate", "why or why not": these turn nothing round."""
    following = words[at + 1] if at + 1 < len(words) else ""
    if words[at] == "not" and following in ("mind", "hesitate"):
        return True
    # "Isn't it unsafe?" asks what "Is it unsafe?" asks; "Is not voting a crime?" does not.
    if words[at] == "not" and at == 1 and words[0] in _ASKING:
        return following in _SUBJECTS
    return words[at] == "not" and at > 1 and not following and words[at - 1] in ("why", "if")


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
        if word in lexicon.NO_CONTENT:
            if word in lexicon.MARKERS and not (word == "to" and _opens_verb(before, following)):
                role, since = word, at
            elif word in lexicon.CLAUSE and not (role in _SUBORDINATE and content):
                role, since = "", at
            joined = joined or word in lexicon.JOINERS
            # "parents help teachers", "dogs need vitamins"
            acts = word in _ACTS and before and before not in lexicon.NO_CONTENT
            if not acts or following in lexicon.NO_CONTENT:
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
