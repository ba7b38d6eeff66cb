"""Running the sidecar: sockets, signals, worker processes, the embedded store's life.

Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import logging
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, TextIO, cast

import structlog
import uvicorn
import uvloop
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .embedded import EmbeddedValkey
from .errors import ConfigError
from .opening import embedded_store
from .settings import Settings
from .wiring import Sidecar, open_encoder, router, sidecar

__all__ = ["bind", "look_after", "quiet", "run", "running"]

log = structlog.get_logger("cache_proxy")

# Streams that are under way when the proxy is told to stop may take this long to end.
_DRAIN_SECONDS = 30
_WATCH_SECONDS = 0.5
_HEAD_SECONDS = 10.0
_RESTART_SECONDS = 1.0


def bind(name: str, host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError names the setting when the address is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP, or asyncio leaves Nagle on in what is accepted here: 40 ms an answer.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as exc:
        listening.close()
        reason = os.strerror(exc.errno or 0) if isinstance(exc, OSError) else "out of range"
        raise ConfigError(f"{name}: {host}:{port} cannot be listened on: {reason}.") from exc
    listening.setblocking(False)
    return listening


@asynccontextmanager
async def running(
    settings: Settings,
    store_url: str,
    *,
    proxy_socket: socket.socket,
    admin_socket: socket.socket | None,
    valkey: EmbeddedValkey | None = None,
) -> AsyncIterator[tuple[Sidecar, asyncio.Task[None]]]:
    """A sidecar that answers on its sockets; the task ends when its server does."""
    async with sidecar(settings, store_url, open_encoder(settings)) as built:
        servers = [_server(built.app)]
        sockets = [proxy_socket]
        if admin_socket is not None:
            servers.append(_server(built.admin))
            sockets.append(admin_socket)
        tasks = [
            asyncio.create_task(server.serve(sockets=[listening]))
            for server, listening in zip(servers, sockets, strict=True)
        ]
        watching = [asyncio.create_task(_close_slow(server)) for server in servers]
        if valkey is not None:
            watching.append(asyncio.create_task(_keep_alive(valkey)))
        try:
            # The server tells by a flag alone that it has started.
            while not all(server.started for server in servers):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
            yield built, tasks[0]
        finally:
            for server in servers:
                server.should_exit = True
            await asyncio.gather(*tasks, return_exceptions=True)
            for task in watching:
                task.cancel()


async def _keep_alive(valkey: EmbeddedValkey) -> None:
    """A store that died comes back by itself."""
    while True:
        await asyncio.sleep(_WATCH_SECONDS)
        look_after(valkey)


def look_after(valkey: EmbeddedValkey) -> None:
    """What fails now, for want of files or processes, is tried again at the next look."""
    try:
        valkey.ensure()
    except (ConfigError, OSError) as exc:
        log.warning("store", state="down", error=type(exc).__name__)


class _Protocol(HttpToolsProtocol):
    """Knows since when it has been waiting for a request's head; nothing else in here bounds it."""

    waiting_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.waiting_since = self.loop.time()
        super().connection_made(transport)

    def on_message_begin(self) -> None:
        self.waiting_since = self.loop.time()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self.waiting_since = None
        super().on_headers_complete()


async def _close_slow(server: uvicorn.Server) -> None:
    """Hang up on clients that dribble a request's head."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_HEAD_SECONDS / 10)
        for connection in list(server.server_state.connections):
            since = getattr(connection, "waiting_since", None)
            if since is not None and loop.time() - since > _HEAD_SECONDS:
                connection.transport.close()


class _Server(uvicorn.Server):
    """Leaves signals to us: several servers share this process."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _server(app: Any) -> _Server:
    return _Server(
        uvicorn.Config(
            app,
            http=_Protocol,
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=_DRAIN_SECONDS,
        )
    )


def run(settings: Settings, announce: Callable[[int, int], None]) -> None:
    """Serve until told to stop. `announce` gets the two ports once requests are answered."""
    quiet(settings.log_level)
    # What is missing must stop it here: a worker that cannot start is started again for ever.
    router(settings)
    settings.client_token_digests()
    proxy_socket = bind("port", settings.host, settings.port)
    admin_socket = bind("admin_port", settings.admin_host, settings.admin_port)
    ports = proxy_socket.getsockname()[1], admin_socket.getsockname()[1]
    with proxy_socket, admin_socket, embedded_store(settings) as (url, valkey):
        if settings.workers == 1:
            uvloop.run(
                _serve(settings, url, proxy_socket, admin_socket, valkey, lambda: announce(*ports))
            )
        else:
            _serve_many(settings, url, proxy_socket, admin_socket, valkey, lambda: announce(*ports))


async def _serve(
    settings: Settings,
    url: str,
    proxy_socket: socket.socket,
    admin_socket: socket.socket | None,
    valkey: EmbeddedValkey | None,
    ready: Callable[[], None],
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    if parent := multiprocessing.parent_process():
        # A worker without its parent has nobody who would replace it, stop it or free its port.
        loop.add_reader(parent.sentinel, stop.set)
    async with running(
        settings, url, proxy_socket=proxy_socket, admin_socket=admin_socket, valkey=valkey
    ) as (_, server):
        ready()
        gc.collect()
        gc.freeze()  # the libraries' objects stay; looking through them again costs every hit
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait((stopped, server), return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()


def _serve_many(
    settings: Settings,
    url: str,
    proxy_socket: socket.socket,
    admin_socket: socket.socket,
    valkey: EmbeddedValkey | None,
    ready: Callable[[], None],
) -> None:
    """Worker processes on one socket; one that dies is replaced. The first has the admin port."""
    spawn = multiprocessing.get_context("spawn")
    stopping = False

    def stop(*_: object) -> None:
        nonlocal stopping
        stopping = True

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)

    def start(place: int) -> SpawnProcess:
        child = spawn.Process(
            target=_worker,
            args=(settings, url, proxy_socket, admin_socket if place == 0 else None),
        )
        child.start()
        return child

    children = [start(place) for place in range(settings.workers)]
    ready()
    while not stopping:
        wait([child.sentinel for child in children], timeout=_WATCH_SECONDS)
        if valkey is not None:
            look_after(valkey)
        for place, child in enumerate(children):
            if not stopping and not child.is_alive():
                log.warning("worker", ended=child.exitcode)
                time.sleep(_RESTART_SECONDS)
                children[place] = start(place)
    for child in children:
        child.terminate()
    for child in children:
        child.join(_DRAIN_SECONDS + 5)
        if child.is_alive():
            child.kill()


def _worker(
    settings: Settings,
    url: str,
    proxy_socket: socket.socket,
    admin_socket: socket.socket | None,
) -> None:
    quiet(settings.log_level)
    uvloop.run(_serve(settings, url, proxy_socket, admin_socket, None, lambda: None))


class _Stderr(io.TextIOBase):
    """Whatever stderr is now. A line that cannot be written there (closed, its reader gone) is
    lost, and never an error of the request that had something to say."""

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return sys.stderr.write(text)
        return 0

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()


def quiet(level: str) -> None:
    """Our own log lines go to stderr; the server's and the libraries' only when they matter."""
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Stderr())),
        cache_logger_on_first_use=True,
    )
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    # It reports each broken stream as an error of the application, which here is the way to pass
    # upstream's break on.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
