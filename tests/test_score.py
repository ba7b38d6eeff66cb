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


@given(COSINES, COSINES)
def test_it_does_not_matter_which_text_came_first(cosine: float, learned: float) -> None:
    """Stored and asked may change places."""
    assert features(cosine, learned, ASKED, STORED) == features(cosine, learned, STORED, ASKED)


def test_the_calibrated_threshold_stands_where_the_weights_say() -> None:
    """A sum of exactly `at` scores exactly the threshold: the knob keeps its meaning."""
    bare = replace(WEIGHTS, values=(0.0, 1.0, 0.0, 0.0, 0.0))
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
