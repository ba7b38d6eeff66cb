"""The promise of a certificate: what is printed holds, on the data and on what comes after it."""

from __future__ import annotations

import math
import random
from bisect import bisect_left
from collections.abc import Callable
from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_proxy.certify import (
    CANDIDATES,
    TUNE_SHARE,
    Certificate,
    Count,
    NotCertifiable,
    Pair,
    Pool,
    certify,
    count,
    fewest,
    interval,
    lower_bound,
    plan,
    split,
    upper_bound,
)

RATES = (0.001, 0.004, 0.01, 0.03, 0.1, 0.3, 0.5)


def chances(size: int, rate: float) -> list[float]:
    """The chance of each number of wrong hits among `size`, term by term."""
    return [math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(size + 1)]


# --- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "needed"),
    [
        (0.05, (59, 93, 124, 153, 208)),
        (0.02, (149, 236, 313, 386, 523)),
        (0.01, (299, 473, 628, 773, 1049)),
        (0.005, (598, 947, 1258, 1549, 2100)),
    ],
)
def test_labels_needed_are_those_of_the_published_table(
    budget: float, needed: tuple[int, ...]
) -> None:
    """With 0, 1, 2, 3 and 5 wrong, one label less does not pass and that many do."""
    for wrong, least in zip((0, 1, 2, 3, 5), needed, strict=True):
        assert fewest(wrong, budget, 0.95) == least
        assert upper_bound(wrong, least, 0.95) <= budget < upper_bound(wrong, least - 1, 0.95)


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.99])
@pytest.mark.parametrize("size", [1, 2, 7, 23, 40])
def test_the_bound_is_exact(size: int, confidence: float) -> None:
    """In whole fractions: so few wrong are too unlikely at the bound, and not a hair below it."""

    def at_most(wrong: int, rate: Fraction) -> Fraction:
        terms = (math.comb(size, k) * rate**k * (1 - rate) ** (size - k) for k in range(wrong + 1))
        return sum(terms, Fraction())

    hair = Fraction(1, 10**9)
    for wrong in range(size):
        bound = Fraction(upper_bound(wrong, size, confidence))
        assert at_most(wrong, bound + hair) < 1 - confidence < at_most(wrong, bound - hair)
    assert upper_bound(size, size, confidence) == 1.0


@pytest.mark.parametrize(
    ("wrong", "size"), [(0, 50_000), (40, 20_000), (1_000, 100_000), (2_000, 4_000)]
)
def test_the_bound_holds_at_the_size_of_real_traffic(wrong: int, size: int) -> None:
    """The binomial terms added up one by one, in logarithms, say the same."""
    bound = upper_bound(wrong, size, 0.95)
    total = math.fsum(
        math.exp(
            math.lgamma(size + 1) - math.lgamma(k + 1) - math.lgamma(size - k + 1)
            + k * math.log(bound) + (size - k) * math.log1p(-bound)
        )
        for k in range(wrong + 1)
    )  # fmt: skip
    assert total == pytest.approx(0.05, rel=1e-6)


def test_the_interval_of_nothing_and_of_everything() -> None:
    """No audits: no rate, and anything may be true. None wrong, all wrong: one end is closed."""
    assert interval(0, 0) == (None, 0.0, 1.0)
    rate, low, high = interval(0, 20)
    assert (rate, low) == (0.0, 0.0)
    assert high == pytest.approx(1 - 0.025 ** (1 / 20))
    rate, low, high = interval(20, 20)
    assert (rate, high) == (1.0, 1.0)
    assert low == pytest.approx(0.025 ** (1 / 20))
    assert interval(2, 500).low == lower_bound(2, 500, 0.975)
    assert interval(2, 500, 0.99).high > interval(2, 500).high > interval(2, 500, 0.8).high


@pytest.mark.parametrize("size", [1, 10, 60, 300])
def test_the_interval_covers_every_true_rate_at_least_that_often(size: int) -> None:
    """Not sampled but added up: the chance of every count whose interval holds the true rate."""
    held = [interval(wrong, size) for wrong in range(size + 1)]
    for rate in RATES:
        covered = sum(
            chance
            for chance, (_, low, high) in zip(chances(size, rate), held, strict=True)
            if low <= rate <= high
        )
        assert covered >= 0.95 - 1e-9


@pytest.mark.parametrize("size", [50, 200, 700])
def test_the_printed_interval_covers_the_true_rate_in_19_of_20_simulated_runs(size: int) -> None:
    """2,500 rounds of audits for each true rate of wrong hits."""
    dice = random.Random(size)
    held = [interval(wrong, size) for wrong in range(size + 1)]
    for rate in RATES:
        reached = list(accumulate(chances(size, rate)))
        runs = [held[min(size, bisect_left(reached, dice.random()))] for _ in range(2_500)]
        assert sum(low <= rate <= high for _, low, high in runs) >= 0.95 * len(runs)


@pytest.mark.parametrize(
    "ask",
    [
        lambda: upper_bound(-1, 5, 0.95),
        lambda: upper_bound(6, 5, 0.95),
        lambda: upper_bound(1, 5, 1.0),
        lambda: fewest(0, 0.0, 0.95),
        lambda: fewest(0, 1.0, 0.95),
        lambda: certify([(0.9, True)], 1.5),
    ],
)
def test_counts_that_cannot_be_are_refused(ask: Callable[[], object]) -> None:
    """More wrong than served, or a confidence of certainty, is a bug of the caller's."""
    with pytest.raises(ValueError, match="lie"):
        ask()


# --- the search ---------------------------------------------------------------------------------


def labels(*groups: tuple[float, int, int]) -> list[tuple[float, bool]]:
    """Scored pairs from (score, right, wrong)."""
    return [
        (score, same)
        for score, right, wrong in groups
        for same, times in ((True, right), (False, wrong))
        for _ in range(times)
    ]


def test_a_score_exactly_at_the_threshold_is_served() -> None:
    """As in serving; the next float below is not."""
    below = math.nextafter(0.9, 0)
    assert count([(0.9, True), (below, False)], (0.9, 0.89)) == (
        Count(0.9, 1, 0),
        Count(0.89, 2, 1),
    )


def test_the_loosest_threshold_that_keeps_the_budget_is_certified() -> None:
    """Clean down to 0.85, and only wrong below: 0.85 it is, with its own bound."""
    data = labels((0.95, 60, 0), (0.85, 40, 0), (0.80, 0, 30))
    certified = certify(data, 0.05, 0.95)
    assert certified == Certificate(0.85, 100, 0, upper_bound(0, 100, 0.95))


def test_the_first_failure_ends_the_scan() -> None:
    """A looser candidate that would pass by itself is not reached: asking many costs confidence."""
    data = labels((0.97, 70, 0), (0.95, 0, 5), (0.90, 500, 0))
    assert certify(data, 0.05, candidates=(0.9,)) == Certificate(
        0.9, 575, 5, upper_bound(5, 575, 0.95)
    )
    assert certify(data, 0.05, candidates=(0.97, 0.95, 0.9)) == Certificate(
        0.97, 70, 0, upper_bound(0, 70, 0.95)
    )


def test_a_candidate_with_too_few_hits_is_passed_over_and_not_failed() -> None:
    """58 clean hits cannot show 5 %; the 59th can."""
    assert certify(labels((0.95, 58, 0), (0.9, 1, 0)), 0.05) == Certificate(
        0.9, 59, 0, upper_bound(0, 59, 0.95)
    )
    assert certify(labels((0.95, 58, 0)), 0.05) == NotCertifiable(1)


def test_no_threshold_is_certified_below_the_lowest_labelled_score() -> None:
    """Labels of hits at 0.92 say nothing about what 0.80 would let in, nor about 0.90."""
    certified = certify(labels((0.97, 400, 0), (0.9213, 10, 0)), 0.01)
    assert isinstance(certified, Certificate)
    assert certified.threshold == 0.92


def test_nothing_is_certified_from_nothing() -> None:
    """No labels: the whole 299 of a 1 % budget are needed."""
    assert certify([], 0.01) == NotCertifiable(299)
    assert certify(labels((0.9, 0, 3)), 0.01) == NotCertifiable(299)
    assert certify(labels((1.0, 0, 3)), 0.01) == NotCertifiable(773 - 3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from((0.97, 0.93, 0.91, 0.88, 0.71)),
            st.integers(0, 40),
            st.integers(0, 3),
        ),
        max_size=6,
    )
)
def test_the_labels_said_to_be_needed_are_just_enough(
    groups: list[tuple[float, int, int]],
) -> None:
    """With that many clean hits more there is a certificate, with one less there is none."""
    data = labels(*groups)
    verdict = certify(data, 0.1)
    if isinstance(verdict, NotCertifiable):
        clean = labels((1.0, verdict.needed, 0))
        assert isinstance(certify(data + clean, 0.1), Certificate)
        assert verdict.needed == 1 or isinstance(certify(data + clean[1:], 0.1), NotCertifiable)


# Score -> the true chance that serving there is wrong. The budget of the simulation is 5 %.
WORLDS: dict[str, Callable[[float], float]] = {
    "a little over the budget everywhere": lambda score: 0.052,
    "wrong at the very top, fine below": lambda score: 0.12 if score > 0.98 else 0.02,
    "wrong from 0.9 on down": lambda score: 0.01 if score > 0.9 else 0.3,
    "slowly worse": lambda score: (1 - score) * 0.5,
}
ASKED = tuple(step / 50 for step in range(49, 29, -1))
SIMULATED = 600


def wrong_share(threshold: float, wrong: Callable[[float], float]) -> float:
    """The true one, scores being spread evenly over 0.6 to 1."""
    steps = [threshold + (1 - threshold) * (at + 0.5) / 1_000 for at in range(1_000)]
    return sum(map(wrong, steps)) / 1_000


@pytest.mark.parametrize("world", WORLDS)
def test_a_certified_threshold_breaks_its_budget_in_at_most_1_of_20_runs(world: str) -> None:
    """Whole runs, plan and all: each draws its own labels, and the truth is known."""
    dice = random.Random(world)
    truly = {threshold: wrong_share(threshold, WORLDS[world]) for threshold in ASKED}
    broken = certified = 0
    for _ in range(SIMULATED):
        scores = (0.6 + 0.4 * dice.random() for _ in range(500))
        data = [(score, dice.random() >= WORLDS[world](score)) for score in scores]
        tuning = data[: int(500 * TUNE_SHARE)]
        asked = plan(tuning, 0.05, candidates=ASKED)
        verdict = certify(data[len(tuning) :], 0.05, candidates=asked)
        if isinstance(verdict, Certificate):
            certified += 1
            broken += truly[verdict.threshold] > 0.05
    assert broken <= 0.05 * SIMULATED
    assert certified > 0


def test_taking_any_candidate_that_passes_would_break_the_promise() -> None:
    """Why the scan stops: the same worlds without it certify luck more often than 1 in 20."""
    wrong = WORLDS["a little over the budget everywhere"]
    dice = random.Random(1)
    lucky = 0
    for _ in range(SIMULATED):
        scores = (0.6 + 0.4 * dice.random() for _ in range(375))
        data = [(score, dice.random() >= wrong(score)) for score in scores]
        lucky += any(
            known.served >= fewest(known.wrong, 0.05, 0.95) for known in count(data, ASKED)
        )
    assert lucky > 0.07 * SIMULATED


def test_the_plan_steps_over_wrong_labels_among_the_nearest() -> None:
    """Where strict candidates are hopeless, the scan begins where there is a chance."""
    data = labels((0.995, 160, 5), (0.9, 1_000, 0))
    assert certify(data, 0.02) == NotCertifiable(523 - 165)
    asked = plan(labels((0.995, 53, 2), (0.9, 333, 0)), 0.02)
    assert asked[0] == 0.9
    assert isinstance(certify(data, 0.02, candidates=asked), Certificate)


def test_the_plan_of_clean_or_no_pairs_leaves_little_out() -> None:
    """It begins where as many pairs again would pass, never below, and anywhere without data."""
    assert plan([], 0.01) == CANDIDATES
    asked = plan(labels((0.99, 200, 0), (0.9, 200, 0)), 0.01)
    assert asked == CANDIDATES


# --- splitting ----------------------------------------------------------------------------------


def test_a_pair_stays_on_its_side() -> None:
    """Whatever the order of pairs and texts, the case and the spacing; on every machine alike."""
    pairs = [
        Pair(f"How do I open file {n}?", f"How can I open file {n}?", True) for n in range(400)
    ]
    tune, certifying = split(pairs)
    turned = [Pair(b.upper(), f"  {a}\n", False) for a, b, _ in reversed(pairs)]
    tuned_again, _ = split(turned)
    assert [pair.b.strip() for pair in reversed(tuned_again)] == [pair.a for pair in tune]
    assert sorted(tune + certifying) == sorted(pairs)
    assert 0.2 < len(tune) / len(pairs) < 0.3
    # Pinned: a hash that changes would move pairs from one side to the other.
    assert [pair.a for pair in tune[:2]] == ["How do I open file 3?", "How do I open file 5?"]


# --- labels as they come in ---------------------------------------------------------------------


def test_a_pool_counts_each_label_in_its_hundredth() -> None:
    """A score on an edge belongs above it, floats or not; nothing falls outside."""
    pool = Pool()
    for hundredth in range(101):
        pool = pool.add(hundredth / 100, True)
    assert pool.bins == dict.fromkeys(range(101), (1, 0))
    assert Pool().add(math.nextafter(0.92, 0), False).bins == {91: (0, 1)}
    assert Pool().add(1.0004, True).add(-0.2, False).bins == {100: (1, 0), 0: (0, 1)}


def test_pools_merge_into_the_pool_of_all_their_labels() -> None:
    """Of two processes; and neither is changed by it."""
    one = Pool().add(0.93, True).add(0.95, False)
    other = Pool().add(0.93, False).add(0.99, True)
    both = one.merged(other)
    assert both.bins == {93: (1, 1), 95: (0, 1), 99: (1, 0)}
    assert (both.right, both.wrong) == (2, 2)
    assert both.at(0.95) == Count(0.95, 2, 1)
    assert one.bins == {93: (1, 0), 95: (0, 1)}
    assert both.bins == other.merged(one).bins


def test_a_pool_certifies_what_its_labels_would() -> None:
    """The same scan over the edges of its bins, and no further down than labels lie."""
    data = labels((0.975, 300, 0), (0.93, 250, 1), (0.85, 5, 9))
    pool = Pool()
    for score, right in data:
        pool = pool.add(score, right)
    edges = tuple(edge / 100 for edge in range(100, 59, -1))
    assert pool.loosest(0.01) == certify(data, 0.01, candidates=edges)
    assert pool.loosest(0.01) == Certificate(0.86, 551, 1, upper_bound(1, 551, 0.95))
    assert Pool().loosest(0.01) == NotCertifiable(299)
    assert Pool({97: (298, 0), 80: (0, 0)}).loosest(0.01) == NotCertifiable(1)
