"""The threshold in force: stricter where wrong hits were found, for those requests only."""

from __future__ import annotations

import pytest

from cache_proxy.dial import Dial, Labels
from cache_proxy.tally import Tally, labels


def pool(right: dict[int, int] | None = None, wrong: dict[int, int] | None = None) -> Labels:
    return Labels(dict(right or {}), dict(wrong or {}))


def test_nothing_learnt_is_the_configured_threshold() -> None:
    """Also where a few audits came out well, or one came out badly."""
    dial = Dial(0.92, 0.01)
    assert dial.threshold("m") == 0.92
    assert not dial.learn("m", 0.95, wrong=True)
    assert not dial.learn("m", 0.95, wrong=False)
    assert dial.tightened == {}


def test_the_threshold_rises_above_the_bins_that_wrong_hits_lie_in() -> None:
    """No further than needed: what scores higher is served as before."""
    dial = Dial(0.92, 0.01)
    dial.learn("m", 0.934, wrong=True)
    assert dial.learn("m", 0.941, wrong=True)
    assert dial.threshold("m") == 0.94
    assert dial.tightened == {"m": 0.94}


def test_one_route_pays_for_its_own_wrong_hits_only() -> None:
    """A model whose answers go astray costs no other its hits."""
    dial = Dial(0.92, 0.01)
    dial.learn("astray", 0.93, wrong=True)
    dial.learn("astray", 0.93, wrong=True)
    assert (dial.threshold("astray"), dial.threshold("fine")) == (0.94, 0.92)


def test_enough_clean_audits_loosen_it_again_and_never_below_what_is_configured() -> None:
    """Two wrong ones of two thousand keep a budget of 1 %."""
    dial = Dial(0.92, 0.01, {"m": pool(right={93: 10}, wrong={93: 2})})
    assert dial.threshold("m") == 0.94
    for _ in range(2_000):
        dial.learn("m", 0.93, wrong=False)
    assert dial.threshold("m") == 0.92


def test_after_a_restart_it_is_where_it_was() -> None:
    """The same labels, told one by one or all at once, give the same threshold."""
    learnt = Dial(0.92, 0.01)
    for score in (0.925, 0.955, 0.971):
        learnt.learn("m", score, wrong=True)
    told = Dial(0.92, 0.01, {"m": pool(wrong={92: 1, 95: 1, 97: 1})})
    assert told.threshold("m") == learnt.threshold("m") > 0.95


def test_labels_that_grew_old_no_longer_count() -> None:
    """What is told anew takes the place of all that was known."""
    dial = Dial(0.92, 0.01, {"m": pool(wrong={95: 2}), "n": pool(wrong={93: 2})})
    dial.relearn({"n": pool(wrong={93: 2})})
    assert dial.tightened == {"n": 0.94}


def test_labels_of_another_encoder_say_nothing_about_this_ones_scores() -> None:
    """0.95 is near for one and far for another."""
    told = {"wrong.95.aaaa": 2, "right.93.bbbb": 5, "wrong.93": 7}
    tally = Tally({("label.audit", detail): n for detail, n in told.items()})
    tally["label.report", "wrong.96.aaaa"] = 1
    assert labels(tally, "audit", encoder="aaaa") == pool(wrong={95: 2})
    assert labels(tally, "audit", "report", encoder="aaaa") == pool(wrong={95: 2, 96: 1})
    assert labels(tally, "audit", encoder="bbbb") == pool(right={93: 5})


def test_model_names_are_a_callers_words_and_their_number_is_bounded() -> None:
    """I7: beyond two hundred they share one pool; odd ones share it from the start."""
    dial = Dial(0.92, 0.01)
    for number in range(300):
        dial.learn(f"m{number}", 0.93, wrong=True)
    assert dial.threshold("m0") == 0.92
    assert dial.threshold("m250") == dial.threshold("never seen") == pytest.approx(0.94)
