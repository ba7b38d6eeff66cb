"""What sharing one upstream call promises: nobody is cut off, nobody waits in vain, no memory runs.

No sockets: upstream is a tap that the test turns.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

import pytest

from cache_proxy.flights import AHEAD_BYTES, Flight, Flights

KEY = b"the same question"
BLOCK = b"x" * 65_536


class Tap:
    """An upstream answer that flows as the test lets it."""

    status = 200

    def __init__(self) -> None:
        self.headers = [(b"content-type", b"text/plain")]
        self.finished = False
        self.closed = False
        self.handed = 0  # bytes taken from it
        self.calls = 0
        self._chunks: asyncio.Queue[bytes | Exception | None] = asyncio.Queue()
        self._head = asyncio.Event()

    async def send(self) -> Tap:
        self.calls += 1
        await self._head.wait()
        return self

    def answer(self) -> Tap:
        """Let the head come."""
        self._head.set()
        return self

    def pour(self, *chunks: bytes) -> None:
        for chunk in chunks:
            self._chunks.put_nowait(chunk)

    def end(self, error: Exception | None = None) -> None:
        self._chunks.put_nowait(error)

    async def chunks(self) -> AsyncIterator[bytes]:
        while (chunk := await self._chunks.get()) is not None:
            if isinstance(chunk, Exception):
                raise chunk
            self.finished = self.finished or chunk.endswith(b"END")
            self.handed += len(chunk)
            yield chunk

    async def close(self) -> None:
        self.closed = True


class Airport:
    """Flights, and how often each one landed."""

    def __init__(self, hold_bytes: int = 4 * AHEAD_BYTES) -> None:
        self.flights: Flights[bytes | None] = Flights(hold_bytes=hold_bytes)
        self.landings: list[bytes | None] = []

    def join(self, tap: Tap, key: bytes | None = KEY) -> tuple[Flight[bytes | None], bool]:
        return self.flights.join(key, tap.send, self._landed)

    def _landed(self, flight: Flight[bytes | None]) -> bytes | None:
        self.landings.append(flight.body)
        return flight.body


@pytest.fixture
def airport() -> Airport:
    return Airport()


async def whole(flight: Flight[bytes | None]) -> bytes:
    """One caller's whole answer; leaves at the end, however it comes."""
    try:
        await flight.head()
        return b"".join([chunk async for chunk in flight.chunks()])
    finally:
        flight.leave()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110  what it waits for takes turns, not time
            await asyncio.sleep(0)


async def quiet(turns: int = 200) -> None:
    """Give everything that can still happen the turns to happen."""
    for _ in range(turns):
        await asyncio.sleep(0)


# One call for all -------------------------------------------------------------------------------


async def test_ten_callers_share_one_call_and_all_get_every_byte(airport: Airport) -> None:
    tap = Tap().answer()
    flights = [airport.join(tap) for _ in range(10)]
    callers = [asyncio.create_task(whole(flight)) for flight, _ in flights]
    tap.pour(b"one ", b"answer")
    tap.end()

    assert await asyncio.gather(*callers) == [b"one answer"] * 10
    assert [joined for _, joined in flights] == [False] + [True] * 9
    assert tap.calls == 1
    assert airport.landings == [b"one answer"]
    assert tap.closed


async def test_who_joins_in_mid_answer_still_gets_it_from_the_first_byte(airport: Airport) -> None:
    tap = Tap().answer()
    first, _ = airport.join(tap)
    early = asyncio.create_task(whole(first))
    tap.pour(b"already ", b"said, ")
    await until(lambda: tap.handed == 14)
    second, joined = airport.join(tap)
    late = asyncio.create_task(whole(second))
    tap.pour(b"and then more")
    tap.end()

    assert joined
    assert await early == await late == b"already said, and then more"


@pytest.mark.parametrize("leavers", [(0,), (9,), (0, 1, 2, 3, 4, 5, 6, 7, 8)])
async def test_whoever_leaves_the_rest_are_served(airport: Airport, leavers: tuple[int]) -> None:
    """I8: the one who began it is nobody special."""
    tap = Tap().answer()
    callers = [asyncio.create_task(whole(airport.join(tap)[0])) for _ in range(10)]
    tap.pour(b"half ")
    await until(lambda: tap.handed == 5)
    for place in leavers:
        callers[place].cancel()
    await quiet()
    tap.pour(b"and half")
    tap.end()

    answers = await asyncio.gather(*callers, return_exceptions=True)
    stayed = [answer for place, answer in enumerate(answers) if place not in leavers]
    assert stayed == [b"half and half"] * (10 - len(leavers))
    assert tap.calls == 1


@pytest.mark.parametrize("headed", [False, True], ids=["before the head", "in mid-answer"])
async def test_the_last_to_leave_ends_the_call(airport: Airport, headed: bool) -> None:
    """I8: upstream works for nobody no longer, and the key is free."""
    tap = Tap()
    if headed:
        tap.answer().pour(b"half")
    callers = [asyncio.create_task(whole(airport.join(tap)[0])) for _ in range(3)]
    await until(lambda: tap.calls == 1)
    await quiet()
    for caller in callers[:2]:
        caller.cancel()
    await quiet()
    assert not tap.closed
    assert len(airport.flights) == 1
    callers[2].cancel()
    await until(lambda: len(airport.flights) == 0)

    assert tap.closed == headed  # without a head there was no answer to close yet
    assert airport.landings == [None]  # and half an answer never counts as one


async def test_who_asks_in_the_moment_the_last_one_leaves_gets_a_call_of_their_own(
    airport: Airport,
) -> None:
    """A call that is being ended takes nobody aboard: they would go down with it."""
    tap, second = Tap().answer(), Tap().answer()
    flight, _ = airport.join(tap)
    await quiet()
    flight.leave()
    fresh, joined = airport.join(second)
    second.pour(b"mine")
    second.end()

    assert not joined
    assert await whole(fresh) == b"mine"
    assert len(airport.flights) == 0


async def test_a_call_that_is_left_before_its_first_step_leaves_nothing_behind(
    airport: Airport,
) -> None:
    """I7: a key that nobody frees would stay for good."""
    tap = Tap()
    flight, _ = airport.join(tap)
    flight.leave()
    await quiet()

    assert tap.calls == 0
    assert len(airport.flights) == 0
    assert airport.landings == [None]


async def test_no_key_flies_alone(airport: Airport) -> None:
    taps = [Tap().answer() for _ in range(3)]
    flights = [airport.join(tap, None) for tap in taps]
    for number, tap in enumerate(taps):
        tap.pour(b"%d" % number)
        tap.end()

    assert [await whole(flight) for flight, _ in flights] == [b"0", b"1", b"2"]
    assert not any(joined for _, joined in flights)


async def test_other_keys_do_not_share(airport: Airport) -> None:
    one, other = Tap().answer(), Tap().answer()
    flights = [airport.join(one, b"a")[0], airport.join(other, b"b")[0]]
    one.pour(b"for a")
    other.pour(b"for b")
    one.end()
    other.end()

    assert [await whole(flight) for flight in flights] == [b"for a", b"for b"]


# Ends -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headed", [False, True], ids=["no head", "cut in mid-answer"])
async def test_all_aboard_learn_the_error_and_the_key_is_free_again(
    airport: Airport, headed: bool
) -> None:
    broken = Tap()

    async def refuse() -> Tap:
        if not headed:
            raise ConnectionError("upstream is gone")
        return broken.answer()

    if headed:
        broken.pour(b"half")
        broken.end(ConnectionError("upstream is gone"))
    flights = [airport.flights.join(KEY, refuse, lambda flight: flight.body)[0] for _ in range(5)]
    answers = await asyncio.gather(*map(whole, flights), return_exceptions=True)

    assert [str(answer) for answer in answers] == ["upstream is gone"] * 5
    assert {flight.body for flight in flights} == {None}
    tap = Tap().answer()
    again, joined = airport.join(tap)
    tap.pour(b"well")
    tap.end()
    assert not joined
    assert await whole(again) == b"well"


async def test_who_asks_after_the_end_starts_anew(airport: Airport) -> None:
    first, second = Tap().answer(), Tap().answer()
    flight, _ = airport.join(first)
    first.pour(b"1")
    first.end()
    assert await whole(flight) == b"1"
    again, joined = airport.join(second)
    second.pour(b"2")
    second.end()

    assert not joined
    assert await whole(again) == b"2"


async def test_whoever_has_the_last_byte_finds_the_key_free_and_the_landing_done(
    airport: Airport,
) -> None:
    """What came of an answer is under way before anybody can ask again, although upstream has
    not closed the answer yet."""
    tap = Tap().answer()
    flight, _ = airport.join(tap)
    tap.pour(b"the ", b"END")
    async for chunk in flight.chunks():
        if chunk == b"END":
            break

    assert airport.landings == [b"the END"]
    assert flight.landing == b"the END"
    assert len(airport.flights) == 0
    other = Tap()
    fresh, joined = airport.join(other)
    assert not joined
    fresh.leave()
    flight.leave()
    tap.end()
    await until(lambda: tap.closed)  # the trailing end was still read
    await until(lambda: len(airport.flights) == 0)
    assert airport.landings == [b"the END", None]  # each landed once


# Bounds -----------------------------------------------------------------------------------------


async def test_a_slow_reader_slows_its_own_call(airport: Airport) -> None:
    """I7: upstream runs at most so far ahead of the fastest reader."""
    tap = Tap().answer()
    flight, _ = airport.join(tap)
    await flight.head()
    reading = flight.chunks()
    tap.pour(*[BLOCK] * 64)
    tap.end()
    await anext(reading)
    await quiet()
    assert AHEAD_BYTES <= tap.handed <= AHEAD_BYTES + 3 * len(BLOCK)

    for _ in range(20):
        await anext(reading)
    await quiet()
    assert tap.handed <= AHEAD_BYTES + 23 * len(BLOCK)
    rest = [chunk async for chunk in reading]
    flight.leave()
    assert 21 + len(rest) == 64


async def test_the_slowest_sets_the_pace_once_the_buffer_is_full() -> None:
    """I7: a fast reader cannot make the proxy hold any amount for a slow one."""
    airport = Airport(hold_bytes=2 * AHEAD_BYTES)
    tap = Tap().answer()
    slow, _ = airport.join(tap)
    fast, _ = airport.join(tap)
    crawling = slow.chunks()
    tap.pour(*[BLOCK] * 128)  # 8 MiB
    tap.end()
    await anext(crawling)
    running = asyncio.create_task(whole(fast))
    await quiet(2_000)
    assert tap.handed <= 2 * AHEAD_BYTES + 3 * len(BLOCK)

    rest = [chunk async for chunk in crawling]
    slow.leave()
    assert 1 + len(rest) == 128
    assert len(await running) == 128 * len(BLOCK)


async def test_past_the_hold_limit_what_was_read_is_let_go_and_nobody_may_join() -> None:
    """I7: a huge answer is passed on and not kept in memory; who joined too late would find its
    beginning gone."""
    airport = Airport(hold_bytes=AHEAD_BYTES)
    tap = Tap().answer()
    flight, _ = airport.join(tap)
    tap.pour(*[BLOCK] * 40)
    reading = flight.chunks()
    for _ in range(30):
        await anext(reading)
    other = Tap()
    second, joined = airport.join(other)

    assert not joined
    assert sum(map(len, flight._buffer)) <= AHEAD_BYTES + 2 * len(BLOCK)
    second.leave()
    tap.end()
    assert len([chunk async for chunk in reading]) == 10
    flight.leave()
    assert flight.body is None


async def test_who_boarded_but_has_not_begun_to_read_still_gets_the_first_byte() -> None:
    """Letting go counts everybody aboard, not only those who read already: the others would be
    given somebody's middle for their beginning."""
    airport = Airport(hold_bytes=8)
    tap = Tap().answer()
    quick, _ = airport.join(tap)
    tardy, _ = airport.join(tap)
    tap.pour(b"0123456", b"789abcd", b"efghijk")
    reading = quick.chunks()
    got = [await anext(reading), await anext(reading)]
    answer = asyncio.create_task(whole(tardy))
    tap.end()
    got += [chunk async for chunk in reading]
    quick.leave()

    assert b"".join(got) == b"0123456789abcdefghijk"
    assert await answer == b"0123456789abcdefghijk"
