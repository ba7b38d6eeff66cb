"""Do two stored answers say the same? Asked when several neighbours could serve one prompt.

Plain functions of the texts: no model, no I/O. Biased towards "different": a wrong "same" serves a
wrong answer, a wrong "different" only asks upstream once more.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from cache_proxy import lexicon, wording

__all__ = ["alike"]

# What an answer says stands at its beginning, and a request waits for this.
_READ = 1_200
# Below this many telling words one word is the answer: "declined", "card_arrival", "Paris".
_SHORT = 8
_SAME = 0.8  # share of the words of both that both have
_LOOSELY_SAME = 0.5  # two answers of a model to one question, asked twice


class _Said(NamedTuple):
    words: frozenset[str]
    numbers: frozenset[str]
    negations: int
    verdict: str  # "yes", "no" or ""


def alike(a: str, b: str, loose: bool = False) -> bool:
    """Whether two answers say the same: same numbers, same polarity, nearly the same words.

    `loose` is for two answers that a model gave to the same question in two sittings.
    """
    one, other = wording.fold(a[:_READ]).strip(" .!"), wording.fold(b[:_READ]).strip(" .!")
    if one == other:
        # Equal as far as was read; what follows must at least be of like length.
        return max(len(a), len(b)) <= _READ or abs(len(a) - len(b)) < _READ // 4
    left, right = _said(one), _said(other)
    if left.numbers != right.numbers and not (
        loose and (left.numbers < right.numbers or right.numbers < left.numbers)
    ):
        return False
    if left.verdict != right.verdict:
        return False
    both, either = left.words & right.words, left.words | right.words
    if min(len(left.words), len(right.words)) < _SHORT:
        return left.words == right.words and left.negations == right.negations
    if (left.negations - right.negations) % 2 and not loose:
        return False
    return len(both) >= (_LOOSELY_SAME if loose else _SAME) * len(either)


@lru_cache(1_024)
def _said(text: str) -> _Said:
    told = wording.tokens(text)
    return _Said(
        words=frozenset(lexicon.label(word) for word in told if word not in lexicon.STOP),
        numbers=frozenset(word for word in told if any(map(str.isdigit, word))),
        negations=sum(word in lexicon.NEGATORS for word in told),
        verdict=told[0] if told[:1] in (("yes",), ("no",)) else "",
    )
