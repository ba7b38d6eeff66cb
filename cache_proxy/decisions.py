"""The judgements: may it be cached, which stored answer fits, may the new answer be kept.

Plain functions of their arguments: no I/O, no clock, no randomness, no logging.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import lru_cache

from . import agreement, gist, guards, wording
from .model import (
    Answer,
    Bypass,
    Candidate,
    Directives,
    Discard,
    Entry,
    Hit,
    Miss,
    Policy,
    Prompt,
    Request,
)
from .score import adjusted

__all__ = ["ENDINGS", "GOOD_ENDINGS", "admit", "choose", "closed", "fits", "keep", "only_looked_up"]

# Each protocol's own word for an answer that ended because it was done.
GOOD_ENDINGS = frozenset({"stop", "eos", "end_turn", "stop_sequence", "STOP", "completed"})
# With those that an answer has which a tool is to complete.
ENDINGS = GOOD_ENDINGS | {"tool_calls", "function_call", "tool_use"}

# Below this a turn in a conversation leans on what was said before: "Where is it?"
_FEWEST_CONTENT_WORDS = 3


def admit(request: Request, asked: Directives, policy: Policy) -> Prompt | Bypass:
    """May this request meet the cache at all? Cheap: exact hits pay for it too."""
    if asked.mode == "off":
        return Bypass("off")
    if asked.no_store:
        return Bypass("no_store")
    if request.temperature is not None and request.temperature > policy.max_temperature:
        return Bypass("temperature")
    if request.web_search:
        return Bypass("web_search")
    if policy.bypass_time_bound and request.text and _time_bound(request.text):
        return Bypass("time_bound")
    return Prompt(request)


def _time_bound(text: str) -> bool:
    return _short_time_bound(text) if len(text) <= _SHORT else wording.time_bound(text)


# What is asked again is mostly asked in the same words, and an exact hit pays for this question.
_SHORT = 1_000
_short_time_bound = lru_cache(4_096)(wording.time_bound)


def closed(request: Request, asked: Directives, policy: Policy) -> str:
    """Why this request may only be matched exactly; "" when meaning may decide."""
    text = request.text
    if not text:
        return "no_text"
    if request.declares_tools and not policy.semantic_with_tools:
        return "tools"
    if request.tool_turns:
        return "tool_turns"
    if request.other_parts:
        return "parts"
    if request.choices > 1:
        return "choices"
    if wording.anaphoric(text):
        return "anaphoric"
    if request.turns > 1 and len(wording.content_words(text)) < _FEWEST_CONTENT_WORDS:
        return "short_turn"
    if policy.languages is not None:
        language = wording.language(text)
        if language and language not in policy.languages:
            return "language"
    # Last: what only its caller wants exact may still be found by meaning, by others.
    return "mode" if asked.mode == "exact" else ""


def only_looked_up(model: str, asked: Directives, policy: Policy, *, exact: bool) -> bool:
    """Whether upstream answers whatever was found: in shadow mode a hit is told, not served."""
    return (
        policy.shadow
        or asked.mode == "shadow"
        # Misses too: they are what the report of each threshold is a share of.
        or (policy.semantic_shadow and not exact)
        or any(fnmatchcase(model, pattern) for pattern in policy.shadow_models)
    )


def fits(entry: Entry, asked: Directives, now: int) -> bool:
    """Is a stored answer young enough for this caller?"""
    return asked.max_age is None or now - entry.created <= asked.max_age


# Below the threshold by more than this no score lifts a cosine over it.
_REACH = 0.25
# Neighbours as close to the best as this must not tell another story.
_WINDOW = 0.09
# These say that other words stand in one place, not that the question is another one: what they
# object to is not served, but its answer still counts for or against the others'.
_SUSPICIONS = frozenset({"substitution", "comparison", "narrowing", "order", "question"})
# Two neighbours that independently hold one answer make up for this much.
_SUPPORT = 0.045


def choose(
    text: str,
    candidates: Sequence[Candidate],
    asked: Directives,
    policy: Policy,
    now: int,
    text_of: Callable[[bytes], str] = bytes.hex,
) -> Hit | Miss:
    """The best stored answer that no guard objects to and no other contradicts, or why there is
    none. All similarities that are told are scores: what is held against the threshold.

    `candidates` come nearest first and lie in the request's own partition. `text_of` reads a
    stored body, as its protocol does; without it only equal bodies agree.
    """
    if not candidates:
        return Miss("no_entry")
    threshold = max(policy.threshold, asked.threshold or 0.0)
    nearest = -1.0
    vetoes: list[str] = []
    fit: list[tuple[float, Candidate]] = []
    telling: list[tuple[float, Candidate]] = []
    query = _facts(text)
    for candidate in candidates:
        if nearest >= 0 and candidate.similarity < threshold - _REACH:
            break
        stored = _kept_facts(candidate.entry)
        scored = score(candidate, query, stored)
        nearest = max(nearest, scored)
        if not fits(candidate.entry, asked, now):
            continue
        objection = guards.veto(query, stored, policy.guards_off)
        if objection is None or objection in _SUSPICIONS:
            telling.append((scored, candidate))
        if objection is None and scored <= candidate.floor:
            objection = "floor"
        if objection is None:
            fit.append((scored, candidate))
        elif max(scored, candidate.similarity) >= threshold:
            vetoes.append(objection)  # near enough for one of the two, so worth telling
    if fit:
        best, chosen = max(fit, key=lambda pair: pair[0])
        rivals = [other.entry for scored, other in telling if scored > best - _WINDOW]
        agreed = not policy.agreement or _agree(chosen.entry, rivals, text_of)
        # What was shown to be wrong may speak against an answer, and not for one; a threshold above
        # all cosines is no threshold to be helped over.
        trusted = sum(s > best - _WINDOW and s > other.floor for s, other in telling)
        supported = policy.agreement and agreed and trusted > 1 and asked.threshold is None
        if supported and best < threshold <= min(1.0, best + _SUPPORT):
            best = threshold
        if best >= threshold and agreed:
            return Hit(chosen.entry, "semantic", best, tuple(vetoes))
        if best >= threshold:
            return Miss("disagreement", best, tuple(vetoes))
    if vetoes:
        return Miss("guard", nearest, tuple(vetoes))
    return Miss("below_threshold" if nearest < threshold else "max_age", nearest)


def _agree(chosen: Entry, rivals: Iterable[Entry], text_of: Callable[[bytes], str]) -> bool:
    """Whether all say what the chosen one says."""
    others = [rival.body for rival in rivals if rival.body != chosen.body]
    if not others:
        return True
    answer = text_of(chosen.body)
    return all(agreement.alike(answer, text_of(body), loose=True) for body in others)


def score(candidate: Candidate, asked: guards.Facts, stored: guards.Facts) -> float:
    """What is compared with the threshold."""
    return adjusted(candidate.similarity, candidate.learned, asked, stored)


# Neighbours further off than this teach nothing about thresholds.
_NEAR = 0.70


def nearest(text: str, candidates: Sequence[Candidate], policy: Policy) -> Candidate | None:
    """The best neighbour that no guard objects to, its score for its similarity; None when none is
    near."""
    if not candidates:
        return None
    best: Candidate | None = None
    query = _facts(text)
    for candidate in candidates:
        if candidate.similarity < _NEAR - _REACH:
            break
        stored = _kept_facts(candidate.entry)
        scored = score(candidate, query, stored)
        if scored < max(_NEAR, best.similarity if best else 0.0):
            continue
        if guards.veto(query, stored, policy.guards_off) is None:
            best = replace(candidate, similarity=scored)
    return best


@lru_cache(4_096)
def _short_facts(text: str) -> guards.Facts:
    return guards.facts(text)


def _facts(text: str) -> guards.Facts:
    """Stored prompts are judged again and again; what they say is read once."""
    return _short_facts(text) if len(text) <= _SHORT else guards.facts(text)


def _kept_facts(entry: Entry) -> guards.Facts:
    """What a stored prompt says, as it was read when it was stored."""
    return (_unpacked(entry.gist) if entry.gist else None) or _facts(entry.text)


_unpacked = lru_cache(4_096)(gist.unpack)


def keep(answer: Answer, status: int, choices: int, policy: Policy) -> Discard | None:
    """Why an answer must not be stored; None when it may. `choices` is how many were asked for."""
    endings = ENDINGS if policy.store_tool_calls else GOOD_ENDINGS
    checks = (
        (status != 200, "status"),
        (answer.error, "error"),
        (not answer.terminal, "cut"),
        (answer.refused, "refused"),
        (answer.tool_calls and not policy.store_tool_calls, "tool_calls"),
        (len(answer.finished) != choices or not endings.issuperset(answer.finished), "finish"),
        (answer.empty, "empty"),
        (len(answer.body) > policy.max_answer_bytes, "size"),
    )
    return next((Discard(reason) for failed, reason in checks if failed), None)
