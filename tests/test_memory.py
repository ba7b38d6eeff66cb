"""What memory promises: the store is the truth, the index a view of it that heals by itself.

A twin of the store's server and an encoder whose vectors the test chooses; everything else is real.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

import fakeredis
import numpy as np
import pytest

from cache_proxy.gist import gist
from cache_proxy.memory import Memory, Recollection
from cache_proxy.model import Entry, Selector, Usage
from cache_proxy.store import Store
from embeddings import Encoded, EncoderError, Index, Worker
from tests.stopwatch import awake

NOW = 1_700_000_000
D = 8
SHELF = b"p" * 20
TOKEN = b"t" * 20
WEEK = 7 * 86_400


class Choosing:
    """Texts that begin alike get vectors that are alike; stops at a gate, breaks on demand."""

    name = "choosing"
    fingerprint = "0" * 16
    dimension = D
    window = 100
    languages: frozenset[str] | None = None
    threshold: float | None = 0.9
    note = ""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()

    def encode(self, texts: Sequence[str]) -> Encoded:
        assert self.open.wait(100)
        if "broken" in texts:
            raise EncoderError("broken")
        vectors = np.zeros((len(texts), D), np.float32)
        for row, text in zip(vectors, texts, strict=True):
            row[ord(text[0]) % D] = 1.0
        return Encoded(vectors, tuple("long" in text for text in texts))


class Clock:
    now = float(NOW)

    def __call__(self) -> float:
        return self.now


class Process:
    """One sidecar's memory on a store that others may share."""

    def __init__(self, server: fakeredis.FakeServer, clock: Clock, **limits: Any) -> None:
        self.encoder = Choosing()
        self.index = Index(D)
        self.worker = Worker(self.encoder, self.index)
        self.store = Store(
            "redis://unused",
            secret=b"s" * 32,
            fingerprint=b"f" * 8,
            clock=clock,
            client=fakeredis.FakeAsyncRedis(server=server),
            deadline_seconds=30.0,
            **limits,
        )
        # None that a busy machine would miss; tests of the deadline shorten it.
        self.memory = Memory(store=self.store, worker=self.worker, deadline_seconds=60.0)
        self.worker.start()
        self._following: asyncio.Task[None] | None = None

    def follow(self) -> None:
        """Begin to keep the index in step, as a running sidecar does."""
        self._following = asyncio.create_task(self.memory.run())

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        self.encoder.open.set()
        await self.store.close()
        assert self.worker.close(60)

    async def remember(self, made: Entry) -> None:
        """Store as after a miss, and wait until it is."""
        self.memory.remember(made, self.memory.embed(made.text).embedding, WEEK)
        await self.memory.settle(60)

    async def recall(self, text: str, shelf: bytes = SHELF) -> Recollection:
        return await self.memory.recall(text, shelf, 8, asyncio.get_running_loop().time())

    async def found(self, text: str, shelf: bytes = SHELF) -> list[str]:
        return [candidate.entry.text for candidate in (await self.recall(text, shelf)).candidates]

    async def known(self) -> int:
        """Keys in the index, after all it was told."""
        return await self.worker.ask(len)


def entry(text: str, **changes: Any) -> Entry:
    made = Entry(
        digest=text.encode().ljust(20, b"."),
        partition=SHELF,
        fingerprint=b"f" * 8,
        epoch=0,
        created=NOW,
        expires=NOW + WEEK,
        text=text,
        model="gpt-4o-mini",
        provider="",
        tenant="",
        namespace="",
        tags=(),
        usage=Usage(1, 1),
        cost=None,
        body=b"{}",
    )
    return replace(made, **changes)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def start(clock: Clock) -> AsyncIterator[Callable[..., Process]]:
    """Starts any number of processes on one store."""
    server = fakeredis.FakeServer()
    started: list[Process] = []

    def begin(**limits: Any) -> Process:
        started.append(Process(server, clock, **limits))
        return started[-1]

    yield begin
    for process in started:
        await process.close()


@pytest.fixture
def here(start: Callable[..., Process]) -> Process:
    return start()


async def until(condition: Callable[[], Any]) -> None:
    """Wait for what other tasks bring about, with a deadline."""
    async with asyncio.timeout(60):
        while not await condition():  # noqa: ASYNC110  it is asked of a store, not signalled
            await asyncio.sleep(0.01)


# Remembering ------------------------------------------------------------------------------------


async def test_what_was_remembered_is_recalled_nearest_first_and_only_on_its_shelf(
    here: Process,
) -> None:
    """I2: another partition's prompts are not even proposed."""
    await here.remember(entry("apples"))
    await here.remember(entry("bananas"))
    await here.remember(entry("apples elsewhere", partition=b"q" * 20))
    found = (await here.recall("apples again")).candidates
    assert [c.entry.text for c in found] == ["apples", "bananas"]
    assert [round(c.similarity, 3) for c in found] == [1.0, 0.0]
    assert await here.found("apples again", b"q" * 20) == ["apples elsewhere"]


async def test_who_looks_right_after_a_remembering_waits_for_it(here: Process) -> None:
    """Asked again at once, the answer is there, though nobody waited for the storing."""
    made = entry("apples")
    here.memory.remember(made, here.memory.embed(made.text).embedding, WEEK)
    look = await here.memory.look(made.digest, SHELF, TOKEN, asyncio.get_running_loop().time())
    assert look.entry == replace(made, gist=gist(made.text))
    assert await here.found("apples") == ["apples"]


async def test_a_remembering_that_hangs_holds_a_look_up_for_its_deadline_and_no_longer(
    here: Process,
) -> None:
    """I6: and the second look, later, waits for it no more."""
    here.memory._deadline = 0.5
    here.encoder.open.clear()
    made = entry("apples")
    here.memory.remember(made, here.memory.embed(made.text).embedding, WEEK)
    loop = asyncio.get_running_loop()
    began, awakened = loop.time(), awake()
    assert (await here.memory.look(made.digest, SHELF, TOKEN, began)).entry is None
    assert loop.time() - began > 0.4
    assert awake() - awakened < 1.0
    awakened = awake()
    await here.memory.look(made.digest, SHELF, TOKEN, loop.time())
    assert awake() - awakened < 0.3


async def test_a_late_embedding_still_warms_the_cache(here: Process) -> None:
    """Too late for its own request, in time for the next."""
    here.memory._deadline = 0.1
    here.encoder.open.clear()
    first = await here.recall("apples")
    here.memory._deadline = 60.0
    assert (first.trouble, first.candidates) == ("late", ())
    here.memory.remember(entry("apples"), first.embedding, WEEK)
    here.encoder.open.set()
    await here.memory.settle(60)
    assert await here.found("apples, please") == ["apples"]


@pytest.mark.parametrize(
    ("text", "trouble"), [("broken", "encoder"), ("long apples", "window")], ids=["broken", "long"]
)
async def test_what_cannot_be_embedded_is_stored_for_exact_matches(
    here: Process, text: str, trouble: str
) -> None:
    """Past the encoder's window two texts may look the same: nothing of it reaches the index."""
    recalled = await here.recall(text)
    assert recalled.trouble == trouble
    made = entry(text)
    here.memory.remember(made, recalled.embedding, WEEK)
    await here.memory.settle(60)
    look = await here.memory.look(made.digest, SHELF, TOKEN, asyncio.get_running_loop().time())
    assert look.entry == made
    assert await here.known() == 0


async def test_a_store_that_refuses_is_counted_and_nothing_is_indexed(here: Process) -> None:
    """I1: a key that the index knows must have had an entry behind it."""
    await here.remember(entry("apples", body=b"x", fingerprint=b"short"))
    assert here.memory.unstored == 1
    assert await here.known() == 0


# Recalling --------------------------------------------------------------------------------------


async def test_a_ghost_is_dropped_when_met_and_the_next_best_is_found(here: Process) -> None:
    """I1: the store lost it (evicted, flushed); it is no answer, and is not proposed twice."""
    await here.remember(entry("apples"))
    await here.remember(entry("apples too"))
    await here.store._redis.delete(b"cp1:e:" + entry("apples").digest)
    assert await here.found("apples") == ["apples too"]
    assert await here.known() == 1


async def test_what_expired_is_not_recalled_and_leaves_the_index(
    here: Process, clock: Clock
) -> None:
    """I1: by our own clock too, not only by the store's."""
    await here.remember(entry("apples", expires=NOW + 60))
    assert await here.found("apples") == ["apples"]
    clock.now = NOW + 60.0
    assert await here.found("apples") == []
    assert await here.known() == 0


async def test_an_index_that_names_the_wrong_shelf_is_not_believed(here: Process) -> None:
    """I1, I2: the entry itself says whose it is."""
    await here.remember(entry("apples", partition=b"q" * 20))
    vector = np.zeros(D, np.float32)
    vector[ord("a") % D] = 1.0
    digest = entry("apples").digest
    await here.worker.ask(lambda index: index.add(SHELF, digest, vector))
    assert await here.found("apples") == []


async def test_what_had_to_make_room_leaves_the_index(start: Callable[..., Process]) -> None:
    """I7: the cap holds in the store and in the index alike."""
    here = start(max_entries=3)
    for number in range(10):
        await here.remember(entry(f"apples {number}", expires=NOW + WEEK + number))
    assert await here.known() == 3
    assert sorted(await here.found("apples")) == ["apples 7", "apples 8", "apples 9"]


# In step with the store and with others ---------------------------------------------------------


async def test_an_index_is_rebuilt_from_the_store_at_start(
    here: Process, start: Callable[..., Process]
) -> None:
    for number in range(600):  # more than one slice
        made = entry(f"{'abcdefgh'[number % 8]} {number}")
        await here.store.put(made, vector_of(made.text), WEEK)
    fresh = start()
    assert not fresh.memory.warm
    fresh.follow()
    await until(lambda: ready(fresh))
    assert await fresh.known() == 600
    assert len(await fresh.found("apples")) == 8


async def test_what_one_process_stores_another_finds_and_what_it_purges_is_gone(
    start: Callable[..., Process],
) -> None:
    one, other = start(), start()
    one.follow()
    other.follow()
    await until(lambda: ready(one))
    await until(lambda: ready(other))
    await one.remember(entry("apples", epoch=0))
    await until(lambda: finds(other, "apples"))
    await one.store.purge(Selector(), NOW)
    assert await other.found("apples") == []
    assert await one.found("apples") == []


async def test_a_gap_in_the_journal_is_healed_by_a_rebuild(
    here: Process, start: Callable[..., Process]
) -> None:
    """Records that were trimmed away unread, and a journal that is gone altogether."""
    other = start()
    other.follow()
    await until(lambda: ready(other))
    await here.remember(entry("apples"))
    await until(lambda: finds(other, "apples"))
    await here.remember(entry("bananas"))
    await here.store._redis.delete(b"cp1:journal")
    await until(lambda: finds(other, "bananas"))


async def test_a_flushed_store_fills_the_index_again(here: Process) -> None:
    here.follow()
    await until(lambda: ready(here))
    await here.remember(entry("apples"))
    await here.store._redis.flushall()
    assert await here.found("apples") == []
    await here.remember(entry("apples"))
    await until(lambda: finds(here, "apples"))


async def ready(process: Process) -> bool:
    return process.memory.warm


async def finds(process: Process, text: str) -> bool:
    return text in await process.found(text)


def vector_of(text: str) -> bytes:
    row = Choosing().encode([text]).vectors[0]
    return row.astype("<f2").tobytes()


async def test_without_an_encoder_only_exact_matches_are_kept(here: Process, clock: Clock) -> None:
    memory = Memory(store=here.store, worker=None, deadline_seconds=0.5)
    assert memory.warm
    assert (await memory.recall("apples", SHELF, 8, 0.0)).trouble == "no_encoder"
    made = entry("apples")
    memory.remember(made, memory.embed("apples").embedding, WEEK)
    look = await memory.look(made.digest, SHELF, TOKEN, asyncio.get_running_loop().time())
    assert look.entry == made
