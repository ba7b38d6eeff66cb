"""The three judgements as tables: may it be cached, which answer fits, may the answer be kept."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.decisions import GOOD_ENDINGS, admit, choose, closed, fits, keep
from cache_proxy.guards import GUARDS
from cache_proxy.model import (
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

NOW = 1_800_000_000
ASKED = Directives()
POLICY = Policy(threshold=0.92, languages=frozenset({"en"}))
REQUEST = Request(
    operation="chat",
    model="m",
    stream=False,
    include_usage=False,
    text="How do I reset my password?",
    rest=b"{}",
    turns=1,
    declares_tools=False,
    tool_turns=False,
    other_parts=False,
    web_search=False,
    choices=1,
    temperature=None,
    end_user=None,
)
ENTRY = Entry(
    digest=b"d" * 20,
    partition=b"p" * 20,
    fingerprint=b"f" * 8,
    epoch=0,
    created=NOW - 100,
    expires=NOW + 1_000,
    text="How can I reset my password?",
    model="m",
    provider="http://up/v1",
    tenant="t",
    namespace="",
    tags=(),
    usage=None,
    cost=None,
    body=b"{}",
)


# ---- admit


@pytest.mark.parametrize(
    ("request_", "asked", "policy", "reason"),
    [
        ({}, {}, {}, ""),
        ({}, {"mode": "off"}, {}, "off"),
        ({}, {"mode": "exact"}, {}, ""),
        ({}, {"mode": "shadow"}, {}, ""),
        ({}, {"no_store": True}, {}, "no_store"),
        ({}, {"no_cache": True}, {}, ""),
        ({}, {"only_if_cached": True}, {}, ""),
        ({"temperature": 0.0}, {}, {}, ""),
        ({"temperature": 1.0}, {}, {}, ""),
        ({"temperature": math.nextafter(1.0, 2.0)}, {}, {}, "temperature"),
        ({"temperature": 0.5}, {}, {"max_temperature": 0.5}, ""),
        ({"temperature": 0.6}, {}, {"max_temperature": 0.5}, "temperature"),
        ({"web_search": True}, {}, {}, "web_search"),
        ({"text": "What is the weather today?"}, {}, {}, "time_bound"),
        ({"text": "Thời tiết hôm nay thế nào?"}, {}, {}, "time_bound"),
        ({"text": "What is the weather today?"}, {}, {"bypass_time_bound": False}, ""),
        ({"text": "What is the weather today? " + "x " * 1_000}, {}, {}, "time_bound"),
        ({"text": "What is weather? " + "x " * 1_000}, {}, {}, ""),
        ({"text": None}, {}, {}, ""),
        ({"text": None, "other_parts": True}, {}, {}, ""),
        ({"declares_tools": True, "tool_turns": True, "choices": 9}, {}, {}, ""),
    ],
)
def test_who_may_meet_the_cache(
    request_: dict[str, Any], asked: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    """A bypass says why; whatever is only unfit for matching by meaning still meets it."""
    request = replace(REQUEST, **request_)
    verdict = admit(request, replace(ASKED, **asked), replace(POLICY, **policy))
    assert verdict == (Bypass(reason) if reason else Prompt(request))


def test_the_first_reason_is_the_callers_own() -> None:
    """Who switched the cache off is told so, whatever else speaks against it."""
    request = replace(REQUEST, temperature=2.0, web_search=True)
    assert admit(request, Directives(mode="off", no_store=True), POLICY) == Bypass("off")


# ---- closed


@pytest.mark.parametrize(
    ("request_", "asked", "policy", "reason"),
    [
        ({}, {}, {}, ""),
        ({}, {"mode": "exact"}, {}, "mode"),
        # What says that the text is unfit for meaning goes before what its caller wants.
        ({"declares_tools": True}, {"mode": "exact"}, {}, "tools"),
        ({"text": "yes"}, {"mode": "exact"}, {}, "anaphoric"),
        ({"text": "Làm thế nào để đặt lại mật khẩu?"}, {"mode": "exact"}, {}, "language"),
        ({}, {"mode": "shadow"}, {}, ""),
        ({"text": None}, {}, {}, "no_text"),
        ({"text": ""}, {}, {}, "no_text"),
        ({"declares_tools": True}, {}, {}, "tools"),
        ({"declares_tools": True}, {}, {"semantic_with_tools": True}, ""),
        ({"tool_turns": True}, {}, {}, "tool_turns"),
        ({"tool_turns": True}, {}, {"semantic_with_tools": True}, "tool_turns"),
        ({"other_parts": True}, {}, {}, "parts"),
        ({"choices": 2}, {}, {}, "choices"),
        ({"text": "And the second one?"}, {}, {}, "anaphoric"),
        ({"text": "yes"}, {}, {}, "anaphoric"),
        ({"text": "Còn cái thứ hai?"}, {}, {"languages": None}, "anaphoric"),
        ({"text": "Where is my refund?"}, {}, {}, ""),
        ({"text": "Where is my refund?", "turns": 2}, {}, {}, "short_turn"),
        ({"text": "Where is my airline ticket refund?", "turns": 2}, {}, {}, ""),
        ({"turns": 5, "text": "How do I reset my forgotten account password?"}, {}, {}, ""),
        ({"text": "Làm thế nào để đặt lại mật khẩu?"}, {}, {}, "language"),
        ({"text": "Làm thế nào để đặt lại mật khẩu?"}, {}, {"languages": None}, ""),
        (
            {"text": "Làm thế nào để đặt lại mật khẩu?"},
            {},
            {"languages": frozenset({"en", "vi"})},
            "",
        ),
        ({"text": "Как мне сбросить мой пароль?"}, {}, {}, "language"),
        ({"text": "Wie kann ich mein Passwort für das Konto ändern?"}, {}, {}, "language"),
    ],
)
def test_what_is_matched_exactly_only(
    request_: dict[str, Any], asked: dict[str, Any], policy: dict[str, Any], reason: str
) -> None:
    """I2: where a neighbour in meaning may still be a stranger, meaning does not decide."""
    request = replace(REQUEST, **request_)
    assert closed(request, replace(ASKED, **asked), replace(POLICY, **policy)) == reason


# ---- choose


def near(similarity: float, text: str = ENTRY.text, **changes: Any) -> Candidate:
    return Candidate(replace(ENTRY, text=text, **changes), similarity)


def judged(
    *candidates: Candidate,
    text: str = "How do I reset my password?",
    asked: Directives = ASKED,
    policy: Policy = POLICY,
) -> Hit | Miss:
    return choose(text, candidates, asked, policy, NOW)


def test_exactly_at_the_threshold_hits_and_one_step_below_does_not() -> None:
    """The threshold itself is near enough; nothing below it is."""
    at, below = near(0.92), near(math.nextafter(0.92, 0.0))
    assert judged(at) == Hit(at.entry, "semantic", 0.92)
    assert judged(below) == Miss("below_threshold", below.similarity)


@pytest.mark.parametrize(
    ("asked", "effective"),
    [(None, 0.92), (0.0, 0.92), (0.5, 0.92), (0.92, 0.92), (0.97, 0.97), (1.0, 1.0)],
)
def test_a_caller_may_raise_the_threshold_and_never_lower_it(
    asked: float | None, effective: float
) -> None:
    """A header can only ask for more care."""
    tighter = Directives(threshold=asked)
    assert isinstance(judged(near(effective), asked=tighter), Hit)
    below = near(math.nextafter(effective, 0.0))
    assert judged(below, asked=tighter) == Miss("below_threshold", below.similarity)


def test_an_empty_shelf_is_a_miss_without_a_similarity() -> None:
    """Nothing was near because nothing was there."""
    assert judged() == Miss("no_entry")


@pytest.mark.parametrize(("max_age", "hits"), [(None, True), (100, True), (99, False), (0, False)])
def test_an_answer_is_served_up_to_the_age_the_caller_accepts(
    max_age: int | None, hits: bool
) -> None:
    """`max-age` counts from the storing, its last second included."""
    asked = Directives(max_age=max_age)
    assert fits(ENTRY, asked, NOW) is hits
    verdict = judged(near(0.99), asked=asked)
    assert isinstance(verdict, Hit) if hits else verdict == Miss("max_age", 0.99)


def test_an_old_neighbour_hides_no_young_one_behind_it() -> None:
    """The next best that fits is served."""
    old, young = near(0.99), near(0.95, created=NOW - 5)
    verdict = judged(old, young, asked=Directives(max_age=10))
    assert verdict == Hit(young.entry, "semantic", 0.95)


def test_a_vetoed_neighbour_is_passed_over_and_counted() -> None:
    """Guards are asked nearest first; the hit behind them says what it passed."""
    text = "How do I turn on dark mode?"
    off, other = near(0.99, "How do I turn off dark mode?"), near(0.93, "How to turn on dark mode?")
    verdict = judged(off, other, text=text)
    assert isinstance(verdict, Hit)
    assert (verdict.entry, verdict.similarity) == (other.entry, 0.93)
    assert len(verdict.vetoes) == 1
    assert verdict.vetoes[0] in GUARDS


def test_when_all_are_vetoed_each_veto_is_counted() -> None:
    """A miss by guard names every guard that spoke, and how near the nearest was."""
    text = "Where is order 48231?"
    verdict = judged(
        near(0.99, "Where is order 48213?"), near(0.95, "Where is order 7?"), text=text
    )
    assert isinstance(verdict, Miss)
    assert (verdict.reason, verdict.similarity, len(verdict.vetoes)) == ("guard", 0.99, 2)


def test_below_the_threshold_no_guard_is_asked() -> None:
    """A veto is counted only where it kept a hit back."""
    verdict = judged(near(0.5, "Where is order 48213?"), text="Where is order 48231?")
    assert verdict == Miss("below_threshold", 0.5)


def test_a_guard_can_be_switched_off() -> None:
    """Then, and only then, the vetoed neighbour is served."""
    text, stored = "How do I turn on dark mode?", near(0.99, "How do I turn off dark mode?")
    assert isinstance(judged(stored, text=text), Miss)
    without = replace(POLICY, guards_off=frozenset(GUARDS))
    assert isinstance(judged(stored, text=text, policy=without), Hit)


SIMILARITIES = st.lists(st.floats(-1, 1), max_size=6).map(lambda found: sorted(found, reverse=True))


@given(SIMILARITIES, st.floats(0, 1), st.none() | st.floats(0, 1))
def test_a_hit_is_never_below_either_threshold(
    similarities: list[float], threshold: float, asked: float | None
) -> None:
    """Whatever the neighbours are."""
    verdict = judged(
        *map(near, similarities),
        policy=replace(POLICY, threshold=threshold, agreement=False),
        asked=Directives(threshold=asked),
    )
    least = max(threshold, asked or 0.0)
    if similarities and similarities[0] >= least:
        assert isinstance(verdict, Hit)
        assert verdict.similarity == similarities[0]
    else:
        assert isinstance(verdict, Miss)


# ---- keep

GOOD = Answer(
    body=b"{}",
    usage=None,
    finished=("stop",),
    terminal=True,
    empty=False,
    refused=False,
    tool_calls=False,
    error=False,
)


@pytest.mark.parametrize(
    ("answer", "status", "choices", "policy", "reason"),
    [
        ({}, 200, 1, {}, ""),
        ({}, 201, 1, {}, "status"),
        ({}, 206, 1, {}, "status"),
        ({}, 304, 1, {}, "status"),
        ({}, 429, 1, {}, "status"),
        ({}, 500, 1, {}, "status"),
        ({}, 0, 1, {}, "status"),
        ({"error": True}, 200, 1, {}, "error"),
        ({"terminal": False}, 200, 1, {}, "cut"),
        ({"refused": True}, 200, 1, {}, "refused"),
        ({"empty": True}, 200, 1, {}, "empty"),
        ({"finished": ("length",)}, 200, 1, {}, "finish"),
        ({"finished": ("content_filter",)}, 200, 1, {}, "finish"),
        ({"finished": ("",)}, 200, 1, {}, "finish"),
        ({"finished": ("STOPPED",)}, 200, 1, {}, "finish"),
        ({"finished": ()}, 200, 1, {}, "finish"),
        ({"finished": ("stop", "stop")}, 200, 1, {}, "finish"),
        ({"finished": ("stop",)}, 200, 2, {}, "finish"),
        ({"finished": ("stop", "stop")}, 200, 2, {}, ""),
        ({"finished": ("stop", "length")}, 200, 2, {}, "finish"),
        ({"tool_calls": True, "finished": ("tool_calls",)}, 200, 1, {}, "tool_calls"),
        ({"tool_calls": True}, 200, 1, {}, "tool_calls"),
        (
            {"tool_calls": True, "finished": ("tool_calls",)},
            200,
            1,
            {"store_tool_calls": True},
            "",
        ),
        ({"finished": ("tool_calls",)}, 200, 1, {}, "finish"),
        ({"body": b"x" * 9}, 200, 1, {"max_answer_bytes": 9}, ""),
        ({"body": b"x" * 10}, 200, 1, {"max_answer_bytes": 9}, "size"),
        *(({"finished": (word,)}, 200, 1, {}, "") for word in sorted(GOOD_ENDINGS)),
    ],
)
def test_only_whole_good_answers_are_kept(
    answer: dict[str, Any], status: int, choices: int, policy: dict[str, Any], reason: str
) -> None:
    """I4: each way of being unfit is enough."""
    verdict = keep(replace(GOOD, **answer), status, choices, replace(POLICY, **policy))
    assert verdict == (Discard(reason) if reason else None)


FAULTS: dict[str, dict[str, Any]] = {
    "error": {"error": True},
    "terminal": {"terminal": False},
    "refused": {"refused": True},
    "tool_calls": {"tool_calls": True},
    "finished": {"finished": ("length",)},
    "empty": {"empty": True},
    "body": {"body": b"x" * 100},
}


@given(st.sets(st.sampled_from(sorted(FAULTS)), min_size=1), st.sampled_from([200, 500]))
def test_no_two_faults_make_a_good_answer(faults: set[str], status: int) -> None:
    """I4: faults do not cancel each other."""
    changes = {name: value for fault in faults for name, value in FAULTS[fault].items()}
    policy = replace(POLICY, max_answer_bytes=50)
    assert keep(replace(GOOD, **changes), status, 1, policy) is not None


QUESTION = "How do I reset my password?"
SAME = ("How can I reset my password?", "How do I reset the password?")


def holding(number: int, similarity: float, text: str, body: bytes, **changes: Any) -> Candidate:
    """A neighbour with a text and an answer of its own."""
    stored = replace(ENTRY, text=text, digest=number.to_bytes(20, "big"), body=body)
    return Candidate(stored, similarity, **changes)


def test_neighbours_that_hold_different_answers_are_a_miss() -> None:
    """Two that are equally near and tell different stories: nobody knows which is right."""
    pair = (holding(1, 0.96, SAME[0], b"one"), holding(2, 0.95, SAME[1], b"two"))
    verdict = choose(QUESTION, pair, ASKED, POLICY, NOW)
    assert isinstance(verdict, Miss)
    assert verdict.reason == "disagreement"
    assert isinstance(choose(QUESTION, pair, ASKED, replace(POLICY, agreement=False), NOW), Hit)


def test_two_that_agree_make_up_for_a_little_but_never_for_what_the_caller_asked() -> None:
    """Support lifts a score over the proxy's threshold, not over the request's own."""
    pair = (holding(1, 0.90, SAME[0], b"one"), holding(2, 0.90, SAME[1], b"one"))
    assert isinstance(choose(QUESTION, pair, ASKED, POLICY, NOW), Hit)
    assert isinstance(choose(QUESTION, pair[:1], ASKED, POLICY, NOW), Miss)
    assert isinstance(choose(QUESTION, pair, Directives(threshold=0.92), POLICY, NOW), Miss)


def test_an_answer_shown_to_be_wrong_is_not_brought_back_by_its_neighbours() -> None:
    """The floor of an entry holds however many agree with it."""
    pair = (
        holding(1, 0.95, SAME[0], b"one", floor=0.97),
        holding(2, 0.95, SAME[1], b"one", floor=0.97),
    )
    verdict = choose(QUESTION, pair, ASKED, POLICY, NOW)
    assert isinstance(verdict, Miss)
    assert verdict.vetoes == ("floor", "floor")


def test_what_was_shown_to_be_wrong_lends_no_support() -> None:
    """It may speak against an answer, and not for one."""
    pair = (holding(1, 0.95, SAME[0], b"one", floor=0.97), holding(2, 0.90, SAME[1], b"one"))
    assert isinstance(choose(QUESTION, pair, ASKED, POLICY, NOW), Miss)


def test_a_threshold_above_every_cosine_is_not_helped_over() -> None:
    """Wrong hits have switched meaning off: however many agree, nothing is served by it."""
    pair = (holding(1, 0.99, SAME[0], b"one"), holding(2, 0.99, SAME[1], b"one"))
    off = replace(POLICY, threshold=1.01)
    assert isinstance(choose(QUESTION, pair, ASKED, off, NOW), Miss)
