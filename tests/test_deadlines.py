"""What deadlines promise (I6): one bound a request, never above the client's own, and learnt ones
that neither creep up nor cut a slow model off.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest

from cache_proxy.upstream.deadlines import Deadlines, Learnt, Limits, expected_tokens, patience

SET = Deadlines(total=300, models=(("gpt-4.1*", 120), ("claude-*", 180), ("*", 20)))


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ([], None),
        ([(b"x-stainless-read-timeout", b"600.0")], 600),
        ([(b"x-stainless-read-timeout", b"2")], 2),
        ([(b"accept", b"*/*"), (b"x-stainless-timeout", b"90")], 90),
        ([(b"x-stainless-read-timeout", b"0")], None),
        ([(b"x-stainless-read-timeout", b"soon")], None),
        ([(b"x-stainless-read-timeout", b"-5")], None),
        ([(b"x-stainless-read-timeout", b"1e9")], None),
        ([(b"x-stainless-read-timeout", b"99999999999")], None),
    ],
)
def test_the_clients_own_time_out_is_read_from_what_sdks_send(
    headers: list[tuple[bytes, bytes]], seconds: float | None
) -> None:
    """What is no plain number of seconds is no hint."""
    assert patience(headers) == seconds


@pytest.mark.parametrize(
    ("document", "tokens"),
    [
        ({}, 0),
        ({"max_tokens": 500}, 500),
        ({"max_tokens": 500, "max_completion_tokens": 700}, 700),
        ({"max_output_tokens": 9}, 9),
        ({"generationConfig": {"maxOutputTokens": 8}}, 8),
        ({"generationConfig": [8]}, 0),
        ({"max_tokens": "500"}, 0),
        ({"max_tokens": True}, 0),
        ({"max_tokens": -1}, 0),
        ({"max_tokens": None, "max_completion_tokens": 1.5}, 0),
    ],
)
def test_expected_tokens_are_the_bound_that_the_request_sets(
    document: dict[str, object], tokens: int
) -> None:
    """In any protocol's spelling; what is no count is no bound."""
    assert expected_tokens(document) == tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("hint", "seconds"), [(None, 600), (20.0, 20), (1_800.0, 1_800)])
def test_unset_the_clients_own_time_out_counts_and_else_the_sdks_default(
    stream: bool, hint: float | None, seconds: float
) -> None:
    """Nobody configured anything: nothing is cut that was not cut before."""
    expected = Limits(seconds, seconds, seconds, set=False)
    assert Deadlines().limits("gpt-4.1", 4_000, stream=stream, hint=hint) == expected


@pytest.mark.parametrize(
    ("model", "tokens", "hint", "seconds"),
    [
        ("gpt-4.1-mini", 0, None, 120),
        ("gpt-4.1-mini", 1_000, None, 170),
        ("claude-sonnet-4", 2_000, None, 280),
        ("claude-sonnet-4", 2_400, None, 300),
        ("claude-sonnet-4", 2_401, None, 300),
        ("claude-sonnet-4", 10**15, None, 300),
        ("other", 100, None, 25),
        ("claude-sonnet-4", 2_400, 60.0, 60),
        ("claude-sonnet-4", 2_400, 1_800.0, 300),
        ("other", 100, 24.9, 24.9),
    ],
)
def test_a_deadline_is_base_plus_tokens_at_most_the_total_and_the_clients_own(
    model: str, tokens: int, hint: float | None, seconds: float
) -> None:
    """base(model) + 50 ms x max_tokens; first glob that matches."""
    limits = SET.limits(model, tokens, stream=False, hint=hint)
    assert limits.model == pytest.approx(seconds)
    assert limits.set
    assert limits.journey == min(300, hint or 300)


def test_a_model_without_a_base_gets_the_total() -> None:
    """No guess for models that nobody named; and without a total, what holds unset."""
    assert Deadlines(total=50).limits("m", 9_000, stream=False, hint=None).model == 50
    named = Deadlines(models=(("a", 10),))
    assert named.limits("b", 9_000, stream=False, hint=None).model == 600
    assert named.limits("a", 0, stream=False, hint=None).model == 10
    assert named.limits("a", 10**9, stream=False, hint=40).model == 40


@pytest.mark.parametrize(
    ("deadlines", "hint", "first", "idle"),
    [
        (Deadlines(total=30), None, 600, 600),
        (Deadlines(total=30, models=(("*", 5),)), 60.0, 60, 60),
        (Deadlines(first_byte=20), None, 20, 600),
        (Deadlines(first_byte=20, idle=7), None, 20, 7),
        (Deadlines(first_byte=20, idle=7), 10.0, 10, 7),
        (Deadlines(idle=7), 5.0, 5, 5),
    ],
)
def test_a_stream_is_bound_by_its_first_byte_and_its_silences_only(
    deadlines: Deadlines, hint: float | None, first: float, idle: float
) -> None:
    """A long answer that keeps coming is never cut, whatever the total."""
    limits = deadlines.limits("gpt-4.1", 4_000, stream=True, hint=hint)
    assert limits == Limits(first, first, idle, set=True)


# Learnt -----------------------------------------------------------------------------------------

CONFIGURED = 300.0
Draw = Callable[[], float]


def run(learnt: Learnt, calls: int, draw: Draw) -> Iterator[tuple[float, float, bool]]:
    """Ask so many times a model whose answers take `draw()`: limit, time and whether it was cut."""
    for _ in range(calls):
        limit, takes = learnt.limit("m", CONFIGURED), draw()
        if takes <= limit:
            learnt.answered("m", takes)
        elif limit < CONFIGURED:
            learnt.cut("m")
        yield limit, takes, takes > limit


def spread(median: float, seed: int = 7) -> Draw:
    """Uneven as answers are: one in a hundred takes six times the median."""
    dice = random.Random(seed)
    return lambda: median * dice.lognormvariate(0, 0.8)


def test_nothing_is_learnt_from_a_few_answers() -> None:
    """Up to the 32nd the configured limit stands."""
    learnt = Learnt()
    limits = [limit for limit, _, _ in run(learnt, 33, lambda: 1.0)]
    assert limits == [CONFIGURED] * 32 + [10.0]


def test_a_learnt_limit_cuts_off_hardly_any_good_answer() -> None:
    """Fewer than one in a thousand of very uneven ones, at a fifth of the configured time."""
    learnt = Learnt()
    told = list(run(learnt, 20_000, spread(2.0)))
    assert sum(cut for _, _, cut in told) <= 20
    assert max(limit for limit, _, cut in told[100:] if limit < CONFIGURED) < 90


def test_a_model_that_hangs_teaches_nothing() -> None:
    """Time-outs put no figure in: the limit of quick answers stands after any number of them."""
    learnt = Learnt()
    list(run(learnt, 300, spread(2.0)))
    before = min(learnt.limit("m", CONFIGURED), CONFIGURED)
    hung = list(run(learnt, 500, lambda: 1e9))
    assert {limit for limit, _, _ in hung} == {before, CONFIGURED}
    assert sum(limit == before for limit, _, _ in hung) >= 250
    assert [limit for limit, _, _ in run(learnt, 3, lambda: 1.0)][-1] == before


def test_a_limit_does_not_creep_up_by_what_it_lets_through() -> None:
    """One call in twenty hangs for a random while: ten thousand calls later the limit is still
    that of the model's own answers."""
    learnt, quick, dice = Learnt(), spread(2.0), random.Random(3)

    def draw() -> float:
        return dice.uniform(400, 10_000) if dice.random() < 0.05 else quick()

    told = [limit for limit, _, _ in run(learnt, 10_000, draw) if limit < CONFIGURED]
    tenth = len(told) // 10
    assert max(told[-tenth:]) < 90
    assert max(told[-tenth:]) < 3 * max(told[tenth : 2 * tenth])


@pytest.mark.parametrize("slower", [10, 20, 60])
def test_a_model_that_becomes_slow_is_not_cut_off_for_ever(slower: float) -> None:
    """What it takes now is soon known, though hardly anything comes within the old limit."""
    learnt = Learnt()
    list(run(learnt, 300, lambda: 2.0))
    told = list(run(learnt, 200, lambda: 2.0 * slower))
    assert sum(cut for _, _, cut in told) <= 4
    assert not any(cut for _, _, cut in told[-150:])


def test_a_learnt_limit_never_exceeds_the_configured_one_nor_falls_below_its_floor() -> None:
    """Both ends are the operator's."""
    learnt = Learnt()
    assert max(limit for limit, _, _ in run(learnt, 500, lambda: 299.0)) == CONFIGURED
    quick = Learnt()
    assert min(limit for limit, _, _ in run(quick, 500, lambda: 0.01)) == 10.0
    assert quick.limit("m", 4.0) == 4.0


def test_models_do_not_teach_one_another_and_memory_is_bounded() -> None:
    """I7: the names are the clients'; the oldest go."""
    learnt = Learnt(most_keys=10)
    list(run(learnt, 40, lambda: 1.0))
    assert learnt.limit("another", CONFIGURED) == CONFIGURED
    for n in range(10):
        learnt.answered(n, 1.0)
    assert learnt.limit("m", CONFIGURED) == CONFIGURED
