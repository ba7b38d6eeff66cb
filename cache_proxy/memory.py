"""Memory: recall, remember, forget. Encoder, index and store behind one door.

The store is the truth and the index a view of it: store first, index second when remembering, and
nothing the index proposes counts before the store confirmed it. What the index knows and the store
does not (expired, evicted, purged) is dropped when met, and when the journal says so.

Never decides whether a neighbour is good enough.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace

from embeddings import EncoderError, Index, Lens, Recall, Worker, unpack

from .codec import Head
from .errors import MemoryUnavailable
from .gist import gist
from .model import Candidate, Entry, Selector
from .store import Look, Store

__all__ = ["Memory", "Recollection"]

# An embedding that came too late for its own request may still warm the cache for the next one.
_LATE_SECONDS = 10.0
_FOLLOW_SECONDS = 0.5
_FETCH = 128  # entries in one read: some hundred kB, well inside its deadline
_RECONCILE_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Recollection:
    """What was near, nearest first; `trouble` says why nothing could be found, if so."""

    candidates: tuple[Candidate, ...] = ()
    embedding: asyncio.Future[Recall] | None = None
    trouble: str = ""
    encode_ms: float | None = None


class Memory:
    """Built whole by its caller; `run` keeps the index in step and ends only by being cancelled.

    `worker` None means an exact tier only.
    """

    def __init__(
        self,
        *,
        store: Store,
        worker: Worker | None,
        deadline_seconds: float,
        lens: Lens | None = None,
        note_unstored: Callable[[], None] | None = None,
    ) -> None:
        self.store = store
        self.warm = worker is None
        self.indexed = 0
        self.unstored = 0  # answers that the store did not take
        self._worker = worker
        self._deadline = deadline_seconds
        self._lens = lens
        self._note_unstored = note_unstored
        self._pending: dict[bytes, set[asyncio.Task[None]]] = {}
        self._working: set[asyncio.Task[None]] = set()

    async def look(self, digest: bytes, partition: bytes, token: bytes, started: float) -> Look:
        """Entry, epoch and acceptance in one round trip. Raises MemoryUnavailable.

        `started` is when the request began, by the loop's clock: from there its deadline counts.
        """
        if tasks := self._pending.get(partition):
            left = started + self._deadline - asyncio.get_running_loop().time()
            await asyncio.wait(tuple(tasks), timeout=max(0.0, left))
        return await self.store.look(digest, token)

    def embed(self, text: str) -> Recollection:
        """Begin to embed what will be stored, without looking for anything. Never raises."""
        if self._worker is None:
            return Recollection()
        try:
            embedding = self._worker.submit(text, None, 0)
        except EncoderError:
            return Recollection()
        embedding.add_done_callback(_heard)
        return Recollection(embedding=embedding)

    async def recall(self, text: str, partition: bytes, k: int, started: float) -> Recollection:
        """The k nearest stored prompts of this partition, confirmed. Never raises."""
        worker = self._worker
        if worker is None:
            return Recollection(trouble="no_encoder")
        deadline = started + self._deadline
        try:
            embedding = worker.submit(text, partition, k)
        except EncoderError:
            return Recollection(trouble="encoder")
        embedding.add_done_callback(_heard)
        left = deadline - asyncio.get_running_loop().time()
        await asyncio.wait((embedding,), timeout=max(0.0, left))
        if not embedding.done():
            return Recollection(embedding=embedding, trouble="late")
        try:
            found = embedding.result()
        except EncoderError:
            return Recollection(trouble="encoder")
        if found.truncated:
            return Recollection(trouble="window")
        encode_ms = found.seconds * 1_000
        if not found.neighbours:
            return Recollection(embedding=embedding, encode_ms=encode_ms)
        try:
            async with asyncio.timeout_at(deadline):
                candidates = await self._confirmed(found, partition)
        except TimeoutError:
            return Recollection(embedding=embedding, trouble="late", encode_ms=encode_ms)
        except MemoryUnavailable as exc:
            return Recollection(embedding=embedding, trouble=exc.part, encode_ms=encode_ms)
        return Recollection(candidates, embedding, "", encode_ms)

    async def _confirmed(self, recalled: Recall, partition: bytes) -> tuple[Candidate, ...]:
        stored = await self.store.fetch([key for key, _ in recalled.neighbours])
        vectors = [found[1] if found else b"" for found in stored]
        learned = self._lens.similarities(recalled.vector, vectors) if self._lens else ()
        candidates = []
        for at, ((key, similarity), found) in enumerate(
            zip(recalled.neighbours, stored, strict=True)
        ):
            if found is None or found[0].partition != partition:
                self._drop(key)
                continue
            seen = learned[at] if learned else None
            candidates.append(Candidate(found[0], similarity, self.store.floor(key), seen))
        return tuple(candidates)

    def remember(self, entry: Entry, embedding: asyncio.Future[Recall] | None, ttl: int) -> None:
        """Store in the background. Requests of the same partition that begin meanwhile wait for
        it, so that whoever asks again right away finds the answer."""
        self.soon(entry.partition, self._remember(entry, embedding, ttl))

    async def similarity(self, one: str, other: str) -> float | None:
        """The cosine of two texts; None when they cannot be compared. Not for the path of a hit."""
        if self._worker is None:
            return None
        try:
            pair = [self._worker.submit(text, None, 0) for text in (one, other)]
            first, second = await asyncio.gather(*pair)
        except EncoderError:
            return None
        if first.truncated or second.truncated:
            return None
        return float(unpack(first.vector) @ unpack(second.vector))

    async def disown(self, digest: bytes, floor: float) -> None:
        """Never serve this answer again, nor by meaning up to the score `floor` what is stored
        under its name later. Raises MemoryUnavailable.
        """
        await self.store.raise_floor(digest, floor)
        await self.store.purge(Selector(digest=digest), time.time())

    async def fetch(self, digests: Sequence[bytes]) -> list[Entry | None]:
        """Stored entries by name. Raises MemoryUnavailable."""
        entries: list[Entry | None] = []
        for start in range(0, len(digests), _FETCH):
            found = await self.store.fetch(digests[start : start + _FETCH])
            entries += [pair[0] if pair else None for pair in found]
        return entries

    def remember_all(self, partition: bytes, entries: Sequence[Entry], ttl: int) -> None:
        """As `remember`, for entries that are matched exactly only."""

        async def work() -> None:
            for entry in entries:
                await self._remember(entry, None, ttl)

        self.soon(partition, work())

    def soon(self, partition: bytes, work: Coroutine[object, object, None]) -> None:
        """Run `work` in the background, ahead of the partition's next look; what takes longer than
        a request has for the cache holds none up."""
        loop = asyncio.get_running_loop()
        task = loop.create_task(work)
        tasks = self._pending.setdefault(partition, set())
        tasks.add(task)
        self._working.add(task)

        def settled(done: asyncio.Task[None]) -> None:
            tasks.discard(done)
            if not tasks and self._pending.get(partition) is tasks:
                del self._pending[partition]

        task.add_done_callback(settled)
        task.add_done_callback(self._working.discard)
        loop.call_later(self._deadline, settled, task)

    async def settle(self, seconds: float) -> None:
        """Give what is being remembered this long to be stored."""
        if tasks := tuple(self._working):
            await asyncio.wait(tasks, timeout=seconds)

    async def _remember(
        self, entry: Entry, embedding: asyncio.Future[Recall] | None, ttl: int
    ) -> None:
        vector = await self._vector(embedding)
        if vector:
            entry = replace(entry, gist=_gist(entry.text))  # now, while nobody waits for it
        try:
            # Store first: a key the index knows must always have had an entry behind it.
            evicted = await self.store.put(entry, vector, ttl)
        except MemoryUnavailable:
            self.unstored += 1
            if self._note_unstored is not None:
                self._note_unstored()
            return
        if vector and self._worker is not None:
            added = unpack(vector)
            self._worker.tell(lambda index: index.add(entry.partition, entry.digest, added))
        for digest in evicted:
            self._drop(digest)

    async def _vector(self, embedding: asyncio.Future[Recall] | None) -> bytes:
        if embedding is None:
            return b""
        await asyncio.wait((embedding,), timeout=_LATE_SECONDS)
        if not embedding.done() or embedding.cancelled() or embedding.exception() is not None:
            return b""
        found = embedding.result()
        return b"" if found.truncated else found.vector

    def _drop(self, digest: bytes) -> None:
        if self._worker is not None:
            self._worker.tell(lambda index: index.remove(digest))

    async def run(self) -> None:
        """Rebuild the index from the store in slices, then follow the journal."""
        if self._worker is None:
            return
        loop = asyncio.get_running_loop()
        position: str | None = None
        reconciled = 0.0
        while True:
            try:
                if position is None or loop.time() - reconciled > _RECONCILE_SECONDS:
                    position = await self._rebuild()
                    reconciled = loop.time()
                    self.warm = True
                position = await self._follow(position)
            except MemoryUnavailable:
                # What happened meanwhile is in the journal or, after a gap, in the next rebuild.
                pass
            await asyncio.sleep(_FOLLOW_SECONDS)

    async def _rebuild(self) -> str:
        """Add all that the store holds; the journal position to go on from was taken before."""
        _, position, _ = await self.store.follow("$")
        self.indexed = 0
        async for heads in self.store.slices():
            self._add(heads)
            self.indexed += len(heads)
        return position

    async def _follow(self, position: str) -> str | None:
        """Apply what other writers did since; None when too much was missed."""
        changes, last, gap = await self.store.follow(position)
        if gap:
            return None
        for change in changes:
            if change.kind == "del":
                self._drop(change.digest)
        others = [c for c in changes if c.kind == "put" and c.writer != self.store.writer]
        if others:
            heads = await self.store.heads([change.digest for change in others])
            self._add([head for head in heads if head is not None])
        return last

    def _add(self, heads: Sequence[Head]) -> None:
        found = [head for head in heads if head.vector]

        def add(index: Index) -> None:
            for head in found:
                index.add(head.partition, head.digest, unpack(head.vector))

        if found and self._worker is not None:
            self._worker.tell(add)


def _heard(embedding: asyncio.Future[Recall]) -> None:
    """A failure that nobody waits for any more is no news to asyncio's log."""
    if not embedding.cancelled():
        embedding.exception()


def _gist(text: str) -> str:
    try:
        return gist(text)
    except Exception:  # noqa: BLE001 - found by its words all the same; what failed names the prompt
        return ""
