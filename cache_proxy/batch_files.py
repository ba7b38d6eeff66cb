"""The files of a batch: what is asked, what was answered, what failed, and so what is left.

In the form of OpenAI's Batch API. Every answer is one whole line, written at once and never
changed, so that a run may be killed at any point: the next one reads what is there. Asks nobody
anything.

An answer's `id` is a digest of its `custom_id` and request, which is how a later run sees that an
output line answers this very request and not an older one of the same name.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from shutil import copyfileobj
from tempfile import TemporaryFile
from typing import IO, Any

import orjson

from . import canonical
from .errors import BadRequest, ConfigError
from .upstream.retry import may_pass

__all__ = ["Bad", "Batch", "Job", "Settled", "Tally", "read_line"]

_PATH = re.compile(r"/[!-~]*")
_OURS = b'{"id":"batch_req_'
_LINE = _OURS + b'%b","custom_id":%b,"response":%b,"error":%b}\n'


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


class Lines:
    """A file of JSON lines that only grows, a whole line at a time; one process may write it.

    Each line is with the kernel when `append` returns, so killing the process loses none. A power
    loss may take the last seconds' lines, which are then asked again. `close` waits for the disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()  # a link is neither unlinked nor replaced, its target may be
        self._open()

    def _open(self) -> None:
        if self._path.exists() and not self._path.is_file():  # a device is never to be unlinked
            raise ConfigError(f"{self._path} is no file; what was answered is read back from it.")
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
                self._requests = files.enter_context(_seekable(requests))
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


def _seekable(path: Path) -> IO[bytes]:
    """The file, opened; what comes out of a pipe is first kept in a file without a name."""
    file = path.open("rb")
    if file.seekable():
        return file
    with file:
        kept: IO[bytes] = TemporaryFile()  # noqa: SIM115 - the caller's to close
        copyfileobj(file, kept)
    kept.seek(0)
    return kept


def _name(custom_id: str) -> bytes:
    return blake2b(custom_id.encode(), digest_size=16).digest()


def _id_of(content: dict[str, Any]) -> bytes:
    with suppress(ValueError):
        return bytes.fromhex(str(content["id"]).removeprefix("batch_req_"))
    return b""


def _final(content: dict[str, Any]) -> bool:
    """Whether asking again would be of no use."""
    response = content["response"]
    return type(response) is dict and not may_pass(response.get("status_code", 0), [])
