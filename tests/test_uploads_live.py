"""Uploads that pass through: they take as long as they will, while somebody is at it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from tests.conftest import World, WorldMaker
from tests.rawhttp import Line, post
from tests.stopwatch import of_three

pytestmark = pytest.mark.live

FILES = "/v1/files"


def halves(size: int = 1_000_000) -> tuple[bytes, bytes]:
    whole = post(b"x" * size, path=FILES)
    return whole[: -size // 2], whole[-size // 2 :]


class Taker:
    """An upstream that takes what it is sent, and says nothing; `deaf`: the head and no more."""

    def __init__(self, *, deaf: bool = False) -> None:
        self.taken = 0  # bytes, heads aside
        self.left = asyncio.Event()
        self._deaf = deaf
        self._writers: list[asyncio.StreamWriter] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.append(writer)
        await reader.readuntil(b"\r\n\r\n")
        if self._deaf:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            return
        with suppress(ConnectionError):
            while part := await reader.read(65_536):
                self.taken += len(part)
        self.left.set()

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Its base URL."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1_024)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        finally:
            for writer in self._writers:
                writer.transport.abort()
            server.close()


async def counted(world: World) -> tuple[int, dict[str, int], dict[str, int]]:
    """Requests, bypasses and errors by reason, once there is one request."""

    async def recorded() -> bool:
        return bool((await world.stats())["requests"])

    await world.until(recorded)
    found = await world.stats()
    return found["requests"], found["bypasses"], found["error_reasons"]


@pytest.mark.parametrize("rudely", [False, True], ids=["fin", "reset"])
async def test_a_client_that_leaves_half_an_upload_is_no_error(
    make_world: WorldMaker, rudely: bool
) -> None:
    """I8, I12: upstream's part is ended at once, and nobody is blamed."""
    taker = Taker()
    async with (
        taker.listening() as base,
        make_world(model="none", upstream=base) as world,
        Line(world.base) as line,
    ):
        line.send(halves()[0])
        await world.until(lambda: taker.taken == 500_000)
        line.hang_up(rudely=rudely)
        await asyncio.wait_for(taker.left.wait(), 60)
        assert await counted(world) == (1, {"passthrough": 1}, {})


async def test_half_an_upload_is_never_taken_for_whole(make_world: WorldMaker) -> None:
    """Of no announced length, it would be, if its end were sent on: upstream sees a cut."""
    heard: list[bytes] = []
    came = asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        whole = await reader.readuntil(b"half\r\n")
        came.set()
        heard.append(whole + await reader.read())
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with make_world(model="none", upstream=base) as world, Line(world.base) as line:
        chunked = post(b"", path=FILES).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
        line.send(chunked + b"4\r\nhalf\r\n")
        await asyncio.wait_for(came.wait(), 60)
        line.hang_up()
        await world.until(lambda: bool(heard))
        assert heard[0].endswith(b"4\r\nhalf\r\n")
    server.close()


@pytest.mark.parametrize("half", [False, True], ids=["before the first byte", "half way"])
@of_three
async def test_a_client_that_falls_silent_is_told_so(make_world: WorldMaker, half: bool) -> None:
    """A 408 in the protocol's shape, and the connection ends: the rest might still come."""
    taker = Taker()
    flags = {"model": "none", "body_seconds": 0.3}
    async with (
        taker.listening() as base,
        make_world(upstream=base, **flags) as world,
        Line(world.base) as line,
    ):
        head, blank, body = halves()[0].partition(b"\r\n\r\n")
        line.send(head + blank + (body if half else b""))
        told = await line.answer()
        assert told.status == 408
        assert told.json["error"]["message"] == "The client sent nothing for 0.3 seconds."
        assert await line.rest() == b""
        if half:
            await asyncio.wait_for(taker.left.wait(), 60)
        assert taker.taken == 500_000 * half
        assert await counted(world) == (1, {}, {"bad_request": 1})


@of_three
async def test_an_upload_may_take_longer_than_any_pause_in_it(make_world: WorldMaker) -> None:
    """What is watched is silence, not the whole."""
    async with make_world(model="none", body_seconds=0.5) as world, Line(world.base) as line:
        whole = b"".join(halves(1_000))
        started = time.monotonic()
        for at in range(0, len(whole), 100):
            line.send(whole[at : at + 100])
            await asyncio.sleep(0.1)
        assert (await line.answer()).status == 200
        assert time.monotonic() - started > 2 * 0.5
        assert world.upstream.seen[0].body == b"x" * 1_000


async def test_an_upstream_that_takes_no_more_is_given_up(make_world: WorldMaker) -> None:
    """A 504 after `upstream_seconds`; the client could not even be seen to leave meanwhile."""
    flags = {"model": "none", "upstream_seconds": 0.5}
    async with (
        Taker(deaf=True).listening() as base,
        make_world(upstream=base, **flags) as world,
        Line(world.base) as line,
    ):
        line.send(b"".join(halves(30_000_000)))
        told = await line.answer()
        assert told.status == 504
        assert "took no more" in told.json["error"]["message"]
        assert await line.rest() == b""  # what is left of the upload is waited for no longer
        assert await counted(world) == (1, {}, {"upstream": 1})


async def test_who_is_answered_early_need_send_no_more(make_world: WorldMaker) -> None:
    """An answer that comes before the upload's end is passed on whole, however long it takes."""

    async def early(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
        await asyncio.sleep(0.7)
        writer.write(b"rest")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(early, "127.0.0.1", 0)
    base = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    flags = {"model": "none", "body_seconds": 0.3}
    async with make_world(upstream=base, **flags) as world, Line(world.base) as line:
        line.send(halves()[0])
        told = await line.answer()
        assert (told.status, told.body, told.whole) == (200, b"halfrest", True)
        assert await line.rest() == b""
        assert await counted(world) == (1, {"passthrough": 1}, {})
    server.close()
