"""`cache-proxy batch`: a file of requests through the running sidecar, each answered exactly once.

Files are in the form of OpenAI's Batch API. Every answer is one whole line, written at once and
never changed, so that a run may be killed at any point: the next one reads what is there and asks
only for the rest. Lines that ask the same are asked once. Knows no cache and no provider: both are
behind the sidecar's HTTP.

An answer's `id` is a digest of its `custom_id` and request, which is how a later run sees that an
output line answers this very request and not an older one of the same name.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from . import canonical
from .caller import Caller, Told, listens
from .errors import BadRequest, ConfigError, UpstreamUnavailable
from .pricing import PriceBook
from .protocols.openai_answer import usage_of
from .upstream.retry import Retrying, may_pass, retry_after
from .upstream.routes import target

__all__ = ["Bad", "Batch", "Job", "Pace", "Run", "Settled", "parse_rate", "read_line", "run"]

ATTEMPTS = 5
LONGEST_WAIT_SECONDS = 600.0  # asked to wait longer, a line is left to a later run
GRACE_SECONDS = 5.0  # for calls in flight when the run is told to stop
PLAIN_SECONDS = 5.0  # between lines where there is no terminal

_RATE = re.compile(r"(\d+(?:\.\d+)?)/([smh])")
_PATH = re.compile(r"/[!-~]*")
_OURS = b'{"id":"batch_req_'
_LINE = _OURS + b'%b","custom_id":%b,"response":%b,"error":%b}\n'
_ONE_LINE = bytes.maketrans(b"\r\n", b"  ")
_PLAIN: dict[str, Any] = {"soft_wrap": True, "markup": False, "highlight": False}
_RETRYING = Retrying(attempts=ATTEMPTS, base_seconds=1.0, cap_seconds=30.0)


@dataclass(frozen=True, slots=True)
class Job:
    """One input line that can be asked."""

    custom_id: str
    path: str
    body: bytes
    model: str
    request: bytes  # digest of what is asked; lines that share it are asked once

    @property
    def id(self) -> bytes:
        return blake2b(self.request + self.custom_id.encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class Bad:
    """One input line that cannot be asked, and why."""

    custom_id: str | None
    message: str


@dataclass(slots=True)
class Tally:
    """What the progress bar and the last line tell."""

    lines: int = 0
    before: int = 0  # answered by an earlier run
    answered: int = 0
    failed: int = 0
    asked: int = 0  # requests sent, those sent again included
    copied: int = 0  # lines that had another line's answer
    hits: int = 0
    nano_usd: int = 0
    unpriced: int = 0

    @property
    def done(self) -> int:
        return self.before + self.answered + self.failed

    def __str__(self) -> str:
        cost = f"${self.nano_usd / 1e9:,.4f}"
        if self.unpriced:
            cost += f" (price unknown for {self.unpriced:,})"
        return f"{self.hits:,} hits, {self.failed:,} errors, {cost}"


def parse_rate(text: str) -> float:
    """ "600/m", "10/s" or "1000/h" as requests a second. ConfigError for anything else."""
    match = _RATE.fullmatch(text.strip())
    if match is None or float(match[1]) <= 0:
        raise ConfigError("rate: is a number per s, m or h, such as 600/m.")
    return float(match[1]) / {"s": 1, "m": 60, "h": 3_600}[match[2]]


def read_line(line: bytes) -> Job | Bad:
    """One line of the input file, read strictly."""
    try:
        document = canonical.load(line)
    except BadRequest as exc:
        return Bad(None, str(exc).replace("The request body", "The line"))
    custom_id, body = document.get("custom_id"), document.get("body")
    path = document.get("url")
    if type(custom_id) is not str or not custom_id:
        return Bad(None, "custom_id must be a text.")
    if document.get("method") != "POST":
        return Bad(custom_id, "method must be POST.")
    if type(path) is not str or not _PATH.fullmatch(path):
        return Bad(custom_id, "url must be a path, such as /v1/chat/completions.")
    if type(body) is not dict:
        return Bad(custom_id, "body must be an object.")
    if body.get("stream"):
        return Bad(custom_id, "body asks for a stream, which an output line cannot hold.")
    named = blake2b(path.encode() + b"\0" + canonical.canonical(body), digest_size=16)
    model = str(body.get("model", ""))
    return Job(custom_id, path, canonical.dump(body), model, named.digest())


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


class Lines:
    """A file of JSON lines that only grows, a whole line at a time; one process may write it.

    Each line is with the kernel when `append` returns, so killing the process loses none. A power
    loss may take the last seconds' lines, which are then asked again. `close` waits for the disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open()

    def _open(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        try:
            self._file = os.open(self._path, flags, 0o666)
        except OSError as exc:
            raise ConfigError(f"{self._path} cannot be written: {exc.strerror}.") from exc
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise ConfigError(f"{self._path} is being written by another batch.") from None
        self.size = os.fstat(self._file).st_size

    def read(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        """Offset, bytes and content of each line. A torn last line is cut off.

        ConfigError when the file holds anything else, which is then left as it is.
        """
        with self._path.open("rb") as lines:
            offset = 0
            for number, line in enumerate(lines, 1):
                whole = line.endswith(b"\n")
                content = _content(line) if whole else None
                torn = not whole and _OURS[: len(line)] == line[: len(_OURS)]
                if content is None and not torn:
                    raise ConfigError(f"{self._path}: line {number} is no answer of a batch.")
                if content is None:
                    os.ftruncate(self._file, offset)
                    self.size = offset
                    return
                yield offset, line, content
                offset += len(line)

    def append(self, line: bytes) -> None:
        """Write it. ConfigError when the disk takes no more."""
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError as exc:
            with suppress(OSError):
                os.ftruncate(self._file, self.size)  # no half line for the next to land behind
            raise ConfigError(f"{self._path} cannot be written: {exc.strerror}.") from exc
        self.size += len(line)

    def at(self, offset: int) -> dict[str, Any]:
        """The line that begins there."""
        with self._path.open("rb") as lines:
            lines.seek(offset)
            content: dict[str, Any] = json.loads(lines.readline())  # no integer is too long for it
            return content

    def rewrite(self, lines: list[bytes]) -> None:
        """Hold these lines and no others, all at once: a killed process leaves the old or the new.

        ConfigError when the disk takes no more.
        """
        fresh = self._path.with_name(self._path.name + ".tmp")
        try:
            with fresh.open("wb") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
        except OSError as exc:
            raise ConfigError(f"{self._path} cannot be written: {exc.strerror}.") from exc
        os.close(self._file)
        self._open()

    def close(self) -> None:
        """Wait for the disk. A file without a line is taken away."""
        os.fsync(self._file)
        if self.size == 0:
            self._path.unlink(missing_ok=True)
        os.close(self._file)


def _content(line: bytes) -> dict[str, Any] | None:
    with suppress(ValueError):
        content = orjson.loads(line)
        if type(content) is dict and {"id", "custom_id", "response", "error"} <= content.keys():
            return content
    return None


@dataclass(frozen=True, slots=True)
class Settled:
    """What became of a request, as an output line tells it; both are JSON."""

    good: bool
    response: bytes = b"null"
    error: bytes = b"null"


class Batch:
    """The three files of one run: what is asked, what was answered, what failed."""

    def __init__(self, requests: Path, answers: Path, errors: Path) -> None:
        """Read all three, and so find out what is left to ask. ConfigError when they do not fit."""
        if len({path.resolve() for path in (requests, answers, errors)}) < 3:
            raise ConfigError("batch: input, output and errors must be three files.")
        self.tally = Tally()
        self._path, self._output, self.errors = requests, answers, errors
        self._names: dict[bytes, int] = {}  # of custom_ids not yet settled, to their lines
        self._jobs: dict[bytes, tuple[bytes, int]] = {}  # by id: request, place in the input
        self._bad: list[tuple[int, int]] = []
        self._known: dict[bytes, tuple[Lines, int]] = {}  # by request: where its answer stands
        with ExitStack() as files:
            try:
                self._requests = files.enter_context(requests.open("rb"))
            except OSError as exc:
                raise ConfigError(f"{requests} cannot be read: {exc.strerror}.") from exc
            self._survey()
            self._answers = Lines(answers)
            files.callback(self._answers.close)
            self._errors = Lines(errors)
            files.callback(self._errors.close)
            self._resume()
            self._files = files.pop_all()

    def close(self) -> None:
        self._files.close()

    def _survey(self) -> None:
        """Read the input through; of each line only digests and its place are kept."""
        offset = 0
        for number, line in enumerate(self._requests, 1):
            if line.strip():
                self._note(number, offset, read_line(line))
            offset += len(line)

    def _note(self, number: int, offset: int, read: Job | Bad) -> None:
        self.tally.lines += 1
        if read.custom_id is not None:
            first = self._names.setdefault(_name(read.custom_id), number)
            if first != number:
                where = f"{self._path}: lines {first} and {number}"
                raise ConfigError(f"{where} have the same custom_id.")
        if isinstance(read, Job):
            self._jobs[read.id] = read.request, offset
        else:
            self._bad.append((number, offset))

    def _resume(self) -> None:
        """Take off what an earlier run has settled; a failure that may pass is forgotten."""
        for offset, _, content in self._answers.read():
            self._settle(content, self._answers, offset)
        kept: list[bytes] = []
        end = 0
        for _, line, content in self._errors.read():
            if _final(content) and self._settle(content, self._errors, end):
                kept.append(line)
                end += len(line)
        if end < self._errors.size:
            self._errors.rewrite(kept)
        self.tally.failed = len(kept)

    def _settle(self, content: dict[str, Any], lines: Lines, offset: int) -> bool:
        name = _name(str(content["custom_id"]))
        if name not in self._names:
            return False  # of another batch, or settled already
        job = self._jobs.pop(_id_of(content), None)
        if job is None:
            if lines is self._errors:
                return False  # the request has been mended since
            line = self._names[name]
            raise ConfigError(
                f"{self._output} answers another request under the custom_id of line {line}; "
                "name another output file."
            )
        del self._names[name]
        self._known.setdefault(job[0], (lines, offset))
        self.tally.before += lines is self._answers
        return True

    def groups(self) -> Iterator[list[int]]:
        """What is left: places in the input, those together that ask the same. Asks for nothing
        that is known, and writes down what needs no asking on the way."""
        for number, offset in self._bad:
            bad = self._line(offset)
            if isinstance(bad, Bad):
                self._write_bad(number, bad)
        groups: dict[bytes, list[int]] = {}
        for request, offset in self._jobs.values():
            groups.setdefault(request, []).append(offset)
        self._jobs.clear()
        self._names.clear()
        for request, offsets in groups.items():
            if request in self._known:
                lines, offset = self._known[request]
                response = lines.at(offset)["response"]
                settled = Settled(lines is self._answers, canonical.dump(response))
                self.tally.copied += len(offsets)
                self.write(offsets, settled)
            else:
                yield offsets

    def job(self, offset: int) -> Job:
        """The input line that begins there."""
        read = self._line(offset)
        if isinstance(read, Bad):
            raise ConfigError(f"{self._path} has been changed meanwhile.")
        return read

    def _line(self, offset: int) -> Job | Bad:
        self._requests.seek(offset)
        return read_line(self._requests.readline())

    def write(self, offsets: list[int], settled: Settled) -> None:
        """Give all these lines this answer."""
        for offset in offsets:
            job = self.job(offset)
            self._append(job.id, job.custom_id, settled)

    def _write_bad(self, number: int, bad: Bad) -> None:
        told = {"code": "bad_line", "message": bad.message, "line": number}
        line_id = blake2b(b"%d" % number, digest_size=16).digest()
        self._append(line_id, bad.custom_id, Settled(False, error=orjson.dumps(told)))

    def _append(self, line_id: bytes, custom_id: str | None, settled: Settled) -> None:
        lines = self._answers if settled.good else self._errors
        named = line_id.hex().encode(), orjson.dumps(custom_id)
        told = settled.response, settled.error
        lines.append(_LINE % (*named, *told))
        if settled.good:
            self.tally.answered += 1
        else:
            self.tally.failed += 1


def _name(custom_id: str) -> bytes:
    return blake2b(custom_id.encode(), digest_size=16).digest()


def _id_of(content: dict[str, Any]) -> bytes:
    with suppress(ValueError):
        return bytes.fromhex(str(content["id"]).removeprefix("batch_req_"))
    return b""


def _final(content: dict[str, Any]) -> bool:
    """Whether asking again would be of no use."""
    response = content["response"]
    return type(response) is dict and not _passing(response.get("status_code", 0))


def _passing(status: int) -> bool:
    return may_pass(status, [])


# One run ------------------------------------------------------------------------------------------


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
        self._base = base
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
            if asked and _passing(told.status):
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
