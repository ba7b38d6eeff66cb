"""Whether two stored answers say the same: in doubt they do not."""

from __future__ import annotations

import pytest

from cache_proxy.agreement import alike

LONG = (
    "To reset your password open the sign-in page, choose the link below the form, type the e-mail "
    "address of your account and follow the message that arrives within five minutes."
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (LONG, LONG),
        ("Paris.", "paris"),
        (LONG, LONG.replace("type", "enter")),
    ],
    ids=["equal", "mark and case", "one word of many"],
)
def test_the_same_in_other_words_agrees(one: str, other: str) -> None:
    """Wording that changes nothing."""
    assert alike(one, other)
    assert alike(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Paris", "Madrid"),
        ("card_arrival", "card_delivery_estimate"),
        ("Yes, it is safe for adults to take it.", "No, it is safe for adults to take it."),
        (LONG, LONG.replace("five", "5") + " It is valid for 30 days."),
        (LONG, LONG.replace("open", "do not open")),
        (LONG, "Bread wants flour, water, salt and yeast, and then a hot oven and some patience."),
    ],
    ids=["names", "labels", "verdict", "numbers", "negation", "another matter"],
)
def test_what_tells_another_story_disagrees(one: str, other: str) -> None:
    """A wrong "same" would serve a wrong answer; a wrong "different" only asks once more."""
    assert not alike(one, other)
    assert not alike(other, one)
