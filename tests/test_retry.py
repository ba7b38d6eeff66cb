"""Asking again: which answers, how soon, within which budget, and never inside a ban."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.upstream.retry import (
    RetryBudget,
    Retrying,
    Windows,
    may_pass,
    retry_after,
)

CLOCK = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504, 529, 599])
def test_what_may_pass_is_asked_again(status: int) -> None:
    """The named ones and every 5xx; unless upstream itself says no."""
    assert may_pass(status, [])
    assert may_pass(status, [(b"x-should-retry", b"true")])
    assert not may_pass(status, [(b"x-should-retry", b"false")])


@pytest.mark.parametrize("status", [200, 201, 301, 400, 401, 402, 403, 404, 413, 422, 451, 499])
def test_what_will_not_pass_is_not(status: int) -> None:
    """An answer, a refusal of the request or of the credential stays what it is."""
    assert not may_pass(status, [])
    assert not may_pass(status, [(b"x-should-retry", b"true")])


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": " 0.5 "}, 0.5),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:30 GMT"}, 10.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:10 GMT"}, 0.0),
        ({"retry-after": "Tue, 14 Nov 2023 22:13:30 -0000"}, 10.0),
        ({"retry-after": "Tue Nov 14 22:13:30 2023"}, 10.0),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "soon", "retry-after": "9"}, 9.0),
        ({"retry-after": "999999999"}, 86_400.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e9"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "next week"}, None),
        ({"retry-after": "Tue, 99 Nov 2023 22:13:30 GMT"}, None),
    ],
)
def test_retry_after_in_all_its_spellings(headers: dict[str, str], seconds: float | None) -> None:
    """Seconds, milliseconds (which go first) or a date; nonsense says nothing."""
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    assert retry_after(pairs, CLOCK) == seconds


@given(st.binary(max_size=40))
def test_no_header_breaks_the_reading(value: bytes) -> None:
    """Whatever upstream writes, it is a number within a day or nothing."""
    told = retry_after([(b"retry-after", value)], CLOCK)
    assert told is None or 0 <= told <= 86_400


def test_full_jitter_grows_and_is_capped() -> None:
    """Between nothing and the doubled base, eight seconds at most."""
    retrying = Retrying()
    tops = [retrying.pause(attempt, None, 1.0) for attempt in range(1, 8)]
    assert tops == [0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0]
    assert retrying.pause(3, None, 0.0) == 0.0
    assert retrying.pause(3, None, 0.25) == 0.5


@given(st.floats(0.001, 20), st.floats(0, 1, exclude_max=True))
def test_whoever_was_told_when_comes_then(told: float, dice: float) -> None:
    """Never before, and at most a tenth later."""
    assert told <= Retrying().pause(1, told, dice) <= told * 1.1


def test_a_storm_of_failures_is_amplified_by_a_fifth_at_most() -> None:
    """Fifty requests a second for a minute, all failing, each ready to try three times."""
    budget, dice, attempts = RetryBudget(0.2), random.Random(1), 0
    pending: list[tuple[float, int]] = [(n / 50, 1) for n in range(3_000)]
    while pending:
        now, tried = min(pending)
        pending.remove((now, tried))
        attempts += 1
        if tried == 1:
            budget.asked(now)
        if tried < 3 and budget.spend(now):
            pending.append((now + Retrying().pause(tried, None, dice.random()), tried + 1))
    assert 3_300 < attempts <= 3_600


@given(st.lists(st.tuples(st.floats(0, 3), st.booleans()), max_size=200))
def test_no_ten_seconds_hold_more_retries_than_their_share(
    steps: list[tuple[float, bool]],
) -> None:
    """A fifth of the requests or three, whichever is more, in any ten seconds."""
    budget, now = RetryBudget(0.2), 0.0
    asked: list[float] = []
    spent: list[float] = []
    for step, wants in steps:
        now += step
        if wants and budget.spend(now):
            spent.append(now)
            # Counted by whole seconds: nine are surely within.
            requests = sum(now - then <= 10 for then in asked)
            assert sum(now - then <= 9 for then in spent) <= max(3, 0.2 * requests)
        elif not wants:
            budget.asked(now)
            asked.append(now)


def test_a_quiet_proxy_may_retry_three_times_in_ten_seconds() -> None:
    """The floor: a fifth of one request would be none."""
    budget = RetryBudget(0.2)
    budget.asked(0)
    assert [budget.spend(n / 10) for n in range(5)] == [True, True, True, False, False]
    assert budget.spend(10.5)
    assert not RetryBudget(0.0).spend(0)


def test_a_ban_holds_for_its_own_key_until_it_is_over() -> None:
    """Others are not held up by it, and a shorter one does not lift it."""
    windows = Windows()
    windows.close("mine", 5, now=100)
    windows.close("mine", 1, now=101)
    assert windows.left("mine", 102) == (3, 5)
    assert windows.left("yours", 102) == (0, 0)
    assert windows.left("mine", 105) == (0, 0)
    windows.close("mine", 5, now=106)
    windows.close("mine", 9, now=107)
    assert windows.left("mine", 107) == (9, 9)


def test_bans_are_kept_in_bounded_number() -> None:
    """I7: models are named by clients; the oldest bans go first."""
    windows = Windows()
    for n in range(5_000):
        windows.close(n, 60, now=float(n) / 1_000)
    assert windows.left(0, 5) == (0, 0)
    assert windows.left(4_999, 5)[0] > 59
    assert len(windows._until) == 4_096
