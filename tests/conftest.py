"""The world that live tests ask: a scripted upstream and a real sidecar before it, on loopback.

Real Valkey, real model, real sockets. The store and the encoder are started once a session; every
test has a key prefix, an index and an upstream of its own.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import settings as examples

from cache_proxy import settings as configuration
from cache_proxy import stats
from cache_proxy.embedded import EmbeddedValkey
from cache_proxy.serve import bind, running
from cache_proxy.upstream.client import Upstream
from cache_proxy.wiring import Sidecar, open_encoder
from embeddings import Encoder
from tests.scripted import ScriptedUpstream, scripted_upstream

_names = itertools.count(1)

# The same examples each time, however long one takes: a run here must not fail by chance.
examples.load_profile("ci")


@dataclass
class Answered:
    """A whole answer as the client got it."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        return orjson.loads(self.body)

    @property
    def kind(self) -> str:
        return self.headers.get("x-cache", "")

    @property
    def tier(self) -> str:
        return self.headers.get("x-cache-tier", "")

    @property
    def reason(self) -> str:
        return self.headers.get("x-cache-reason", "")

    @property
    def text(self) -> str:
        """What the assistant said, from JSON or from a stream."""
        if not self.headers.get("content-type", "").startswith("text/event-stream"):
            return str(self.json["choices"][0]["message"]["content"])
        events = [line[6:] for line in self.body.split(b"\n") if line.startswith(b"data: {")]
        deltas = [piece["delta"] for event in events for piece in orjson.loads(event)["choices"]]
        return "".join(delta.get("content") or "" for delta in deltas)


@dataclass
class World:
    """A sidecar, its upstream, and a way to ask."""

    upstream: ScriptedUpstream
    sidecar: Sidecar
    base: str  # of the proxy, with /v1
    admin: str
    token: str
    data_dir: Path
    client: Upstream
    kinds: list[str] = field(default_factory=list)

    async def send(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
        base: str | None = None,
    ) -> Answered:
        """One raw request, `path` below the proxy's origin; its whole answer."""
        origin = base or self.base.removesuffix("/v1")
        named = [(k.lower().encode(), v.encode("latin-1")) for k, v in (headers or {}).items()]
        response = await self.client.send(method, origin + path, named, body, read_seconds=90)
        whole = b"".join([chunk async for chunk in response.chunks()])
        await response.close()
        told = {k.decode(): v.decode("latin-1") for k, v in response.headers}
        return Answered(response.status, told, whole)

    async def ask(
        self,
        text: str | list[dict[str, Any]],
        *,
        key: str = "sk-one",
        headers: dict[str, str] | None = None,
        **fields: Any,
    ) -> Answered:
        """One chat completion; `text` is the user's text or all messages."""
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        body = {"model": "gpt-4o-mini", "messages": messages} | fields
        named = {"content-type": "application/json", "authorization": f"Bearer {key}"}
        answered = await self.send(
            "POST", "/v1/chat/completions", orjson.dumps(body), named | (headers or {})
        )
        self.kinds.append(answered.kind.lower())
        return answered

    async def stats(self, by: stats.By | None = None) -> dict[str, Any]:
        """What `cache-stats --json` would print now."""
        store = self.sidecar.memory.store
        await self.sidecar.ledger.flush(store)
        now = time.time()
        return stats.as_json(await stats.collect(store, now - 3_600, now, by))

    async def until(
        self, done: Callable[[], bool | Awaitable[bool]], seconds: float = 60.0
    ) -> None:
        """Wait for a condition, with a deadline."""
        deadline = time.monotonic() + seconds
        while True:
            found = done()
            if found if isinstance(found, bool) else await found:
                return
            assert time.monotonic() < deadline, "the condition did not come true in time"
            await asyncio.sleep(0.01)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that wait for sockets and models first: what takes no time fills up the end."""
    items.sort(key=lambda item: "live" not in item.keywords)


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real Valkey that all tests of the session share."""
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"), 512 * 1024 * 1024)
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session", autouse=True)
def one_encoder() -> Iterator[None]:
    """The packaged model is loaded once: a session starts some hundreds of sidecars."""
    opened: dict[str, Encoder | None] = {}

    def open_once(settings: configuration.Settings) -> Encoder | None:
        if settings.model != "all-MiniLM-L6-v2":
            return open_encoder(settings)
        if settings.model not in opened:
            opened[settings.model] = open_encoder(settings)
        return opened[settings.model]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cache_proxy.serve.open_encoder", open_once)
        yield


class _Hurried:
    """asyncio, for who looks every tenth of a second whether it is over: ten times as often."""

    def __getattr__(self, name: str) -> Any:
        return getattr(asyncio, name)

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds / 10)


@pytest.fixture(scope="session", autouse=True)
def servers_end_soon() -> Iterator[None]:
    """uvicorn takes a quarter of a second to close, which all worlds together make minutes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("uvicorn.server.asyncio", _Hurried())
        yield


WorldMaker = Callable[..., Any]


@pytest.fixture
def make_world(valkey: str, tmp_path: Path) -> WorldMaker:
    """`async with make_world(threshold=0.9) as world:` for a sidecar with settings of its own."""
    return world_maker(valkey, tmp_path / "data")


def world_maker(valkey: str, data_dir: Path) -> WorldMaker:
    """The same, for fixtures that outlive a test."""

    @asynccontextmanager
    async def make(store_url: str = valkey, **flags: Any) -> AsyncIterator[World]:
        async with AsyncExitStack() as stack:
            upstream = await stack.enter_async_context(scripted_upstream())
            settings = configuration.load(
                **{
                    "upstream": upstream.base_url,
                    "data_dir": data_dir,
                    "redis_url": store_url,
                    "key_prefix": f"t{next(_names)}-{time.time_ns()}",
                    # These tests ask what is served, not how fast a busy machine is.
                    "audit_share": 0,  # an audit more or less would make every count a guess
                    # Likewise a retry; tests of them ask for them.
                    "retry": {"attempts": 1},
                    "cache_ms": 60_000,
                    "store_ms": 30_000,
                }
                | flags
            )
            proxy_socket, admin_socket = (
                bind("port", "127.0.0.1", 0),
                bind("admin_port", "127.0.0.1", 0),
            )
            sidecar, _ = await stack.enter_async_context(
                running(settings, store_url, proxy_socket=proxy_socket, admin_socket=admin_socket)
            )
            client = Upstream(max_connections=500, connect_seconds=60)
            stack.push_async_callback(client.close)
            stack.callback(upstream.stop)  # beside the sidecar, which takes as long
            yield World(
                upstream=upstream,
                sidecar=sidecar,
                base=f"http://127.0.0.1:{proxy_socket.getsockname()[1]}/v1",
                admin=f"http://127.0.0.1:{admin_socket.getsockname()[1]}",
                token=(settings.data_dir / "admin.token").read_text(),
                data_dir=settings.data_dir,
                client=client,
            )

    return make


@pytest.fixture
async def world(make_world: WorldMaker) -> AsyncIterator[World]:
    """A sidecar with the default settings."""
    async with make_world() as made:
        yield made
