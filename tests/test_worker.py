"""What the worker promises: the loop never waits, queues are bounded, faults end no thread."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from embeddings import Encoded, EncoderError, Index, Worker, WorkerBusy, unpack
from embeddings.vectors import Floats
from tests.stopwatch import awake

D = 8


def vector_of(text: str) -> Floats:
    seed = int.from_bytes(text.encode()[:8].ljust(8), "big")
    vector = np.random.default_rng(seed).standard_normal(D).astype(np.float32)
    return vector / np.linalg.norm(vector)


class Gate:
    """An encoder that waits at a gate, remembers its batches, and breaks on demand."""

    name = "gate"
    fingerprint = "0" * 16
    dimension = D
    window = 100
    languages: frozenset[str] | None = None
    threshold: float | None = None
    note = ""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.entered = threading.Event()
        self.batches: list[list[str]] = []
        self.threads: set[int] = set()

    def encode(self, texts: Sequence[str]) -> Encoded:
        self.threads.add(threading.get_ident())
        self.batches.append(list(texts))
        self.entered.set()
        assert self.open.wait(10)
        if "break" in texts:
            raise RuntimeError("secret text")
        if "nan" in texts:
            return Encoded(np.full((len(texts), D), np.nan, np.float32), (False,) * len(texts))
        return Encoded(np.stack([vector_of(t) for t in texts]), tuple(t == "long" for t in texts))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def make(gate: Gate) -> Iterator[Callable[..., Worker]]:
    made: list[Worker] = []

    def build(**limits: int) -> Worker:
        worker = Worker(gate, Index(D), **limits)
        worker.start()
        made.append(worker)
        return worker

    yield build
    gate.open.set()
    assert all(worker.close(60) for worker in made)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition, with a deadline."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what it waits for happens on another thread
            await asyncio.sleep(0.001)


async def test_what_was_added_is_recalled(make: Callable[..., Worker]) -> None:
    """Encode, remember under the stored form, find it again with a cosine of one."""
    worker = make()
    first = await worker.submit("hello", None, 0)
    assert worker.tell(lambda index: index.add(b"s", b"k", unpack(first.vector)))
    again = await worker.submit("hello", b"s", 3)
    assert first.neighbours == ()
    assert again.vector == first.vector
    ((key, score),) = again.neighbours
    assert (key, round(score, 2)) == (b"k", 1.0)
    assert again.seconds > 0
    assert len(first.vector) == 2 * D


async def test_k_of_zero_and_no_shelf_only_encode(make: Callable[..., Worker]) -> None:
    """A refresh wants the vector, not the neighbours."""
    worker = make()
    for shelf, k in ((None, 8), (b"s", 0)):
        recall = await worker.submit("hello", shelf, k)
        assert recall.vector
        assert recall.neighbours == ()


async def test_a_truncated_text_has_neither_vector_nor_neighbours(
    make: Callable[..., Worker],
) -> None:
    """What the model saw in part only must not be looked up or stored by similarity."""
    worker = make()
    recall = await worker.submit("long", b"s", 8)
    assert (recall.vector, recall.neighbours, recall.truncated) == (b"", (), True)


async def test_what_waits_together_runs_together(make: Callable[..., Worker], gate: Gate) -> None:
    """Micro-batches of what is there, up to the limit, in order; nobody waits for company."""
    gate.open.clear()
    worker = make(max_batch=3)
    first = worker.submit("0", None, 0)
    await until(gate.entered.is_set)
    rest = [worker.submit(str(n), None, 0) for n in range(1, 6)]
    assert worker.waiting == 5
    gate.open.set()
    await asyncio.gather(first, *rest)
    assert gate.batches == [["0"], ["1", "2", "3"], ["4", "5"]]
    assert len(gate.threads) == 1


async def test_a_full_queue_says_so_at_once(make: Callable[..., Worker], gate: Gate) -> None:
    """A wedged encoder costs its callers nothing but a miss."""
    gate.open.clear()
    worker = make(max_waiting=2)
    begun = worker.submit("a", None, 0)
    await until(gate.entered.is_set)
    waiting = [worker.submit("b", None, 0), worker.submit("c", None, 0)]
    with pytest.raises(WorkerBusy):
        worker.submit("d", None, 0)
    gate.open.set()
    await asyncio.gather(begun, *waiting)
    assert (await worker.submit("e", None, 0)).vector


async def test_a_wedged_encoder_does_not_hold_the_loop(
    make: Callable[..., Worker], gate: Gate
) -> None:
    """The deadline fires on time, and a hundred turns of the loop take no time."""
    gate.open.clear()
    worker = make()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(worker.submit("a", b"s", 8), 0.05)
    begun = awake()
    for _ in range(100):
        worker.tell(lambda index: None)
        await asyncio.sleep(0)
    assert awake() - begun < 0.5


async def test_a_job_whose_caller_left_is_skipped(make: Callable[..., Worker], gate: Gate) -> None:
    """Cancelled before it began: no forward pass for nobody."""
    gate.open.clear()
    worker = make()
    first = worker.submit("first", None, 0)
    await until(gate.entered.is_set)
    left = worker.submit("left", None, 0)
    last = worker.submit("last", None, 0)
    left.cancel()
    gate.open.set()
    await asyncio.gather(first, last)
    assert gate.batches == [["first"], ["last"]]


async def test_a_result_for_a_caller_that_left_is_dropped(
    make: Callable[..., Worker], gate: Gate
) -> None:
    """Cancelled while it ran: nothing breaks, the next one is served."""
    gate.open.clear()
    worker = make()
    left = worker.submit("left", None, 0)
    await until(gate.entered.is_set)
    left.cancel()
    gate.open.set()
    assert (await worker.submit("next", None, 0)).vector


@pytest.mark.parametrize("text", ["break", "nan"])
async def test_a_fault_fails_its_batch_and_the_thread_lives_on(
    make: Callable[..., Worker], text: str
) -> None:
    """An encoder error never says what the text was, and never ends the worker."""
    worker = make()
    with pytest.raises(EncoderError) as caught:
        await worker.submit(text, b"s", 1)
    assert "secret" not in str(caught.value)
    assert worker.alive
    assert (await worker.submit("fine", b"s", 1)).vector


async def test_a_failing_chore_harms_nobody(make: Callable[..., Worker]) -> None:
    """It is counted, and the chores behind it still run."""
    worker = make()
    worker.tell(lambda index: index.add(b"s", b"k", np.zeros(D, np.float32)))
    assert await worker.ask(len) == 0
    assert worker.failed_chores == 1


async def test_a_question_brings_its_answer_or_its_error(make: Callable[..., Worker]) -> None:
    """`ask` is a chore with a result."""
    worker = make()
    assert await worker.ask(lambda index: index.dimension) == D
    with pytest.raises(ZeroDivisionError):
        await worker.ask(lambda index: 1 // 0)


async def test_chores_run_in_order_and_before_later_questions(
    make: Callable[..., Worker],
) -> None:
    """A removal told after an addition removes it."""
    worker = make()
    done: list[int] = []
    for number in range(500):
        worker.tell(lambda _, number=number: done.append(number))  # type: ignore[misc]
    assert await worker.ask(lambda _: list(done)) == list(range(500))


async def test_chores_are_bounded(make: Callable[..., Worker], gate: Gate) -> None:
    """More than the limit is dropped and said so; the index is only a view."""
    gate.open.clear()
    worker = make(max_chores=3)
    begun = worker.submit("a", None, 0)
    await until(gate.entered.is_set)
    assert [worker.tell(lambda index: None) for _ in range(5)] == [True, True, True, False, False]
    with pytest.raises(WorkerBusy):
        worker.ask(len)
    gate.open.set()
    await begun
    await until(lambda: worker.chores == 0)
    assert worker.tell(lambda index: None)


async def test_chores_are_not_starved_by_queries(make: Callable[..., Worker], gate: Gate) -> None:
    """One at least before each batch, however many queries wait."""
    gate.open.clear()
    worker = make(max_batch=1)
    seen: list[int] = []
    queries = [worker.submit(str(n), None, 0) for n in range(20)]
    worker.tell(lambda index: seen.append(len(gate.batches)))
    gate.open.set()
    await asyncio.gather(*queries)
    assert seen[0] <= 1


async def test_queries_do_not_wait_for_all_chores(make: Callable[..., Worker], gate: Gate) -> None:
    """A rebuild of thousands of additions lets queries through every few milliseconds."""
    gate.open.clear()
    worker = make()
    first = worker.submit("first", None, 0)
    await until(gate.entered.is_set)
    ran = 0

    def slow(index: Index) -> None:
        nonlocal ran
        ran += 1
        end = time.perf_counter() + 0.002
        while time.perf_counter() < end:
            pass

    for _ in range(500):
        worker.tell(slow)
    second = worker.submit("second", None, 0)
    gate.open.set()
    await asyncio.gather(first, second)
    assert 1 <= ran < 250


async def test_closing_fails_what_still_waits(make: Callable[..., Worker], gate: Gate) -> None:
    """Nobody is left hanging at shutdown, and a closed worker takes nothing."""
    gate.open.clear()
    worker = make(max_batch=1)
    begun = worker.submit("begun", None, 0)
    await until(gate.entered.is_set)
    waiting = worker.submit("waiting", None, 0)
    assert not await asyncio.to_thread(worker.close, 0.01)
    gate.open.set()
    assert await asyncio.to_thread(worker.close, 60)
    assert (await begun).vector
    with pytest.raises(EncoderError):
        await waiting
    assert not worker.alive
    assert not worker.tell(lambda index: None)
    with pytest.raises(EncoderError):
        worker.submit("late", None, 0)


def test_a_loop_that_closed_does_not_end_the_thread(
    make: Callable[..., Worker], gate: Gate
) -> None:
    """An answer for a dead loop is dropped; another loop is served by the same worker."""
    gate.open.clear()
    worker = make()

    async def leave() -> None:
        worker.submit("left behind", None, 0)
        await until(gate.entered.is_set)

    asyncio.run(leave())
    gate.open.set()

    async def come() -> bytes:
        return (await worker.submit("next", None, 0)).vector

    assert asyncio.run(come())


async def test_many_callers_and_chores_at_once_lose_nothing(make: Callable[..., Worker]) -> None:
    """Two thousand queries among additions and removals: each gets its own vector back."""
    worker = make(max_waiting=5_000)

    async def one(number: int) -> None:
        text, key = str(number % 50), str(number).encode()
        recall = await worker.submit(text, b"s", 4)
        np.testing.assert_allclose(unpack(recall.vector), vector_of(text), atol=1e-3)
        worker.tell(lambda index: index.add(b"s", key, unpack(recall.vector)))
        if number % 2:
            worker.tell(lambda index: index.remove(key))

    await asyncio.gather(*(one(n) for n in range(2_000)))
    assert await worker.ask(len) == 1_000
    assert worker.failed_chores == 0
