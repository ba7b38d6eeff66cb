"""`cache-proxy batch`: a file of requests through the running sidecar, each answered exactly once.

Lines that ask the same are asked once; what an earlier run has settled is not asked again, which
`batch_files` knows. Knows no cache and no provider: both are behind the sidecar's HTTP.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .batch_files import Batch, Job, Settled, Tally
from .caller import Caller, Told, listens
from .errors import ConfigError, UpstreamUnavailable
from .pricing import PriceBook
from .protocols.openai_answer import usage_of
from .upstream.retry import Retrying, may_pass, retry_after
from .upstream.routes import target

__all__ = ["Pace", "Run", "parse_rate", "run"]

ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 600.0  # asked to wait longer, a line is left to a later run
GRACE_SECONDS = 5.0  # for calls in flight when the run is told to stop
PLAIN_SECONDS = 5.0  # between lines where there is no terminal

_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smh])")
_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}
_RETRYING = Retrying(attempts=ATTEMPTS, base_seconds=1.0, cap_seconds=30.0)


def parse_rate(text: str) -> float:
    """ "600/m", "10/s" or "1000/h" as requests a second. ConfigError for anything else."""
    match = _RATE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError("rate: is a number per s, m or h, such as 600/m.")
    return float(match[1]) / {"s": 1, "m": 60, "h": 3_600}[match[2]]


class Pace:
    """A token bucket of depth one: calls upstream start evenly, `per_second` of them.

    What the cache answered gives its place back. `hold` keeps everybody waiting for a while.
    """

    def __init__(self, per_second: float | None) -> None:
        self._interval = 1 / per_second if per_second else 0.0
        self._next = self._held = 0.0
        self._turn = asyncio.Lock()
        self._moved = asyncio.Event()

    async def take(self) -> None:
        async with self._turn:
            while (wait := max(self._next, self._held) - time.monotonic()) > 0:
                self._moved.clear()
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait):
                        await self._moved.wait()
            self._next = max(self._next, time.monotonic()) + self._interval

    def give_back(self) -> None:
        self._next -= self._interval
        self._moved.set()

    def hold(self, seconds: float) -> None:
        self._held = max(self._held, time.monotonic() + seconds)


class Run:
    """Asks for what a batch has left, `ATTEMPTS` times at most for each request."""

    def __init__(
        self,
        batch: Batch,
        *,
        base: str,
        pace: Pace,
        prices: PriceBook,
        seller: str,
        dice: Callable[[], float],
    ) -> None:
        self._batch = batch
        self._dice = dice
        self._groups = batch.groups()
        self._base = base.rstrip("/")
        self._pace = pace
        self._prices = prices
        self._seller = seller
        self._calling: set[asyncio.Task[None] | None] = set()
        self._stopping = False

    async def work(self, caller: Caller) -> None:
        """Take what is left, one group after the other. ConfigError when going on is no use."""
        try:
            for offsets in self._groups:
                settled = await self._ask(caller, self._batch.job(offsets[0]))
                if settled is None:
                    return
                self._batch.tally.copied += len(offsets) - 1
                self._batch.write(offsets, settled)
                if self._stopping:
                    return
        finally:
            caller.close()

    async def all(self, callers: list[Caller], stop: asyncio.Event) -> None:
        """Work until nothing is left, `stop` is set or a worker gives up, whose error is raised.

        Those who have a request in flight then have `GRACE_SECONDS` to write its answer down.
        """
        workers = {asyncio.create_task(self.work(caller)) for caller in callers}
        stopping = asyncio.create_task(stop.wait())
        pending, failed = set(workers), False
        while pending and not stop.is_set() and not failed:
            ended, _ = await asyncio.wait({*pending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            pending -= ended
            failed = any(task.exception() for task in ended if task is not stopping)
        self._stopping = True
        for task in {*pending, stopping} - self._calling:
            task.cancel()
        if pending:
            _, late = await asyncio.wait(pending, timeout=GRACE_SECONDS)
            for task in late:
                task.cancel()
        for ended_with in await asyncio.gather(*workers, return_exceptions=True):
            if isinstance(ended_with, Exception):
                raise ended_with

    async def _ask(self, caller: Caller, job: Job) -> Settled | None:
        """None when the run is to end before there is an answer."""
        for attempt in range(1, ATTEMPTS + 1):
            await self._pace.take()
            told = await self._call(caller, job)
            if isinstance(told, Told) and told.status < 300:
                return self._good(told, job)
            if isinstance(told, Told) and told.status == 401:
                raise ConfigError("the key was refused (401); mend it and run this again.")
            if self._stopping:
                return None
            wait = self._patience(told, attempt)
            if wait is None or attempt == ATTEMPTS:
                break
            await asyncio.sleep(wait)
        if isinstance(told, Told):
            return Settled(False, _response(told, _as_json(told.body)))
        if told.reason == "connect":
            raise ConfigError(f"the sidecar at {self._base} has gone; start it and run this again.")
        return Settled(False, error=orjson.dumps({"code": "no_answer", "message": str(told)}))

    async def _call(self, caller: Caller, job: Job) -> Told | UpstreamUnavailable:
        """One request. A place at `rate` that the cache had no need of is given back."""
        task = asyncio.current_task()
        self._calling.add(task)
        self._batch.tally.asked += 1
        url = urlsplit(target(self._base, *_path_and_query(job.path)))
        try:
            told = await caller.ask(url._replace(scheme="", netloc="").geturl(), job.body)
        except UpstreamUnavailable as exc:
            return exc
        finally:
            self._calling.discard(task)
        if told.header(b"x-cache") == "HIT":
            self._pace.give_back()
            self._batch.tally.hits += 1
        return told

    def _patience(self, told: Told | UpstreamUnavailable, attempt: int) -> float | None:
        """Seconds until this line is asked again; None when that is not to be in this run."""
        asked = None
        if isinstance(told, Told):
            asked = retry_after(told.headers, time.time())
            if asked and may_pass(told.status, []):
                self._pace.hold(min(asked, LONGEST_WAIT_SECONDS))  # for all: it is about the key
            if not may_pass(told.status, told.headers):
                return None
        if asked is not None:
            return asked if asked <= LONGEST_WAIT_SECONDS else None
        return _RETRYING.pause(attempt, None, self._dice())

    def _good(self, told: Told, job: Job) -> Settled:
        tally = self._batch.tally
        try:
            usage = usage_of(orjson.loads(told.body))
        except (ValueError, AttributeError):
            message = {"code": "unreadable_answer", "message": "The answer is not a JSON object."}
            return Settled(False, error=orjson.dumps(message))
        if told.header(b"x-cache") != "HIT":
            cost = self._prices.cost(usage, job.model, self._seller) if usage else None
            tally.nano_usd += cost or 0
            tally.unpriced += cost is None
        return Settled(True, _response(told, told.body))


def _path_and_query(path: str) -> tuple[bytes, bytes]:
    before, _, query = path.encode().partition(b"?")
    return before, query


def _as_json(body: bytes) -> bytes:
    """The body if it is JSON, else its text as a JSON string."""
    try:
        orjson.loads(body)
    except ValueError:
        return orjson.dumps(body.decode(errors="replace"))
    return body


def _response(told: Told, body: bytes) -> bytes:
    """The `response` of an output line. `body` is JSON; line breaks between its tokens go."""
    named = told.header(b"x-request-id") or told.header(b"request-id") or None
    one_line = body.translate(_ONE_LINE)
    return b'{"status_code":%d,"request_id":%b,"body":%b}' % (
        told.status,
        orjson.dumps(named),
        one_line,
    )


def run(
    batch: Batch,
    console: Console,
    *,
    base: str,
    key: str,
    concurrency: int,
    rate: float | None,
    prices: PriceBook,
    seller: str,
) -> int:
    """Ask for everything that is left; 0 when all was answered, 1 with errors, 130 if interrupted.

    `rate` is in requests a second, `seller` the base URL whose prices count. ConfigError when there
    is no sidecar, or going on is no use; what was answered is kept.
    """
    tally = batch.tally
    if not uvloop.run(listens(base)):
        raise ConfigError(
            f"no sidecar answers at {base}; start one with: cache-proxy serve --upstream {seller}"
        )
    try:
        stopped = uvloop.run(_run(batch, base, key, concurrency, rate, prices, seller))
    finally:
        console.print(
            f"{tally.before + tally.answered:,} of {tally.lines:,} lines answered, "
            f"{tally.before:,} of them before this run and {tally.copied:,} as a line that asks "
            f"the same; {tally.asked:,} requests sent, {tally}",
            **_PLAIN,
        )
    if stopped:
        console.print("stopped; the same command goes on from here", **_PLAIN)
        return 130
    if tally.failed:
        console.print(f"errors: {batch.errors}; those that may pass are asked again", **_PLAIN)
    return 1 if tally.failed else 0


async def _run(
    batch: Batch,
    base: str,
    key: str,
    concurrency: int,
    rate: float | None,
    prices: PriceBook,
    seller: str,
) -> bool:
    await asyncio.to_thread(prices.warm)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stopping(number: int) -> None:
        stop.set()
        loop.remove_signal_handler(number)  # the second one ends at once; no line is half written

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopping, number)
    work = Run(batch, base=base, pace=Pace(rate), prices=prices, seller=seller, dice=random.random)
    showing = asyncio.create_task(_show(batch.tally, Console(stderr=True)))
    try:
        await work.all([Caller(base, key) for _ in range(concurrency)], stop)
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
    return stop.is_set()


async def _show(tally: Tally, screen: Console) -> None:
    """A bar on a terminal, a line now and then elsewhere, until cancelled."""
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    if screen.is_terminal:
        with Progress(*columns, console=screen) as bar:
            shown = bar.add_task("batch", total=tally.lines, completed=tally.done, note="")
            try:
                while True:
                    bar.update(shown, completed=tally.done, note=str(tally))
                    await asyncio.sleep(0.25)
            finally:
                bar.update(shown, completed=tally.done, note=str(tally))
    started, first = time.monotonic(), tally.done
    while True:
        await asyncio.sleep(PLAIN_SECONDS)
        speed = (tally.done - first) / (time.monotonic() - started)
        left = f"{(tally.lines - tally.done) / speed:,.0f} s left" if speed else "no end in sight"
        screen.print(f"{tally.done:,} of {tally.lines:,} lines, {tally}, {left}", **_PLAIN)
