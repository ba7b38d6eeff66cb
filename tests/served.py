"""The commands as processes of their own, as an operator runs them."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Ran", "Served", "command", "until"]

# No audit that would make every count a guess, and deadlines that no busy machine misses.
PATIENT = {
    "CACHE_PROXY_AUDIT_SHARE": "0",
    "CACHE_PROXY_CACHE_MS": "60000",
    "CACHE_PROXY_STORE_MS": "30000",
}


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    out: str
    err: str


async def command(*words: str, **environment: str) -> Ran:
    """`cache-proxy WORDS` or, with "stats" in front, `cache-stats WORDS`, to its end."""
    module = "cache_proxy.cli import app"
    if words[0] == "stats":
        module, words = "cache_proxy.cli import stats_app as app", words[1:]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        f"from {module}; app()",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "COLUMNS": "140", **PATIENT, **environment},
    )
    async with asyncio.timeout(100):
        out, err = await process.communicate()
    assert process.returncode is not None
    return Ran(process.returncode, out.decode(), err.decode())


class Served:
    """`cache-proxy serve` on free ports, the embedded store in `data_dir`."""

    def __init__(self, data_dir: Path, upstream: str, *flags: str, **environment: str) -> None:
        self.data_dir = data_dir
        self._flags = ("--upstream", upstream, "--data-dir", str(data_dir), *flags)
        self._environment = environment
        self._out = data_dir.parent / f"{data_dir.name}.out"
        self._err = data_dir.parent / f"{data_dir.name}.err"
        self.process: subprocess.Popen[bytes] | None = None
        self.port = self.admin_port = 0

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    @property
    def token(self) -> str:
        return (self.data_dir / "admin.token").read_text()

    @property
    def out(self) -> str:
        return self._out.read_text()

    @property
    def err(self) -> str:
        return self._err.read_text()

    async def start(self, seconds: float = 90.0) -> Served:
        """Return once the banner is out, which is when requests are answered."""
        with self._out.open("wb") as out, self._err.open("ab") as err:
            self.process = subprocess.Popen(  # noqa: ASYNC220  signalled by its id, polled, never read
                [
                    *(sys.executable, "-m", "cache_proxy", "serve"),
                    *("--port", "0", "--admin-port", "0"),
                    *self._flags,
                ],
                stdout=out,
                stderr=err,
                env={**os.environ, **PATIENT, **self._environment},
            )
        process = self.process
        await until(lambda: "stats: " in self.out or process.poll() is not None, seconds)
        assert process.poll() is None, self.err
        self.port = int(re.findall(r"listens on http://[^:]+:(\d+)", self.out)[0])
        self.admin_port = int(re.findall(r"admin: http://[^:]+:(\d+)", self.out)[0])
        return self

    async def stop(self, seconds: float = 60.0) -> int:
        """SIGTERM, and the exit status."""
        return await self._end(signal.SIGTERM, seconds)

    async def kill(self) -> None:
        await self._end(signal.SIGKILL, 60.0)

    async def _end(self, number: int, seconds: float) -> int:
        process = self.process
        assert process is not None
        process.send_signal(number)
        await until(lambda: process.poll() is not None, seconds)
        assert process.returncode is not None
        return process.returncode

    async def __aenter__(self) -> Served:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            try:
                await self.stop()
            finally:
                self.process.kill()
                self.process.wait()


async def until(true: Callable[[], bool], seconds: float = 60.0) -> None:
    """Wait for a condition, with a deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come to pass in time"
        await asyncio.sleep(0.01)
