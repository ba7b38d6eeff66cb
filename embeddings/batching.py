"""One thread owns the encoder and the index: no locks there, and the event loop never waits.

Queries run in micro-batches of whatever is waiting. Chores for the index (add, remove, drop) run
between batches, in order, some milliseconds' worth at a time: a query sees what was told before it
unless there is a backlog (a rebuild), and then it overtakes. Both queues are bounded. A failing
text, search or chore fails its own batch only: the thread lives on. Never logs; counts what it
swallowed in `failed_chores`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from embeddings.encoder import Encoder
from embeddings.index import Index
from embeddings.models import EncoderError
from embeddings.vectors import Floats, checked, pack, unpack

__all__ = ["Recall", "Worker", "WorkerBusy"]

T = TypeVar("T")

_CHORE_SECONDS = 0.002  # before each batch while queries wait: some 80 additions
_MAX_CHORES = 10_000


class WorkerBusy(EncoderError):
    """Too much is waiting already; treat it as a miss now rather than late."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What one text brought back."""

    vector: bytes  # fp16 little-endian, what the store keeps; b"" when truncated
    neighbours: tuple[tuple[bytes, float], ...]  # best first; () when truncated
    truncated: bool  # part of the text never reached the model: no semantic look-up, no storing
    seconds: float  # this text's share of the batch's encoding time, wall clock


@dataclass(frozen=True, slots=True)
class _Job:
    text: str
    shelf: bytes | None
    k: int
    future: asyncio.Future[Recall]


Chore = Callable[[Index], object]  # what it returns is nobody's


class Worker:
    """`start`, then `submit`, `tell` and `ask` from an event loop, then `close`."""

    def __init__(
        self,
        encoder: Encoder,
        index: Index,
        *,
        max_waiting: int = 256,
        max_batch: int = 16,
        max_chores: int = _MAX_CHORES,
    ) -> None:
        self.failed_chores = 0
        self._encoder = encoder
        self._index = index
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._max_chores = max_chores
        self._jobs: deque[_Job] = deque()
        self._chores: deque[Chore] = deque()
        self._closing = False
        self._wake = threading.Condition()  # guards the three above; held for moments only
        # A daemon, so that a wedged encoder cannot keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="embeddings", daemon=True)

    def start(self) -> None:
        """Once; a closed worker is not started again."""
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Stop after the batch at hand; what still waits fails. False when it did not stop in time
        (seconds). Blocks: call it off the loop."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(timeout)
        with self._wake:
            jobs = list(self._jobs)
            self._jobs.clear()
            self._chores.clear()
        _deliver((job.future, EncoderError("worker: closed")) for job in jobs)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """Running and taking work."""
        return self._thread.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Queries not begun, those whose caller has left included."""
        return len(self._jobs)

    @property
    def chores(self) -> int:
        """Chores not begun."""
        return len(self._chores)

    def submit(self, text: str, shelf: bytes | None, k: int) -> asyncio.Future[Recall]:
        """Encode `text` and find its `k` nearest in `shelf` (no shelf or k = 0: encode only).

        Call on the loop. Raises WorkerBusy at once when `max_waiting` are queued; the future may
        fail with EncoderError. Cancel it to give up: a job that was not begun is then skipped.
        """
        future: asyncio.Future[Recall] = asyncio.get_running_loop().create_future()
        with self._wake:
            self._refuse_closed()
            if len(self._jobs) >= self._max_waiting:
                raise WorkerBusy("worker: too many queries wait")
            self._jobs.append(_Job(text, shelf, k, future))
            self._wake.notify()
        return future

    def tell(self, chore: Chore) -> bool:
        """Run `chore` on the index, after all chores told before. False: the queue is full, and the
        chore is dropped (the index is a view; the next rebuild catches up)."""
        with self._wake:
            if self._closing or len(self._chores) >= self._max_chores:
                return False
            self._chores.append(chore)
            self._wake.notify()
        return True

    def ask(self, chore: Callable[[Index], T]) -> asyncio.Future[T]:
        """As `tell`, with the result in a future; WorkerBusy when the queue is full."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()

        def answer(index: Index) -> None:
            if future.cancelled():
                return
            try:
                result = chore(index)
            except Exception as exc:  # noqa: BLE001  whatever it is, it is the asker's
                _deliver([(future, exc)])
            else:
                _deliver([(future, result)])

        if not self.tell(answer):
            raise WorkerBusy("worker: too many chores wait")
        return future

    def _refuse_closed(self) -> None:
        if not self.alive:
            raise EncoderError("worker: not running")

    def _run(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._jobs or self._chores or self._closing)
            self._do_chores()
            with self._wake:
                if self._closing:
                    return
                batch = [self._jobs.popleft() for _ in range(min(len(self._jobs), self._max_batch))]
            batch = [job for job in batch if not job.future.cancelled()]
            if batch:
                self._serve(batch)

    def _serve(self, batch: Sequence[_Job]) -> None:
        try:
            recalls = self._recall(batch)
        except EncoderError as exc:
            _deliver((job.future, exc) for job in batch)
        except Exception as exc:  # noqa: BLE001  the thread must outlive any batch
            error = EncoderError("worker: the batch failed")
            error.__cause__ = exc
            _deliver((job.future, error) for job in batch)
        else:
            _deliver(zip((job.future for job in batch), recalls, strict=True))

    def _recall(self, batch: Sequence[_Job]) -> list[Recall]:
        begun = time.perf_counter()
        encoded = self._encoder.encode([job.text for job in batch])
        encoded = checked(encoded, len(batch), self._index.dimension)
        share = (time.perf_counter() - begun) / len(batch)
        return [
            Recall(b"", (), True, share) if cut else self._search(job, vector, share)
            for job, vector, cut in zip(batch, encoded.vectors, encoded.truncated, strict=True)
        ]

    def _search(self, job: _Job, vector: Floats, share: float) -> Recall:
        stored = pack(vector)
        if job.shelf is None or job.k < 1:
            return Recall(stored, (), False, share)
        # The rounded vector, so that an index rebuilt from the store gives the same scores.
        found = self._index.search(job.shelf, unpack(stored), job.k)
        return Recall(stored, tuple(found), False, share)

    def _do_chores(self) -> None:
        """All of them while no query waits; else some milliseconds' worth, and one at least, so
        that neither starves the other."""
        until = time.perf_counter() + _CHORE_SECONDS
        while self._chores and not self._closing:
            chore = self._chores.popleft()
            try:
                chore(self._index)
            except Exception:  # noqa: BLE001  the thread must outlive any chore
                self.failed_chores += 1
            if self._jobs and time.perf_counter() >= until:
                return


def _deliver(results: Iterable[tuple[asyncio.Future[T], T | Exception]]) -> None:
    """Settle futures on their own loops, one call a loop. Callers that left and loops that closed
    are passed over."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[T], T | Exception]]] = {}
    for future, result in results:
        by_loop.setdefault(future.get_loop(), []).append((future, result))
    for loop, settled in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_settle, settled)


def _settle(settled: Sequence[tuple[asyncio.Future[T], T | Exception]]) -> None:
    for future, result in settled:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
