"""The queue before a provider: critical overtakes, nobody starves, and no place is ever lost."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.upstream.fair_queue import CLASSES, FairQueue, TokenBucket, class_of
from cache_proxy.upstream.turnstile import Place, Shed, Turnstile
from tests.stopwatch import awake


def turnstile(
    concurrency: int | None = 1, per_second: float | None = None, waiting: int = 1_000
) -> Turnstile:
    return Turnstile(
        concurrency=concurrency,
        per_second=per_second,
        classes=CLASSES,
        now=asyncio.get_running_loop().time,
        most_waiting=waiting,
    )


def asking(gate: Turnstile, name: str, seconds: float | None = None) -> asyncio.Task[Place]:
    return asyncio.create_task(gate.enter(name, seconds))


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("header", "name"),
    [
        (b"critical", "critical"),
        (b" Best_Effort ", "best_effort"),
        (b"normal", "normal"),
        (b"", "normal"),
        (b"urgent", "normal"),
        (b"\xff\xfe", "normal"),
    ],
)
def test_an_unknown_class_is_normal(header: bytes, name: str) -> None:
    """A client's typing error neither fails its request nor puts it first."""
    assert class_of(header) == name


def test_critical_overtakes_what_waits() -> None:
    """However many lighter ones came before, the first critical one is next."""
    queue: FairQueue[str] = FairQueue(CLASSES)
    for number in range(50):
        queue.push(f"best_effort {number}", "best_effort")
        queue.push(f"normal {number}", "normal")
    queue.push("critical", "critical")
    assert queue.pop() == "critical"


def test_a_late_critical_overtakes_in_the_middle_of_an_evening() -> None:
    """Turns already had do not count against a class that was idle meanwhile."""
    queue: FairQueue[str] = FairQueue(CLASSES)
    for number in range(400):
        queue.push(f"normal {number}", "normal")
    for served in range(300):
        assert queue.pop() == f"normal {served}"
    queue.push("critical", "critical")
    assert "critical" in {queue.pop(), queue.pop()}


def test_who_was_away_has_saved_up_no_turns() -> None:
    """A flood of critical ones after a quiet hour has its share from then on, not the hour's."""
    queue: FairQueue[str] = FairQueue(CLASSES)
    for number in range(800):
        queue.push(f"normal {number}", "normal")
    for _ in range(400):
        queue.pop()
    for number in range(400):
        queue.push(f"critical {number}", "critical")
    next_ones = [queue.pop() for _ in range(30)]
    assert 9 <= sum(item.startswith("normal") for item in next_ones) <= 11


def test_no_class_starves_under_the_heaviest_load() -> None:
    """With every class always waiting, turns are had by weight: 8 to 4 to 1."""
    queue: FairQueue[int] = FairQueue(CLASSES)
    numbers = itertools.count()
    whose: dict[int, str] = {}

    def come(name: str) -> None:
        number = next(numbers)
        whose[number] = name
        queue.push(number, name)

    for name in CLASSES:
        come(name)
    turns: Counter[str] = Counter()
    longest, since = 0, 0
    for _ in range(1_300):
        name = whose[queue.pop()]
        turns[name] += 1
        since = 0 if name == "best_effort" else since + 1
        longest = max(longest, since)
        come(name)
    assert turns == {"critical": 800, "normal": 400, "best_effort": 100}
    assert longest <= 13


@given(st.lists(st.tuples(st.sampled_from(list(CLASSES)), st.booleans()), max_size=200))
def test_every_one_has_its_turn_once_and_in_order_of_its_class(
    steps: list[tuple[str, bool]],
) -> None:
    """Pushes and pops in any order: nobody is lost, doubled, or passed within a class."""
    queue: FairQueue[tuple[str, int]] = FairQueue(CLASSES)
    came: list[tuple[str, int]] = []
    went: list[tuple[str, int]] = []
    for number, (name, leave) in enumerate(steps):
        if leave and len(queue):
            went.append(queue.pop())
        else:
            came.append((name, number))
            queue.push((name, number), name)
    while len(queue):
        went.append(queue.pop())
    assert sorted(went) == sorted(came)
    for name in CLASSES:
        assert [item for item in went if item[0] == name] == [i for i in came if i[0] == name]


def test_the_lightest_and_latest_yields_first() -> None:
    """best_effort makes room before normal does, and nobody for its own class."""
    queue: FairQueue[str] = FairQueue(CLASSES)
    for name, item in (("normal", "n"), ("best_effort", "b1"), ("best_effort", "b2")):
        queue.push(item, name)
    assert queue.yielding_to("best_effort") is None
    assert [queue.yielding_to("critical") for _ in range(4)] == ["b2", "b1", "n", None]


@given(
    rate=st.floats(0.1, 1_000),
    steps=st.lists(st.floats(0, 5), min_size=1, max_size=200),
)
def test_a_bucket_never_gives_more_than_its_rate(rate: float, steps: list[float]) -> None:
    """In any span: one second's worth (one at least) and the rate times its length."""
    bucket = TokenBucket(rate, 0.0)
    now, taken = 0.0, [0.0] * 0
    for step in steps:
        now += step
        while bucket.wait(now) == 0:
            bucket.take(now)
            taken.append(now)
    for first, last in itertools.combinations(range(0, len(taken), max(1, len(taken) // 30)), 2):
        span = taken[last] - taken[first]
        assert last - first + 1 <= max(1.0, rate) + rate * span + 1e-6 * (last + 1)


def test_a_bucket_says_exactly_when_the_next_one_comes() -> None:
    """At the moment it named there is a token; a clock that steps back breaks nothing."""
    bucket = TokenBucket(0.3, 100.0)
    bucket.take(100.0)
    now = 100.0 + bucket.wait(100.0)
    assert bucket.wait(now) == 0
    bucket.take(now)
    assert bucket.wait(now - 50) > 0


async def test_never_more_inside_than_allowed() -> None:
    """A hundred at once through three places: three inside at most, and all get through."""
    gate = turnstile(3)
    most = 0

    async def visit() -> None:
        nonlocal most
        place = await gate.enter("normal")
        most = max(most, gate.inside)
        await asyncio.sleep(0)
        place.leave()
        place.leave()  # twice is once

    await asyncio.gather(*(visit() for _ in range(100)))
    assert most == 3
    assert (gate.inside, gate.waiting) == (0, 0)


async def test_a_critical_request_goes_in_before_those_that_wait() -> None:
    """The place that comes free is the critical one's."""
    gate = turnstile()
    held = await gate.enter("normal")
    normal = [asking(gate, "normal") for _ in range(5)]
    await settle()
    critical = asking(gate, "critical")
    await settle()
    held.leave()
    await settle()
    assert critical.done()
    assert not any(task.done() for task in normal)
    (await critical).leave()
    for task in normal:
        (await task).leave()
    assert gate.inside == 0


async def test_who_leaves_the_queue_gives_its_turn_to_the_next() -> None:
    """I8: cancelled while waiting, and cancelled in the very moment its turn comes."""
    gate = turnstile()
    held = await gate.enter("normal")
    first, second, third = (asking(gate, "normal") for _ in range(3))
    await settle()
    first.cancel()
    await settle()
    assert gate.waiting == 2
    held.leave()  # admits the second, which is cancelled before it can run
    second.cancel()
    (await asyncio.wait_for(third, 30)).leave()
    assert (gate.inside, gate.waiting) == (0, 0)


async def test_cancelled_and_passed_over_in_one_breath() -> None:
    """Cancelled first, its place offered after: the next one has it."""
    gate = turnstile()
    held = await gate.enter("normal")
    first, second = asking(gate, "normal"), asking(gate, "normal")
    await settle()
    first.cancel()
    held.leave()
    (await asyncio.wait_for(second, 30)).leave()
    assert (gate.inside, gate.waiting) == (0, 0)


async def test_a_storm_of_cancels_loses_no_place() -> None:
    """I8: half of a thousand go away at random moments; all places are there again after."""
    gate = turnstile(4)

    async def visit(number: int) -> None:
        place = await gate.enter(list(CLASSES)[number % 2])
        try:
            for _ in range(number % 3):
                await asyncio.sleep(0)
        finally:
            place.leave()

    tasks = [asyncio.create_task(visit(number)) for number in range(1_000)]
    for number, task in enumerate(tasks):
        if number % 2:
            task.cancel()
        if number % 7 == 0:
            await asyncio.sleep(0)
    done = await asyncio.gather(*tasks, return_exceptions=True)
    assert done.count(None) >= 500
    assert (gate.inside, gate.waiting) == (0, 0)
    assert not isinstance(await gate.enter("critical"), Exception)


async def test_best_effort_is_turned_away_first_from_a_full_queue() -> None:
    """I7: the queue is bounded, and a heavier class takes the place of the lightest in it."""
    gate = turnstile(waiting=2)
    held = await gate.enter("normal")
    light = [asking(gate, "best_effort") for _ in range(2)]
    await settle()
    with pytest.raises(Shed):
        await gate.enter("best_effort")
    normal = asking(gate, "normal")
    await settle()
    assert [task.done() for task in light] == [False, True]
    with pytest.raises(Shed) as shed:
        await light[1]
    assert (shed.value.status_hint, shed.value.retry_after) == (503, 1)
    critical = asking(gate, "critical")
    await settle()
    assert light[0].done()
    with pytest.raises(Shed):
        await gate.enter("normal")
    assert gate.waiting == 2
    held.leave()
    (await critical).leave()
    (await normal).leave()
    with pytest.raises(Shed):
        await light[0]


async def test_best_effort_waits_no_longer_than_its_target() -> None:
    """A quick 503 instead of a slow one; the others wait on."""
    classes = {**CLASSES, "best_effort": replace(CLASSES["best_effort"], target_ms=20)}
    now = asyncio.get_running_loop().time
    gate = Turnstile(concurrency=1, per_second=None, classes=classes, now=now)
    held = await gate.enter("normal")
    normal = asking(gate, "normal")
    with pytest.raises(Shed):
        await gate.enter("best_effort")
    assert gate.waiting == 1
    held.leave()
    (await normal).leave()
    assert gate.inside == 0


async def test_best_effort_is_not_let_wait_for_what_cannot_come_in_time() -> None:
    """Calls take ten seconds here, its target is five: turned away without waiting at all."""
    moment = 0.0
    gate = Turnstile(concurrency=1, per_second=None, classes=CLASSES, now=lambda: moment)
    held = await gate.enter("critical")
    moment = 10.0
    held.leave()
    held = await gate.enter("critical")
    with pytest.raises(Shed) as shed:
        await asyncio.wait_for(gate.enter("best_effort"), 30)
    assert shed.value.retry_after == 10
    normal = asking(gate, "normal")
    await settle()
    assert gate.waiting == 1
    held.leave()
    (await normal).leave()


async def test_nobody_waits_beyond_the_deadline() -> None:
    """I6: whatever its class, who has no time left is told so, and is out of the queue."""
    gate = turnstile()
    held = await gate.enter("normal")
    for name in CLASSES:
        with pytest.raises(Shed):
            await gate.enter(name, 0.01)
    assert gate.waiting == 0
    held.leave()
    assert gate.inside == 0


async def test_calls_leave_at_the_providers_rate() -> None:
    """A hundred a second: a burst of one second's worth, then one each ten milliseconds."""
    gate = turnstile(None, 100.0)
    loop = asyncio.get_running_loop()
    began, awakened = loop.time(), awake()
    for _ in range(100):
        await gate.enter("normal")
    burst = awake() - awakened
    for _ in range(10):
        await gate.enter("normal")
    elapsed = loop.time() - began
    assert burst < 0.5
    assert elapsed >= 10 / 100 - 1e-6
    assert gate.inside == 110


async def test_the_rate_wakes_those_who_wait_by_itself() -> None:
    """Nobody leaves and nobody comes: the next token alone lets the next one in."""
    gate = turnstile(None, 50.0)
    places = [await gate.enter("normal") for _ in range(50)]
    waiting = [asking(gate, "normal") for _ in range(3)]
    for task in asyncio.as_completed(waiting, timeout=30):
        places.append(await task)
    for place in places:
        place.leave()
    assert (gate.inside, gate.waiting) == (0, 0)
