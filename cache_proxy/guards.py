"""Why two texts must not share an answer, however alike their vectors are.

Each guard is a named plain function of two `Facts`: True objects. All see both texts alike,
so the order of the two never matters. No model, no clock, no I/O, no logging.

A guard costs hits when it is wrong and answers when it is missing; the second is worse, so
each is written to object. The table `GUARDS` is the order in which they are asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from functools import lru_cache
from itertools import combinations

from cache_proxy import lexicon
from cache_proxy.facts import Facts, facts

__all__ = ["GUARDS", "Facts", "facts", "veto"]

Guard = Callable[[Facts, Facts], bool]

# Above this many content words one changed word says little about the answer.
_LONGEST_SUBSTITUTION = 12
# A replaced span says something only when this much stands around it.
_LEAST_SHARED = 3
_PREFIXES = ("un", "in", "im", "il", "ir", "dis", "non", "mis", "de", "anti")
_OPPOSED_PREFIXES = (
    ("hyper", "hypo"), ("pre", "post"), ("over", "under"), ("up", "down"), ("in", "out"),
    ("in", "ex"), ("in", "de"), ("im", "ex"), ("en", "de"), ("micro", "macro"), ("mono", "poly"),
    ("intra", "inter"), ("endo", "exo"), ("pro", "anti"), ("homo", "hetero"),
)  # fmt: skip
_OPPOSED_STARTS = tuple(prefix for prefix, _ in _OPPOSED_PREFIXES)
_SHORTEST_NEGATED = 4
_STARTS = (*_PREFIXES, *_OPPOSED_STARTS)
_KEPT_WORDS = 4_096  # looked at more than once, as a request's words repeat those of others
# "into" has no "outto".
_SHORTEST_TURNED = 5
# Endings that leave the meaning; "-er", "-ee" and "-less" do not.
_FORMS = frozenset([
    "ion", "ation", "ition", "ment", "al", "iv", "ous", "ity", "ic", "ical", "nes", "ant", "ent",
    "th", "s",
])  # fmt: skip
# With as many telling words changed on either side the whole is told anew.
_TOLD_ANEW = 2
# Up to so many numbers a prompt is no sum.
_FEW_NUMBERS = 2
_TOLD_AT_LENGTH = 8
_LOOSE_QUANTITIES = frozenset(["all", "some", "one"])
_MONEY = frozenset("$€£₫₹")
_DIRECTIONS = lexicon.DIRECTIONS | {""}
# "in life", "on average", "at once": hung on, and nothing narrowed.
_NEUTRAL = frozenset(
    [
        "lif", "world", "tim", "averag", "once", "onc", "year", "this year", "day", "person",
        "stat", "buy", "read",
    ]
)  # fmt: skip
_OPPOSED = frozenset(map(frozenset, [("from", "to"), ("from", "into"), ("before", "after")]))
_ENDS = frozenset[str]().union(*_OPPOSED)
# What may differ where only the time of the verb does.
_TENSED = frozenset(map(lexicon.label, [
    "is", "are", "was", "were", "do", "does", "did", "has", "have", "had", "will", "used", "to",
    "be", "been",
]))  # fmt: skip
_LIKE_ADVERBS = ("ly", "line", "seas", "stairs")
_WHICH_AND_HOW_MANY = ({frozenset(["which"]), frozenset(["many"])},)
_MEASURED = frozenset(
    ["many", "much", "long", "old", "far", "often", "tall", "big", "fast", "soon"]
)
_PRAISE = frozenset([
    "quickly", "rapidly", "easily", "properly", "effectively", "efficiently", "really",
    "actually", "fully", "completely", "totally", "exactly", "usually", "normally", "naturally",
    "finally", "successfully", "perfectly", "currently", "immediately", "personally", "regularly",
    "clearly", "family",
])  # fmt: skip
_SECOND_QUESTION = frozenset(["why", "how", "what", "when", "where", "is", "are", "fast", "more"])
_EXAMPLE = frozenset(["example", "examples"])
_ONLY_ASKING = ("what ", "why ", "how ", "may ")
_TIMES = frozenset(["double", "doubles", "doubled", "twice", "times", "triple", "tripled"])
_KINDS = frozenset(map(lexicon.label, lexicon.PARTS))
_SYMMETRIC = frozenset(map(lexicon.label, ["difference", "differ", "compare", "similar"]))
_CLAUSES = frozenset(["when", "if", "while"])
_UNITS = frozenset(map(lexicon.label, lexicon.UNITS))
_UNSURE = frozenset(["might", "may", "maybe", "perhaps", "probably"])
_SOMEONE = frozenset(["someone", "somebody", "others", "anyone", "them", "him", "her"])
_RELATIVE = frozenset(["that", "who", "whose"])
_ASKERS = frozenset(["i", "you", "we", "one", "to", "u"])
_OWN_PLACE = frozenset(["", "if", "when", "while", "because", "unless", "until", "after", "before"])
_MOMENTS_APART = ({"past", "present"}, {"past", "future"}, {"perfect", "future"})
_NOT_NARROWING = frozenset(["", "of", "về", "của", "about"])


def language(a: Facts, b: Facts) -> bool:
    """ "What is love?" / "Tình yêu là gì?": the answer's language would be wrong."""
    return bool(a.language and b.language) and a.language != b.language


def numbers(a: Facts, b: Facts) -> bool:
    """ "order 48213" / "order 48231"; "500mg" / "500ml"; "in miles" / "in metres"."""
    if a.numbers != b.numbers and not _same_money(a, b):
        if _only_told_otherwise(a, b):
            return False
        # "I sent it 5 days ago and nobody has it" / "Nobody has received what I sent": where
        # more than that differs and one names no number, no number decides.
        return bool(a.numbers and b.numbers) or _reworded(a, b) < _TOLD_ANEW
    if a.units and b.units and _other_digits(a, b):
        return True  # "how many weeks are 14 days", "how many weeks are 2 weeks"
    return bool(a.units - b.units and b.units - a.units) or _miscounted(a, b)


def problem(a: Facts, b: Facts) -> bool:
    """ "... costs $4 for 2 ..." with a sentence more: where much of a sum stands word for word, the
    rest was changed on purpose; one that is told anew throughout is the same sum."""
    if min(len(a.numbers), len(b.numbers)) <= _FEW_NUMBERS:
        return False
    if a.content == b.content or sorted(a.content) == sorted(b.content):
        # "1955 kilometres", "1955000 metres": which are asked for?
        return _other_digits(a, b)
    return not _told_anew(a, b)


def _told_anew(a: Facts, b: Facts) -> bool:
    """Whether no third of the shorter one stands in the other word for word."""
    shorter = min(len(a.content), len(b.content))
    long = shorter // 3 + 1
    return shorter >= _TOLD_AT_LENGTH and _runs(a.content, long).isdisjoint(_runs(b.content, long))


def _runs(words: tuple[str, ...], long: int) -> set[tuple[str, ...]]:
    return {words[at : at + long] for at in range(len(words) - long + 1)}


def _other_digits(a: Facts, b: Facts) -> bool:
    """Whether each is written with digits that the other lacks, whatever they amount to."""
    here, there = ({word for word in read.words if word[:1].isdigit()} for read in (a, b))
    return bool(here - there and there - here)


def _only_told_otherwise(a: Facts, b: Facts) -> bool:
    """ "on the first day", "initially"; "twice as many", "double that": where a sum is told anew,
    words that only one side has for a number."""
    if min(len(a.numbers), len(b.numbers)) <= _FEW_NUMBERS:
        return False
    here, there = Counter(a.numbers), Counter(b.numbers)
    more, fewer = here - there, there - here
    return (
        not (more and fewer)
        and all(_told_in_words(value, b if more else a) for value, _ in more + fewer)
        and _told_anew(a, b)
    )


def _told_in_words(value: str, other: Facts) -> bool:
    return value.endswith("th") or (value.endswith("x") and not _TIMES.isdisjoint(other.words))


def comparison(a: Facts, b: Facts) -> bool:
    """ "the best laptop" / "the cheapest laptop"."""
    return bool(a.superlatives and b.superlatives) and a.superlatives.isdisjoint(b.superlatives)


def negation(a: Facts, b: Facts) -> bool:
    """ "Cancel my plan" / "Don't cancel my plan"; "it charges but doesn't turn on" / "it turns on
    but doesn't charge"."""
    if (a.negations - b.negations) % 2 == 0:
        return (
            a.negations == b.negations > 0
            and "but" in a.words & b.words
            and a.negated.isdisjoint(b.negated)
            and bool(a.negated and b.negated)
            and _reworded(a, b) < _TOLD_ANEW
        )
    # "I don't know my PIN" / "I forgot my PIN": with other words on both sides a "not" more or
    # less turns nothing round.
    return _reworded(a, b) == 0


def antonyms(a: Facts, b: Facts) -> bool:
    """ "turn on dark mode" / "turn off dark mode"; "bật" / "tắt"."""
    return _reworded(a, b) <= _TOLD_ANEW and (_flipped(a, b) or _flipped(b, a))


def opposites(a: Facts, b: Facts) -> bool:
    """ "Is it safe?" / "Is it unsafe?": an opposite made by a prefix or by "-less"."""
    if (a.negations - b.negations) % 2 or _reworded(a, b) > _TOLD_ANEW:
        return False  # "not happy" and "unhappy" are one
    if not any(map(_may_negate, a.words ^ b.words)):
        return False
    # Stems and not labels: "unhappy" has lost its "happy" where that counts as "glad".
    left = frozenset(map(lexicon.stem, a.words - b.words))
    right = frozenset(map(lexicon.stem, b.words - a.words))
    return _negates(left, right) or _negates(right, left)


def question(a: Facts, b: Facts) -> bool:
    """ "When was X built?" / "Where was X built?"."""
    if a.opens != b.opens and "why" in (a.opens, b.opens) and a.opens and b.opens:
        return _same_words(a, b)
    if _defines(a, b) or _defines(b, a):
        return True
    if not a.question or not b.question or not a.question.isdisjoint(b.question):
        return False
    if "which" in a.question | b.question:
        return {a.question, b.question} in _WHICH_AND_HOW_MANY
    # "How often" and "how" of the same thing are two questions.
    measured = (a.question | b.question) - {"manner"}
    if measured <= _MEASURED:
        apart = frozenset(a.content) ^ frozenset(b.content)
        if apart <= frozenset(map(lexicon.label, measured)):
            return True
    # "How can I buy it?" and "Where can I buy it?" want the same; "how" and "why" do not.
    if "manner" not in a.question | b.question or "why" in a.question | b.question:
        return True
    return "where" in a.question | b.question and (
        _ASKERS.isdisjoint(a.words) or _ASKERS.isdisjoint(b.words)
    )


def _defines(a: Facts, b: Facts) -> bool:
    """ "What is a monad?" / "Give me an example of a monad"."""
    return "definition" in a.question and not (b.words - a.words).isdisjoint(_EXAMPLE)


def modality(a: Facts, b: Facts) -> bool:
    """ "Can I skip it?" / "Must I skip it?"; "May I?" / "Do I have to?"; "It might be late"."""
    if a.modality and b.modality:
        return a.modality != b.modality
    if _UNSURE.isdisjoint(a.words) == _UNSURE.isdisjoint(b.words):
        return False
    # "What might cause it?" and "May I ask ...?" only ask.
    return not (a.text + " ").startswith(_ONLY_ASKING) and (
        not (b.text + " ").startswith(_ONLY_ASKING) and _same_words(a, b)
    )


def quantity(a: Facts, b: Facts) -> bool:
    """ "Do all vitamins ...?" / "Do any vitamins ...?"; "delete it" / "delete only it"."""
    if a.quantity == b.quantity or not _same_words(a, b):
        return False
    # "What are some ..." and "what are all ..." often only ask for a list; the others count always.
    if (a.quantity ^ b.quantity) - _LOOSE_QUANTITIES:
        return True
    if _each_and_a(a, b) or _each_and_a(b, a):
        return True
    return (
        "all" in a.quantity | b.quantity
        and bool(a.quantity and b.quantity)
        and a.quantity.isdisjoint(b.quantity)
    )


def _each_and_a(a: Facts, b: Facts) -> bool:
    """ "every country" / "a country"."""
    return not a.words.isdisjoint(("each", "every")) and not (b.words - a.words).isdisjoint(
        ("a", "an")
    )


def tense(a: Facts, b: Facts) -> bool:
    """ "When will it arrive?" / "When did it arrive?"; "in two weeks" / "two weeks ago"."""
    if ("ago" in a.words) != ("ago" in b.words) and a.numbers == b.numbers:
        return _reworded(a, b) == 0
    if a.tense and b.tense and a.tense.isdisjoint(b.tense):
        return True
    return {a.moment, b.moment} in _MOMENTS_APART and a.stems ^ b.stems <= _TENSED


def entities(a: Facts, b: Facts) -> bool:
    """ "the capital of France" / "the capital of Spain": each names what the other lacks."""
    return bool(_lacking(a, b)) and bool(_lacking(b, a))


def literals(a: Facts, b: Facts) -> bool:
    """ "open notes.txt" / "open todo.txt"; a quote, link or identifier found on one side only."""
    return any(said not in b.text for said in a.literals) or any(
        said not in a.text for said in b.literals
    )


def code(a: Facts, b: Facts) -> bool:
    """ "a == b" / "a != b"; "rm -r" / "rm -rf"; fenced blocks that differ."""
    return a.code != b.code or a.fences != b.fences


def form(a: Facts, b: Facts) -> bool:
    """ "Explain X" / "Explain X in one sentence": another shape, length or reader."""
    # "a language for beginners", "which language should a beginner learn"
    return a.form != b.form and not (a.form ^ b.form) <= a.stems & b.stems


def direction(a: Facts, b: Facts) -> bool:
    """ "from Paris to Rome" / "from Rome to Paris"; "X better than Y" / "Y better than X"."""
    if a.between != b.between and dict(a.between).keys() == dict(b.between).keys():
        return True  # "from Windows 10 to 11" / "from Windows 11 to 10"
    if a.roles == b.roles and a.content == b.content:
        return False
    # Two words change places between two directions; opposed is what hangs on one of the ends.
    if len(_DIRECTIONS.intersection(a.roles, b.roles)) < 2 and (
        _ENDS.isdisjoint(a.roles) or _ENDS.isdisjoint(b.roles)
    ):
        return False
    left, right = _roles(a), _roles(b)
    moved = [word for word in left.keys() & right.keys() if left[word] != right[word]]
    if not moved:
        return False
    if _reworded(a, b) < _TOLD_ANEW and any(
        frozenset((left[word], right[word])) in _OPPOSED
        for word in moved
        if a.content.count(word) == 1 == b.content.count(word)
    ):
        return True
    turned = [word for word in moved if left[word] in _DIRECTIONS]
    return any(
        left[one] == right[other] and left[other] == right[one]
        for one, other in combinations(turned, 2)
    )


def role(a: Facts, b: Facts) -> bool:
    """ "Who defeated France?" / "Who did France defeat?"; "can they sue me" / "can I sue them"."""
    if _sides_changed(a, b):
        return True
    if not _same_words(a, b):
        return False
    if _themselves(a, b) or _themselves(b, a):
        return True
    # "How do I know he likes me?" and "How do you know he likes you?" are one question.
    if a.suffers != b.suffers:
        told = (b if a.suffers else a).words
        # "A bee stung me", "I was stung by a bee"
        return "you" not in told and not ("by" in told and (b if a.suffers else a).passive)
    return (
        "other" in (a.asks, b.asks)
        and ("doer" in a.asks) != ("doer" in b.asks)
        and a.content != b.content
    )


def _sides_changed(a: Facts, b: Facts) -> bool:
    """ "may the tenant ask the landlord" / "may the landlord ask the tenant"."""
    if lexicon.PARTIES.isdisjoint(a.stems) or "by" in a.words or "by" in b.words:
        return False
    if _reworded(a, b) >= _TOLD_ANEW:
        return False
    both = frozenset(a.content) & frozenset(b.content)
    return any(
        (min(one, other), max(one, other)) not in a.coordinated | b.coordinated
        and (a.content.index(one) < a.content.index(other))
        != (b.content.index(one) < b.content.index(other))
        for one in both
        for other in lexicon.ANTONYMS.get(one, ())
        if other in both and one < other and one in lexicon.PARTIES
    )


def _themselves(a: Facts, b: Facts) -> bool:
    """ "remove myself from it" / "remove someone from it"."""
    return "myself" in a.words and not (b.words - a.words).isdisjoint(_SOMEONE)


def order(a: Facts, b: Facts) -> bool:
    """ "the dog bites the man" / "the man bites the dog": two words have changed places."""
    if a.owners != b.owners and _same_words(a, b) and (_dispossessed(a, b) or _dispossessed(b, a)):
        return True
    if "doer, by" in (a.asks, b.asks) and a.asks != b.asks:
        return False  # the passive turns everything round
    if _shuffled(a, b):
        return True
    # The frame must be the same, or "work stress" and "stress at work" would count as well.
    if a.roles != b.roles or len(a.content) > _LONGEST_SUBSTITUTION:
        return False
    told = enumerate(zip(a.content, b.content, strict=True))
    moved = [(at, x, y) for at, (x, y) in told if x != y]
    if len(moved) != 2 or moved[0][1:] != moved[1][:0:-1]:
        return False
    if a.coordinated and a.coordinated == b.coordinated:
        return False  # "Which is healthier, butter or margarine?"
    # Neighbours change places in any rewording: "my card is lost", "I lost my card"; not where
    # the asker changes sides: "he owes me money", "I owe him money".
    if "all" in a.quantity and a.words == b.words:
        return True  # "Are all squares rectangles?" / "Are all rectangles squares?"
    one, other = moved[0][1:]
    named_together = (min(one, other), max(one, other)) in a.coordinated | b.coordinated
    if moved[1][0] - moved[0][0] < 2 and ("me" in a.words) == ("me" in b.words):
        # "the mother of the king", "the king of the mother": what hangs on what has changed; "must
        # an employer give an employee", "must an employee give an employer".
        return a.roles[moved[0][0]] != a.roles[moved[1][0]] or (
            other in lexicon.ANTONYMS.get(one, ()) and not named_together
        )
    return not named_together


def _other_kind(a: Facts, b: Facts) -> bool:
    """ "fibre in brown rice" / "what fibre has white rice": another word beside the same one."""
    if _KINDS.isdisjoint(a.stems) or _KINDS.isdisjoint(b.stems):
        return False
    here, there = a.beside - b.beside, b.beside - a.beside
    return any(
        head == same
        and one in _KINDS
        and other in _KINDS
        and one not in b.stems
        and other not in a.stems
        for one, head in here
        for other, same in there
    )


def _shuffled(a: Facts, b: Facts) -> bool:
    """ "can stress cause headaches in men", "can headaches in men cause stress": the same words,
    and no one part of them merely moved."""
    if (
        a.content == b.content
        or len(a.content) != len(b.content)
        or not 2 < len(a.content) <= _LONGEST_SUBSTITUTION
        or a.passive != b.passive
        or not a.coordinated.isdisjoint(b.coordinated)
        or not _SYMMETRIC.isdisjoint(a.stems | b.stems)
        or not _CLAUSES.isdisjoint(a.words | b.words)
        or sorted(a.content) != sorted(b.content)
    ):
        return False
    if _one_part_moved(a.content, b.content):
        return False
    names = a.names | a.known | b.names | b.known
    # "Where in Python is it?", "Where is it in Python?"
    (one, other), (here, there) = (
        [tuple(word for word in read.content if (word in names) is named) for read in (a, b)]
        for named in (True, False)
    )
    return one != other or not _one_part_moved(here, there)


def _one_part_moved(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether one part has changed places with the next."""
    left, right, _ = _apart(a, b)
    return a == b or any(left[at:] + left[:at] == right for at in range(1, len(left)))


def substitution(a: Facts, b: Facts) -> bool:
    """ "track my order" / "cancel my order": other words in one place, all else alike."""
    if max(len(a.content), len(b.content)) > _LONGEST_SUBSTITUTION:
        return False
    if _other_kind(a, b):
        return True
    left, right, shared = _apart(a.content, b.content)
    if len(left) == 1 == len(right):
        return shared > 0 and not _kin(left[0], right[0])
    if not (0 < len(left) <= 2 and 0 < len(right) <= 2 and shared >= _LEAST_SHARED):
        return False
    if sorted(left) == sorted(right) and (
        sorted(a.roles) != sorted(b.roles)  # "a Python function", "a function in Python"
        or not a.coordinated.isdisjoint(b.coordinated)  # "a cat or a dog", "a dog or a cat"
    ):
        return False
    return not (_short_for(a, left, right) or _short_for(b, right, left))


def narrowing(a: Facts, b: Facts) -> bool:
    """ "How do I deploy an app?" / "How do I deploy an app on Heroku?"."""
    return _narrows(a, b) or _narrows(b, a)


GUARDS: Mapping[str, Guard] = {
    "language": language,
    "numbers": numbers,
    "problem": problem,
    "comparison": comparison,
    "negation": negation,
    "antonyms": antonyms,
    "opposites": opposites,
    "question": question,
    "modality": modality,
    "quantity": quantity,
    "tense": tense,
    "entities": entities,
    "literals": literals,
    "code": code,
    "form": form,
    "direction": direction,
    "role": role,
    "order": order,
    "substitution": substitution,
    "narrowing": narrowing,
}


def veto(query: Facts, stored: Facts, off: frozenset[str] = frozenset()) -> str | None:
    """The name of the first guard that objects, those in `off` not asked; None when none does."""
    if query.text == stored.text and query.code == stored.code and query.fences == stored.fences:
        return None
    for name, guard in GUARDS.items():
        if name not in off and guard(query, stored):
            return name
    return None


def _reworded(a: Facts, b: Facts) -> int:
    """How many telling words each has that the other lacks, whichever has fewer."""
    return min(len(a.telling), len(b.telling)) - len(a.telling & b.telling)


def _same_words(a: Facts, b: Facts) -> bool:
    """Whether both tell the same, but for what turns or measures it."""
    return a.telling == b.telling


def _dispossessed(a: Facts, b: Facts) -> bool:
    """ "my wife's allowance if I die" / "my allowance if my wife dies"."""
    return any(
        word == owner and role in _OWN_PLACE and following != owned
        for owner, owned in a.owners - b.owners
        for word, role, following in zip(b.content, b.roles, (*b.content, owned)[1:], strict=True)
    )


def _miscounted(a: Facts, b: Facts) -> bool:
    """ "2 rooms for 3 people" / "3 rooms for 2 people"; "5 from 9" / "9 from 5"."""
    if a.counted == b.counted or len(a.counted) < 2:
        return False
    if a.content == b.content:
        return [value for value, _ in a.counted] != [value for value, _ in b.counted]
    left, right = ({thing: value for value, thing in read.counted} for read in (a, b))
    return left.keys() == right.keys() and "" not in left and left != right


def _same_money(a: Facts, b: Facts) -> bool:
    """Whether the numbers are equal where one text only leaves the currency out: 7000, $7000."""
    if len(a.numbers) != len(b.numbers):
        return False
    return all(
        value == other and (unit == own or (not (unit and own) and (unit or own) in _MONEY))
        for (value, unit), (other, own) in zip(a.numbers, b.numbers, strict=True)
    )


def _flipped(a: Facts, b: Facts) -> bool:
    """Whether a word of `a` alone has its opposite in `b`: beside it in `a` as well, or not."""
    for word in lexicon.ANTONYMS.keys() & (a.stems - b.stems):
        for opposite in lexicon.ANTONYMS[word]:
            if _same_particle(word, opposite, a, b) or (
                a.numbers == b.numbers and word in _UNITS and opposite in _UNITS
            ):
                continue  # "rent it out", "rent out"; "1 year", "12 months"
            # A preposition that both say is no opposite: "pay for it", "vote against it for me".
            if opposite in b.stems and (opposite not in a.stems or opposite not in lexicon.STOP):
                return True
    return False


@lru_cache(_KEPT_WORDS)
def _same_particle(word: str, opposite: str, a: Facts, b: Facts) -> bool:
    if (" " in word) == (" " in opposite):
        return False
    longer = max(word, opposite, key=len)
    return longer.rpartition(" ")[2] in a.stems & b.stems


def _may_negate(word: str) -> bool:
    return (len(word) > _SHORTEST_NEGATED and word.startswith(_STARTS)) or word.endswith("less")


def _negates(some: frozenset[str], others: frozenset[str]) -> bool:
    return any(
        not _turned(word).isdisjoint(others)
        for word in some
        if word.startswith(_STARTS) or word.endswith("les")  # as the stem of "-less" does
    )


def _turned(word: str) -> set[str]:
    """The stems that would say the opposite."""
    # "into" is no opposite of "to".
    rests = (word[len(prefix) :] for prefix in _PREFIXES if word.startswith(prefix))
    turned = {rest for rest in rests if len(rest) > 2}
    if len(word) > _SHORTEST_TURNED:
        turned.update(
            other + word[len(some) :] for some, other in _OPPOSED_PREFIXES if word.startswith(some)
        )
    if word.endswith("les"):
        turned |= {word[:-3], word[:-3] + "ful"}
    return turned


def _lacking(a: Facts, b: Facts) -> frozenset[str]:
    """What `a` names and `b` does not, an acronym and its long form taken for one."""
    missing = (a.names | a.known) - b.stems
    if not missing:
        return missing
    return frozenset(name for name in missing if not _spelt_out(name, a, b))


def _spelt_out(name: str, a: Facts, b: Facts) -> bool:
    initials = "".join(word[0] for word in b.content)
    if name in a.acronyms and name in initials:
        return True
    own = "".join(word[0] for word in a.content)
    return any(short in own and name[0] in short for short in b.acronyms if short not in a.words)


def _short_for(read: Facts, short: tuple[str, ...], long: tuple[str, ...]) -> bool:
    """ "AI" / "artificial intelligence"."""
    return (
        len(short) == 1
        and short[0] in read.acronyms
        and short[0] == "".join(word[0] for word in long)
    )


def _kin(one: str, other: str) -> bool:
    """Whether the two are forms of one word: improv and improvement, addict and addictiv."""
    short, long = sorted((one, other), key=len)
    if (one, other) in lexicon.KIN or lexicon.misspelt(one, other):
        return True
    return len(short) > 4 and long.startswith(short) and long[len(short) :] in _FORMS


def _apart(a: tuple[str, ...], b: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...], int]:
    """What is left of each when the words both begin and end with are taken off, and how many."""
    shorter = min(len(a), len(b))
    head = 0
    while head < shorter and a[head] == b[head]:
        head += 1
    tail = 0
    while tail < shorter - head and a[-1 - tail] == b[-1 - tail]:
        tail += 1
    return a[head : len(a) - tail], b[head : len(b) - tail], head + tail


def _roles(read: Facts) -> dict[str, str]:
    told = ("to" if role == "into" else role for role in read.roles)
    return dict(zip(read.content, told, strict=True))


def _narrows(a: Facts, b: Facts) -> bool:
    """Whether `b` says all that `a` says, and hangs something more on it."""
    if len(b.content) <= len(a.content) or not b.stems.issuperset(a.content):
        return False
    extra = Counter(b.content)
    for word in a.content:
        if not extra[word]:
            return False
        extra[word] -= 1
    extra = +extra
    hanging = [
        (at, word)
        for at, (word, role, hang) in enumerate(zip(b.content, b.roles, b.hangs, strict=True))
        if word in extra and role not in _NOT_NARROWING and not _kept(hang, b, extra)
    ]
    if any(word in b.known for _, word in hanging) or _singles_out(a, b, extra):
        return True
    first = len(b.content) - extra.total()
    told = bool(a.content) and b.content[:first] == a.content
    if told and any(
        _ends_on(b.text.rpartition(f" {word} ")[2], extra)
        for word in (b.words - a.words) & _RELATIVE
    ):
        return True
    if told and extra.total() == 1 and (_and_more(a, b, first) or _manner(a, b, extra)):
        return True
    return told and any(at == first for at, _ in hanging) and not extra.keys() <= _NEUTRAL


def _ends_on(clause: str, extra: Counter[str]) -> bool:
    """ "an order" / "an order that has shipped"."""
    return extra.total() == sum(word not in lexicon.UNTOLD for word in clause.split())


def _and_more(a: Facts, b: Facts, at: int) -> bool:
    """ "delete a user" / "delete a user and their files"."""
    last, added = b.content[at - 1], b.content[at]
    said = b.words - a.words
    return (
        "and" in said
        and said.isdisjoint(_SECOND_QUESTION)
        and (min(last, added), max(last, added)) in b.coordinated
    )


def _manner(a: Facts, b: Facts, extra: Counter[str]) -> bool:
    """ "import a module" / "import a module dynamically"."""
    return any(
        word.endswith("ly") and lexicon.label(word) in extra and word not in _PRAISE
        for word in b.words - a.words
    )


def _singles_out(a: Facts, b: Facts, extra: Counter[str]) -> bool:
    """ "raw mushrooms", "an annual plan": what is added stands beside a word that both say."""
    added = {word for word in b.words - a.words if word in lexicon.PARTS}
    told = {lexicon.label(word) for word in added}
    # What ends a sentence is no adjective: "How do I reset it remotely?".
    last = len(b.content) - 1 if any(word.endswith(_LIKE_ADVERBS) for word in added) else -1
    if told.isdisjoint(extra):
        return False
    beside = (*b.content[1:], b.content[-1])
    hangs = (*b.roles[1:], b.roles[-1])
    return any(
        word in told
        and word in extra
        and (following not in extra or at == last)
        and role == hang
        and (word, following) not in b.coordinated
        for at, (word, following, role, hang) in enumerate(
            zip(b.content, beside, b.roles, hangs, strict=True)
        )
    )


def _kept(hang: int, read: Facts, extra: Counter[str]) -> bool:
    """Whether something outside `extra` hangs on the same preposition."""
    told = zip(read.content, read.hangs, strict=True)
    return any(hang == other and word not in extra for word, other in told)
