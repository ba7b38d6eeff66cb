"""What the breaker promises: it opens when a model only fails, asks again with one request, and
never mistakes a refusal for a failure.
"""

from __future__ import annotations

import pytest

from cache_proxy.upstream.health import Health, Pass, Refused

KEY = ("openai", "gpt-4.1")


class Story:
    """A breaker and the time."""

    def __init__(self, **how: float) -> None:
        self.health = Health(**how)  # type: ignore[arg-type]
        self.now = 1_000.0

    def enter(self, key: object = KEY) -> Pass | Refused:
        return self.health.enter(key, self.now)

    def passed(self, key: object = KEY) -> Pass:
        leave = self.enter(key)
        assert isinstance(leave, Pass)
        return leave

    def refused(self, key: object = KEY) -> float:
        no = self.enter(key)
        assert isinstance(no, Refused)
        return no.seconds

    def call(self, *, ok: bool, key: object = KEY) -> None:
        leave = self.passed(key)
        self.now += 0.25
        (self.health.succeeded if ok else self.health.failed)(leave, self.now)

    def open(self) -> None:
        for _ in range(5):
            self.call(ok=False)


@pytest.fixture
def story() -> Story:
    return Story()


def test_the_fifth_failure_in_a_row_opens_and_the_fourth_does_not(story: Story) -> None:
    for _ in range(4):
        story.call(ok=False)
    story.call(ok=True)
    for _ in range(4):
        story.call(ok=False)
    story.passed()
    story.call(ok=False)
    assert story.refused() == 1.0


def test_a_moments_failures_open_nothing_however_many(story: Story) -> None:
    """A hundred at once are one hiccup, which retries mend; a second later it is an outage."""
    for leave in [story.passed() for _ in range(100)]:
        story.health.failed(leave, story.now)
    story.now += 0.99
    story.health.failed(story.passed(), story.now)
    story.now += 0.01
    story.health.failed(story.passed(), story.now)
    story.refused()


def test_half_of_twenty_calls_failing_opens_without_a_row(story: Story) -> None:
    """Every other call fails: no row is long, and yet nothing is to be expected."""
    for n in range(19):
        story.call(ok=n % 2 == 1)
    story.passed()
    story.call(ok=True)
    story.call(ok=False)
    story.refused()


def test_a_few_failures_among_many_answers_never_open(story: Story) -> None:
    """Two in five, all day long."""
    for n in range(5_000):
        story.call(ok=n % 5 > 1)
        story.now += 0.1


def test_failures_long_ago_do_not_count_towards_the_share(story: Story) -> None:
    for n in range(18):
        story.call(ok=n % 2 == 1)
    story.now += 31
    for _ in range(4):
        story.call(ok=False)
    story.passed()


def test_models_and_providers_open_by_themselves(story: Story) -> None:
    story.open()
    story.refused()
    story.passed(("openai", "gpt-4.1-mini"))
    story.passed(("azure", "gpt-4.1"))


def test_after_the_pause_exactly_one_request_probes(story: Story) -> None:
    story.open()
    story.now += 0.99
    assert story.refused() == pytest.approx(0.01)
    story.now += 0.01
    probe = story.passed()
    for _ in range(100):
        assert 0 < story.refused() <= 1.0
    story.health.succeeded(probe, story.now)
    for _ in range(4):
        story.call(ok=False)  # closed and as new
    story.passed()


def test_each_failed_probe_doubles_the_pause_up_to_the_cap(story: Story) -> None:
    story.open()
    pauses = []
    for _ in range(8):
        pauses.append(story.refused())
        story.now += pauses[-1]
        story.health.failed(story.passed(), story.now)
    assert pauses == [1, 2, 4, 8, 16, 30, 30, 30]


def test_a_pause_starts_small_again_after_a_recovery(story: Story) -> None:
    story.open()
    story.now += 1
    story.health.failed(story.passed(), story.now)
    story.now += 2
    story.call(ok=True)
    story.open()
    assert story.refused() == 1.0


def test_a_probe_whose_caller_left_gives_its_turn_to_the_next(story: Story) -> None:
    """I8: nobody's going away may keep the door shut."""
    story.open()
    story.now += 1
    story.health.leave(story.passed())
    story.passed()
    story.refused()


def test_a_probe_that_hangs_does_not_keep_the_door_shut_for_ever(story: Story) -> None:
    story.open()
    story.now += 1
    hanging = story.passed()
    story.now += 29.9
    story.refused()
    story.now += 0.1
    story.health.succeeded(story.passed(), story.now)
    story.health.failed(hanging, story.now)  # late, and of another time
    story.passed()


def test_what_was_sent_before_it_opened_neither_closes_nor_prolongs(story: Story) -> None:
    early = [story.passed() for _ in range(10)]
    story.open()
    story.health.succeeded(early[0], story.now)
    story.refused()
    for late in early[1:]:
        story.health.failed(late, story.now)
    assert story.refused() == 1.0


def test_memory_is_bounded_whatever_models_clients_name() -> None:
    """I7."""
    story = Story(most=10)
    for n in range(1_000):
        story.call(ok=False, key=("openai", f"model-{n}"))
    assert len(story.health._circuits) == 10


def test_a_model_that_recovered_leaves_nothing_behind(story: Story) -> None:
    story.call(ok=False)
    story.now += 31
    story.call(ok=True)
    assert not story.health._circuits
