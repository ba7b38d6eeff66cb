"""The learned score: one number on the cosine scale."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.guards import facts
from cache_proxy.score import FEATURES, WEIGHTS, adjusted, features, read

ASKED = facts("How do I reset my password?")
STORED = facts("How can I reset my password?")
COSINES = st.floats(-1, 1, allow_nan=False)


@given(COSINES)
def test_without_a_lens_the_cosine_stands(cosine: float) -> None:
    """Another encoder has no learned similarity, and its threshold means what it says."""
    assert adjusted(cosine, None, ASKED, STORED) == cosine


@given(COSINES, COSINES, COSINES)
def test_more_alike_never_counts_as_less(one: float, other: float, learned: float) -> None:
    """The score never falls as the cosine or the learned similarity rises, and stays a cosine."""
    low, high = sorted((one, other))
    assert adjusted(low, learned, ASKED, STORED) <= adjusted(high, learned, ASKED, STORED)
    assert adjusted(learned, low, ASKED, STORED) <= adjusted(learned, high, ASKED, STORED)
    assert -1.0 <= adjusted(one, learned, ASKED, STORED) <= 1.0


@pytest.mark.parametrize(
    ("stored", "part", "function"),
    [
        ("What is a closure?", 0.0, 0.0),
        ("What is a closure in Swift?", 1.0, 1.0),
        ("So what are closures, and what is one for?", 0.0, 6.0),
        ("What is a mutex?", 0.0, 0.0),
    ],
    ids=["the same", "one adds", "put in other words", "each has its own"],
)
def test_the_score_sees_what_one_adds_and_how_both_are_put(
    stored: str, part: float, function: float
) -> None:
    """A text that only adds to the other is told from one that says something else, and little
    words from telling ones."""
    told = features(1.0, 1.0, facts("What is a closure?"), facts(stored))
    assert told[FEATURES.index("part")] == part
    assert told[FEATURES.index("function")] == function


def test_a_long_frame_counts_no_more_than_a_frame() -> None:
    """However many little words stand around it, they carry no other question over."""
    told = [
        features(1.0, 1.0, ASKED, facts(f"{frame} how do I reset my password?"))
        for frame in ("so if you or he or they would be with me and at it on or off this,",
                      "so if you or he or they would be with me and at it on or off this, for what"
                      " or whom it was, from where and when, by which of those and why,")
    ]  # fmt: skip
    assert told[0][FEATURES.index("function")] == told[1][FEATURES.index("function")] == 12


@given(COSINES, COSINES)
def test_it_does_not_matter_which_text_came_first(cosine: float, learned: float) -> None:
    """Stored and asked may change places."""
    assert features(cosine, learned, ASKED, STORED) == features(cosine, learned, STORED, ASKED)


def test_the_calibrated_threshold_stands_where_the_weights_say() -> None:
    """A sum of exactly `at` scores exactly the threshold: the knob keeps its meaning."""
    bare = replace(WEIGHTS, values=tuple(float(name == "learned") for name in FEATURES))
    assert adjusted(0.0, bare.at, ASKED, STORED, bare) == pytest.approx(bare.threshold)
    assert adjusted(0.0, bare.at - 0.01, ASKED, STORED, bare) < bare.threshold
    assert adjusted(0.99, bare.at, ASKED, STORED, bare) == pytest.approx(0.99)


@pytest.mark.parametrize(
    "text",
    [
        "threshold = 0.92\nat = 0.8\nslope = 1.0\n[weights]\ncosine = 1.0\n",
        "threshold = 0.92\nat = 0.8\nslope = 1.0\n[weights]\n"
        + "".join(f"{name} = -1.0\n" for name in FEATURES),
        "threshold = 0.92\nat = 1.0\nslope = 1.0\n[weights]\n"
        + "".join(f"{name} = 1.0\n" for name in FEATURES),
    ],
    ids=["a feature too few", "more similar counts as less", "nothing could pass"],
)
def test_weights_that_do_not_fit_are_refused(text: str) -> None:
    """A file of another version must not score in silence."""
    with pytest.raises(ValueError, match=r"score\.toml"):
        read(text)
