"""What the listening sockets promise to the event loops that answer on them."""

from __future__ import annotations

import asyncio
import socket

import pytest

from cache_proxy.errors import ConfigError
from cache_proxy.serve import bind

pytestmark = pytest.mark.live


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_an_answer_in_two_writes_is_not_held_back_for_the_clients_acknowledgement(
    host: str,
) -> None:
    """Nagle is off in every accepted connection: head and body leave at once, not 40 ms apart."""
    accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def connected(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = writer.get_extra_info("socket")
        accepted.set_result(peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
        writer.close()

    try:
        listening = bind("port", host, 0)
    except ConfigError:
        if host == "::1":
            pytest.skip("this machine has no IPv6")
        raise
    server = await asyncio.start_server(connected, sock=listening)
    async with server:
        _, writer = await asyncio.open_connection(*listening.getsockname()[:2])
        assert await asyncio.wait_for(accepted, 60)
        writer.close()
