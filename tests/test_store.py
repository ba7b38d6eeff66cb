"""What the store promises: checked entries, purges that hold, caps, and no harm when it is sick."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakeredis
import pytest
from redis.asyncio import Redis

from cache_proxy.breaker import Breaker, Line
from cache_proxy.embedded import EmbeddedValkey
from cache_proxy.errors import ConfigError, MemoryUnavailable
from cache_proxy.model import Entry, Selector, Usage
from cache_proxy.store import Change, Store
from tests.stopwatch import awake, of_three

SECRET = b"s" * 32
FINGERPRINT = b"f" * 8
NOW = 1_700_000_000
TOKEN = b"t" * 20
VECTOR = bytes(768)


class Clock:
    def __init__(self) -> None:
        self.now = float(NOW)

    def __call__(self) -> float:
        return self.now


def digest(serial: int) -> bytes:
    return serial.to_bytes(20, "big")


def entry(serial: int = 1, **changes: Any) -> Entry:
    made = Entry(
        digest=digest(serial),
        partition=b"p" * 20,
        fingerprint=FINGERPRINT,
        epoch=0,
        created=NOW,
        expires=NOW + 3600,
        text=f"secret question {serial}",
        model="gpt-4.1-mini",
        provider="openai",
        tenant="ab" * 20,
        namespace="shop",
        tags=("faq",),
        usage=Usage(12, 200),
        cost=123,
        body=b'{"secret answer":%d}' % serial,
    )
    return replace(made, **changes)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = EmbeddedValkey(tmp_path_factory.mktemp("valkey"), 256 * 2**20)
    yield server.start()
    server.stop()


Open = Callable[..., Store]


@pytest.fixture(params=["twin", pytest.param("valkey", marks=pytest.mark.live)])
async def redis(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    """An empty store: its in-memory twin, and the real one."""
    if request.param == "twin":
        client: Any = fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer())
    else:
        client = Redis.from_url(request.getfixturevalue("valkey"))
    await client.flushall()
    yield client
    await client.aclose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def open_store(
    redis: Any, clock: Clock, request: pytest.FixtureRequest
) -> AsyncIterator[Open]:
    """Opens any number of stores, as many processes would, on the one server."""
    opened = []

    def open_(**options: Any) -> Store:
        client: Any = redis
        if not isinstance(redis, fakeredis.FakeAsyncRedis):
            client = Redis.from_url(request.getfixturevalue("valkey"))
        options = {"secret": SECRET, "fingerprint": FINGERPRINT, "clock": clock, **options}
        opened.append(Store("redis://unused", client=client, deadline_seconds=30.0, **options))
        return opened[-1]

    yield open_
    for store in opened:
        await store.close()


@pytest.fixture
def store(open_store: Open) -> Store:
    return open_store()


# What is stored comes back, checked -----------------------------------------------------------


async def test_one_look_brings_entry_vector_epoch_and_acceptance(store: Store) -> None:
    """All that a request must know of the store comes in one answer."""
    assert await store.put(entry(), VECTOR, 3600) == []
    await store.accept(TOKEN, NOW + 0.5)
    look = await store.look(digest(1), TOKEN)
    assert (look.entry, look.vector, look.epoch, look.accepted) == (entry(), VECTOR, 0, NOW)


async def test_what_was_never_stored_is_an_empty_look(store: Store) -> None:
    """Unknown digests and credentials are plain absences, not errors."""
    look = await store.look(digest(1), TOKEN)
    assert (look.entry, look.vector, look.epoch, look.accepted) == (None, b"", 0, None)
    assert not store.rejected


async def test_fetch_keeps_the_order_and_leaves_gaps(store: Store) -> None:
    """Each digest has its own place in the answer."""
    await store.put(entry(1), b"", 3600)
    await store.put(entry(3), VECTOR, 3600)
    assert await store.fetch([digest(n) for n in (3, 2, 1)]) == [
        (entry(3), VECTOR),
        None,
        (entry(1), b""),
    ]
    assert await store.fetch([]) == []


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"fingerprint": b"another!"}, "fingerprint"),
        ({"epoch": 1}, "epoch"),
    ],
)
async def test_an_entry_that_does_not_count_is_a_miss(
    store: Store, change: dict[str, Any], why: str
) -> None:
    """I1: another encoder's, or one from a purge epoch that nobody knows."""
    await store.put(entry(**change), VECTOR, 3600)
    assert (await store.look(digest(1), TOKEN)).entry is None
    assert await store.fetch([digest(1)]) == [None]
    assert store.rejected == {why: 2}


async def test_an_entry_expires_to_the_second_by_our_clock(store: Store, clock: Clock) -> None:
    """I1: though the server still holds the value, at its last second it no longer counts."""
    await store.put(entry(), VECTOR, 9999)
    clock.now = NOW + 3599.9
    assert (await store.look(digest(1), TOKEN)).entry == entry()
    clock.now = NOW + 3600.0
    assert (await store.look(digest(1), TOKEN)).entry is None
    assert store.rejected == {"expired": 1}


async def test_an_expired_entry_is_held_for_looks_alone_as_long_as_asked(
    open_store: Open, clock: Clock
) -> None:
    """I1: it comes apart from those that count, verified like them, and meaning never finds it."""
    store = open_store(longest_ttl_seconds=3600, stale_seconds=600)
    await store.put(entry(), VECTOR, 3600)
    assert await store._redis.ttl(store._e + digest(1)) in (4199, 4200)
    assert (await store.look(digest(1), TOKEN)).stale is None
    for late in (3600, 4199):
        clock.now = NOW + late
        await store.put(entry(2, expires=NOW + 9000), b"", 3600)  # which clears the books
        look = await store.look(digest(1), TOKEN)
        assert (look.entry, look.stale) == (None, entry())
    assert await store.fetch([digest(1)]) == [None]
    assert [
        head async for heads in store.slices() for head in heads if head.digest == digest(1)
    ] == []
    clock.now = NOW + 4200
    assert (await store.look(digest(1), TOKEN)).stale is None
    await store.put(entry(2, expires=NOW + 9000), b"", 3600)
    assert (await store.size())[0] == 1


async def test_a_purge_reaches_what_is_held_past_its_time(open_store: Open, clock: Clock) -> None:
    """Expired is not forgotten, purged is."""
    store = open_store(longest_ttl_seconds=3600, stale_seconds=600)
    await store.put(entry(), b"", 3600)
    clock.now = NOW + 3601
    await store.purge(Selector(tag="faq"), clock.now)
    assert (await store.look(digest(1), TOKEN)).stale is None


async def test_an_entry_whose_caller_wanted_it_gone_sooner_is_not_held(
    open_store: Open, clock: Clock
) -> None:
    """Callers may tighten: a shorter time is the whole time."""
    store = open_store(longest_ttl_seconds=3600, stale_seconds=600)
    await store.put(entry(expires=NOW + 60), b"", 60)
    assert await store._redis.ttl(store._e + digest(1)) in (59, 60)


async def test_an_entry_under_anothers_key_is_a_miss(store: Store, redis: Any) -> None:
    """I1: whole and genuine, and still not the answer to this question."""
    await store.put(entry(1), VECTOR, 3600)
    await redis.copy(b"cp1:e:" + digest(1), b"cp1:e:" + digest(2))
    assert (await store.look(digest(2), TOKEN)).entry is None
    assert store.rejected == {"foreign": 1}


async def test_another_secret_reads_nothing(store: Store, open_store: Open) -> None:
    """Who lacks the secret can neither plant entries nor be fooled by old ones."""
    await open_store(secret=b"x" * 32).put(entry(), VECTOR, 3600)
    assert (await store.look(digest(1), TOKEN)).entry is None
    assert store.rejected == {"corrupt": 1}


async def test_two_hundred_flipped_bits_never_give_a_wrong_entry(store: Store, redis: Any) -> None:
    """I1: damage at rest is a miss, wherever it strikes."""
    await store.put(entry(), VECTOR, 3600)
    key = b"cp1:e:" + digest(1)
    value = await redis.get(key)
    dice = random.Random(7)
    for _ in range(200):
        hurt = bytearray(value)
        hurt[dice.randrange(len(hurt))] ^= 1 << dice.randrange(8)
        await redis.set(key, bytes(hurt))
        assert (await store.look(digest(1), TOKEN)).entry is None
    assert store.rejected == {"corrupt": 200}


@pytest.mark.parametrize("value", [b"", b"x", b"\x80\x04N.", b"0" * 5000])
async def test_foreign_values_are_misses(store: Store, redis: Any, value: bytes) -> None:
    """Empty, short, pickled or random: never an exception, never an empty answer."""
    await redis.set(b"cp1:e:" + digest(1), value)
    assert (await store.look(digest(1), TOKEN)).entry is None


async def test_a_value_of_the_wrong_type_is_a_miss(store: Store, redis: Any) -> None:
    """A list where an entry should be harms no other look of the same tick."""
    await store.put(entry(2), VECTOR, 3600)
    await redis.rpush(b"cp1:e:" + digest(1), "x")
    one, two = await asyncio.gather(store.look(digest(1), TOKEN), store.look(digest(2), TOKEN))
    assert (one.entry, two.entry) == (None, entry(2))


async def test_no_entry_is_immortal(store: Store, redis: Any) -> None:
    """Every value has an expiry, and none beyond the longest that is allowed."""
    for serial, ttl in enumerate([1000, 10**9, 0, -5]):
        await store.put(entry(serial), b"", ttl)
    left = [await redis.ttl(b"cp1:e:" + digest(serial)) for serial in range(4)]
    assert 990 < left[0] <= 1000
    assert 0 < left[1] <= 30 * 86_400
    assert all(ttl <= 1 for ttl in left[2:])


async def test_names_of_keys_carry_macs_hours_and_fixed_words_only(
    store: Store, redis: Any
) -> None:
    """I9: nothing of a prompt, a tag or a namespace is in the name of a key."""
    await store.put(entry(), VECTOR, 3600)
    await store.accept(TOKEN, NOW)
    await store.purge(Selector(tag="other", namespace="shop"), NOW)
    await store.write_counters(7, {"a": 1})
    assert {key async for key in redis.scan_iter()} == {
        b"cp1:e:" + digest(1),
        b"cp1:ok:" + TOKEN,
        b"cp1:n:7",
        *(b"cp1:" + n for n in (b"entries", b"sizes", b"bytes", b"journal", b"epoch", b"purges")),
    }


async def test_an_entry_that_cannot_be_packed_is_refused_as_our_own_error(store: Store) -> None:
    """A lone surrogate must not break the end of a good answer with a foreign exception."""
    with pytest.raises(MemoryUnavailable):
        await store.put(entry(text="\ud800"), b"", 3600)
    assert store.state == "closed"


# Credentials ----------------------------------------------------------------------------------


async def test_a_closed_credential_is_no_longer_accepted(store: Store, redis: Any) -> None:
    """Acceptance lasts a day at most, and upstream's no ends it at once."""
    await store.accept(TOKEN, NOW)
    assert 86_000 < await redis.ttl(b"cp1:ok:" + TOKEN) <= 86_400
    await store.close_token(TOKEN)
    assert (await store.look(digest(1), TOKEN)).accepted is None


# Purges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "gone"),
    [
        (Selector(), True),
        (Selector(tag="faq"), True),
        (Selector(tag="other"), False),
        (Selector(namespace="shop", model="gpt-4.1-mini"), True),
        (Selector(namespace="shop", model="gpt-5"), False),
        (Selector(digest=digest(1)), True),
        (Selector(digest=digest(2)), False),
        (Selector(created_before=NOW), False),
        (Selector(created_before=NOW + 1), True),
    ],
)
async def test_a_purge_takes_what_matches_and_nothing_else(
    store: Store, open_store: Open, selector: Selector, gone: bool
) -> None:
    """In this process and in every other one, from the moment that purge returns."""
    other = open_store()
    await store.put(entry(), VECTOR, 3600)
    assert (await other.look(digest(1), TOKEN)).entry
    epoch = await store.purge(selector, NOW)
    for each in (store, other, open_store()):
        look = await each.look(digest(1), TOKEN)
        assert (look.entry is None, look.epoch) == (gone, epoch)
        assert (await each.fetch([digest(1)]) == [None]) is gone


async def test_an_answer_that_was_under_way_during_a_purge_is_not_kept(store: Store) -> None:
    """Its request began before the purge, so what it brings is what was purged."""
    before = (await store.look(digest(1), TOKEN)).epoch
    epoch = await store.purge(Selector(tag="faq"), NOW)
    await store.put(entry(epoch=before), VECTOR, 3600)
    assert (await store.look(digest(1), TOKEN)).entry is None
    await store.put(entry(epoch=epoch), VECTOR, 3600)
    assert (await store.look(digest(1), TOKEN)).entry == entry(epoch=epoch)


async def test_epochs_only_rise(store: Store, clock: Clock) -> None:
    """Two purges in one millisecond, or with a clock that went back, are still two."""
    epochs = [await store.purge(Selector(tag="x"), now) for now in (NOW, NOW, NOW - 5, NOW + 5)]
    assert epochs == sorted(set(epochs))


async def test_a_failover_that_lost_a_purge_brings_nothing_back(
    store: Store, open_store: Open, redis: Any
) -> None:
    """Who knows the purge goes by it and gives it back to the store, so others know it again."""
    await store.put(entry(), VECTOR, 3600)
    epoch = await store.purge(Selector(tag="faq"), NOW)
    await redis.delete("cp1:epoch", "cp1:purges")
    look = await store.look(digest(1), TOKEN)
    assert (look.entry, look.epoch) == (None, epoch)
    fresh = await open_store().look(digest(1), TOKEN)
    assert (fresh.entry, fresh.epoch) == (None, epoch)


async def test_a_lost_purge_is_not_hidden_by_a_new_one(
    store: Store, open_store: Open, redis: Any
) -> None:
    """After a failover somebody purges something else before the loss is noticed: both hold."""
    await store.put(entry(1), VECTOR, 3600)
    await store.put(entry(2, tags=("doc:2",)), VECTOR, 3600)
    await store.purge(Selector(tag="faq"), NOW)
    await redis.delete("cp1:epoch", "cp1:purges")
    await open_store().purge(Selector(tag="doc:2"), NOW + 10)
    for each in (store, open_store()):
        assert await each.fetch([digest(1), digest(2)]) == [None, None]


async def test_old_purge_rules_are_dropped_once_no_entry_can_be_that_old(
    store: Store, redis: Any, clock: Clock
) -> None:
    """The list of rules does not grow for ever."""
    await store.purge(Selector(tag="a"), clock.now)
    clock.now += 368 * 86_400
    await store.purge(Selector(tag="b"), clock.now)
    assert await redis.hlen("cp1:purges") == 1


async def test_a_sweep_deletes_what_a_purge_made_invalid(store: Store, redis: Any) -> None:
    """The bytes go, the books agree, and entries stored since the purge stay."""
    for serial in range(150):
        await store.put(entry(serial), VECTOR, 3600)
    await store.put(entry(200, tags=()), VECTOR, 3600)
    epoch = await store.purge(Selector(tag="faq"), NOW)
    await store.put(entry(0, epoch=epoch), VECTOR, 3600)
    assert await store.sweep(Selector(tag="faq")) == 149
    assert (await store.size())[0] == 2
    assert len([key async for key in redis.scan_iter("cp1:e:*")]) == 2


# Caps -----------------------------------------------------------------------------------------


async def test_the_cap_on_entries_holds_and_the_soonest_to_expire_goes(open_store: Open) -> None:
    """I7: a TTL never weakens the cap."""
    store = open_store(max_entries=50)
    gone = []
    for serial in range(120):
        gone += await store.put(entry(serial, expires=NOW + 3600 + serial), b"", 3600)
        assert (await store.size())[0] <= 50
    assert gone == [digest(serial) for serial in range(70)]
    assert await store.fetch([digest(69)]) == [None]
    assert await store.fetch([digest(70)]) != [None]


async def test_the_cap_on_bytes_holds_whatever_the_mix_of_sizes(
    open_store: Open, redis: Any
) -> None:
    """I7: counted are the bytes that are stored; rewriting an entry counts it once."""
    store = open_store(max_bytes=100_000)
    dice = random.Random(3)
    for serial in range(150):
        body = bytes(dice.choice([10, 500, 20_000]))
        await store.put(entry(serial % 60, body=body), VECTOR, 3600)
        assert (await store.size())[1] <= 100_000
    lengths = [await redis.strlen(key) async for key in redis.scan_iter("cp1:e:*")]
    assert await store.size() == (len(lengths), sum(lengths))


async def test_an_entry_above_the_whole_cap_is_not_stored(open_store: Open) -> None:
    """It is reported as gone at once, and pushes nobody else out."""
    store = open_store(max_bytes=10_000)
    await store.put(entry(1), b"", 3600)
    assert await store.put(entry(2, body=bytes(20_000)), b"", 3600) == [digest(2)]
    assert (await store.size())[0] == 1


async def test_expired_entries_leave_the_books(store: Store, clock: Clock) -> None:
    """The next write finds them, in slices, and says which they were."""
    for serial in range(100):
        await store.put(entry(serial, expires=NOW + 10), b"", 10)
    clock.now += 11
    late = entry(200, expires=NOW + 3600)
    gone = await store.put(late, b"", 3600) + await store.put(late, b"", 3600)
    assert sorted(gone) == [digest(serial) for serial in range(100)]
    assert (await store.size())[0] == 1


async def test_forget_leaves_nothing_behind(store: Store, redis: Any) -> None:
    """Value, books and bytes all go; forgetting the unknown is nothing."""
    await store.put(entry(1), VECTOR, 3600)
    await store.forget([digest(1), digest(2)])
    await store.forget([])
    assert await store.size() == (0, 0)
    assert not await redis.exists("cp1:entries", "cp1:sizes", b"cp1:e:" + digest(1))


# For the index --------------------------------------------------------------------------------


async def everything(store: Store, count: int = 512) -> dict[bytes, bytes]:
    return {head.digest: head.vector async for part in store.slices(count) for head in part}


@pytest.mark.parametrize("width", [0, 768, 3072])
async def test_a_rebuild_sees_every_entry_with_its_vector(store: Store, width: int) -> None:
    """Whatever the encoder's width, and in slices of any size."""
    vectors = {digest(serial): bytes([serial % 256]) * width for serial in range(300)}
    for serial in range(300):
        await store.put(entry(serial), vectors[digest(serial)], 3600)
    assert await everything(store, 64) == vectors
    assert await everything(store) == vectors


async def test_a_rebuild_skips_what_does_not_count_and_drops_ghosts(
    store: Store, redis: Any, clock: Clock
) -> None:
    """An evicted value leaves the books; another encoder's entry stays where it is."""
    await store.put(entry(1), VECTOR, 3600)
    await store.put(entry(2), VECTOR, 3600)
    await store.put(entry(3, fingerprint=b"another!"), VECTOR, 3600)
    await store.put(entry(4, expires=NOW + 1), VECTOR, 3600)
    clock.now += 1
    await redis.delete(b"cp1:e:" + digest(2))
    assert set(await everything(store)) == {digest(1)}
    assert (await store.size())[0] == 3
    heads = await store.heads([digest(serial) for serial in (4, 3, 2, 1)])
    assert [head and head.digest for head in heads] == [None, None, None, digest(1)]
    assert await store.heads([]) == []


async def test_the_journal_tells_what_happened_since(store: Store, open_store: Open) -> None:
    """Another process sees each change, who made it, and no gap."""
    other = open_store()
    start = await other.follow("$")
    assert start == ([], "0-0", False)
    await store.put(entry(1), VECTOR, 3600)
    await store.put(entry(2), VECTOR, 3600)
    await other.forget([digest(1), digest(2)])
    await store.purge(Selector(), NOW)
    changes, last, gap = await other.follow(start[1])
    assert changes == [
        Change(digest(1), "put", store.writer),
        Change(digest(2), "put", store.writer),
        Change(digest(1), "del", other.writer),
        Change(digest(2), "del", other.writer),
        Change(b"", "purge", store.writer),
    ]
    assert not gap
    assert await other.follow(last) == ([], last, False)
    assert await other.follow("$") == ([], last, False)


async def test_a_gap_in_the_journal_is_noticed(store: Store, redis: Any) -> None:
    """Records trimmed away unseen, or a journal that began anew, call for a rebuild."""
    for serial in range(5):
        await store.put(entry(serial), b"", 3600)
    first = (await redis.xrange("cp1:journal"))[0][0].decode()
    assert not (await store.follow(first))[2]
    await redis.xtrim("cp1:journal", maxlen=2, approximate=False)
    assert (await store.follow(first))[2]
    last = (await store.follow("$"))[1]
    assert not (await store.follow(last))[2]
    await redis.delete("cp1:journal")
    assert (await store.follow(last))[2]
    await redis.xadd("cp1:journal", {"k": "put", "d": digest(1), "w": b"w"}, id="5-1")
    assert (await store.follow(last))[2]


async def test_evictions_are_told_to_the_others(open_store: Open) -> None:
    """What the cap pushed out stands in the journal as well."""
    store = open_store(max_entries=1)
    await store.put(entry(1), b"", 3600)
    await store.put(entry(2, expires=NOW + 7200), b"", 3600)
    changes = (await store.follow("0-0"))[0]
    assert changes[-1] == Change(digest(1), "del", store.writer)


# Counters -------------------------------------------------------------------------------------


async def test_counters_are_absolute_and_kept_by_the_hour(store: Store, redis: Any) -> None:
    """Writing the same numbers again changes nothing; hours without any are left out."""
    await store.write_counters(100, {"a\x1fgpt": 3, "b": 0})
    await store.write_counters(100, {"a\x1fgpt": 5})
    await store.write_counters(100, {"a\x1fgpt": 5})
    await store.write_counters(200, {"a\x1fgpt": 1})
    await store.write_counters(300, {})
    assert [hour async for hour in store.read_counters(100, 400)] == [
        (100, {"a\x1fgpt": 5, "b": 0}),
        (200, {"a\x1fgpt": 1}),
    ]
    assert [hour async for hour in store.read_counters(101, 199)] == []
    assert 89 * 86_400 < await redis.ttl("cp1:n:100") <= 90 * 86_400


# When the store is sick -----------------------------------------------------------------------


@asynccontextmanager
async def sick(folder: Path, **options: Any) -> AsyncIterator[tuple[EmbeddedValkey, Store]]:
    """A server of its own to be ill-treated, and a store on it with the real deadline."""
    server = EmbeddedValkey(folder, 64 * 2**20)
    store = Store(server.start(), secret=SECRET, fingerprint=FINGERPRINT, **options)
    try:
        yield server, store
    finally:
        if server.pid and server.alive:
            os.kill(server.pid, signal.SIGCONT)
        await store.close()
        server.stop()


async def until(true: Callable[[], Awaitable[bool]], seconds: float) -> None:
    began = awake()
    while not await true():
        assert awake() - began < seconds, "did not come to pass in time"
        await asyncio.sleep(0.01)


def fresh(serial: int = 1, **changes: Any) -> Entry:
    return entry(serial, created=int(time.time()), expires=int(time.time()) + 3600, **changes)


async def hits(store: Store) -> bool:
    try:
        return (await store.look(digest(1), TOKEN)).entry is not None
    except MemoryUnavailable:
        return False


async def took(call: Awaitable[object]) -> float:
    began = awake()
    with pytest.raises(MemoryUnavailable):
        await call
    return awake() - began


@pytest.mark.live
@of_three
async def test_a_killed_store_costs_next_to_nothing_and_hits_come_back(tmp_path: Path) -> None:
    """Killed: at once unavailable; back: hits again within 5 s, with one word per change."""
    states: list[str] = []
    async with sick(tmp_path, on_state=states.append) as (server, store):
        await store.put(fresh(), VECTOR, 3600)
        assert server.pid
        await until(lambda: _flushed(store), 30)
        os.kill(server.pid, signal.SIGKILL)
        waits = [await took(store.look(digest(1), TOKEN)) for _ in range(50)]
        assert max(waits) < 0.3
        assert sorted(waits)[25] < 0.005
        assert states == ["open"]

        async def back() -> bool:
            server.ensure()
            return await hits(store)

        await until(back, 5)
        assert states[-1] == "closed"
        assert store.state == "closed"
        assert len(states) < 12


async def _flushed(store: Store) -> bool:
    # What kill -9 leaves is what had reached the file: once a second.
    info = await store._redis.info("persistence")
    return bool(info["aof_pending_bio_fsync"] == 0 and info["aof_buffer_length"] == 0)


@pytest.mark.live
@of_three
async def test_a_frozen_store_costs_one_deadline_and_then_nothing(tmp_path: Path) -> None:
    """Socket open, no answer: at most 70 ms a call, then the breaker; back by itself."""
    async with sick(tmp_path) as (server, store):
        await store.put(fresh(), VECTOR, 3600)
        assert await hits(store)
        assert server.pid
        os.kill(server.pid, signal.SIGSTOP)
        waits = [await took(store.look(digest(1), TOKEN)) for _ in range(3)]
        waits += [await took(store.put(fresh(), VECTOR, 3600)) for _ in range(2)]
        assert store.state == "open"
        # The best of five is the code's own time; the worst has the other work of the machine.
        assert min(waits) < 0.07
        assert max(waits) < 0.3
        assert min([await took(store.look(digest(1), TOKEN)) for _ in range(5)]) < 0.005
        os.kill(server.pid, signal.SIGCONT)
        await until(lambda: hits(store), 5)


@pytest.mark.live
async def test_a_crowd_at_a_frozen_store_waits_one_deadline_together(tmp_path: Path) -> None:
    """Two thousand looks at once all end within the deadline: none queues behind another."""
    async with sick(tmp_path, deadline_seconds=0.3) as (server, store):
        assert server.pid
        os.kill(server.pid, signal.SIGSTOP)
        began = awake()
        looks = [store.look(digest(serial), TOKEN) for serial in range(2000)]
        ends = await asyncio.gather(*looks, return_exceptions=True)
        assert awake() - began < 1.5  # one after another they would take five
        assert {type(end) for end in ends} == {MemoryUnavailable}


@pytest.mark.live
async def test_a_full_store_refuses_writes_and_goes_on_reading(tmp_path: Path) -> None:
    """`noeviction` and no room: put fails as ours, hits stay, the breaker stays closed."""
    async with sick(tmp_path, deadline_seconds=30) as (_, store):
        await store.put(fresh(), VECTOR, 3600)
        await store._redis.config_set("maxmemory-policy", "noeviction")
        await store._redis.config_set("maxmemory", "1")
        for _ in range(10):
            await took(store.put(fresh(2), VECTOR, 3600))
            assert await hits(store)
        assert store.state == "closed"


@pytest.mark.live
async def test_a_replica_refuses_writes_and_goes_on_reading(tmp_path: Path) -> None:
    """After a failover the address may lead to a replica: reads go on, writes fail as ours."""
    async with sick(tmp_path, deadline_seconds=30) as (_, store):
        await store.put(fresh(), VECTOR, 3600)
        await store._redis.execute_command("REPLICAOF", "127.0.0.1", "1")
        for _ in range(10):
            await took(store.put(fresh(2), VECTOR, 3600))
            assert await hits(store)
        assert store.state == "closed"
        await store._redis.execute_command("REPLICAOF", "NO", "ONE")
        await store.put(fresh(2), VECTOR, 3600)


@pytest.mark.live
async def test_a_thousand_cancelled_looks_cross_no_answers(tmp_path: Path) -> None:
    """Clients that leave, half-way or at once, leave no answer behind for somebody else."""
    async with sick(tmp_path, deadline_seconds=30) as (_, store):
        for serial in range(50):
            await store.put(fresh(serial), VECTOR, 3600)
        dice = random.Random(11)

        async def one() -> None:
            serial = dice.randrange(50)
            if dice.random() < 0.5:
                found = (await store.look(digest(serial), TOKEN)).entry
            else:
                found = ((await store.fetch([digest(serial)]))[0] or (None,))[0]
            assert found is not None
            assert found.body == entry(serial).body

        for _ in range(40):
            tasks = [asyncio.create_task(one()) for _ in range(50)]
            for _ in range(dice.randrange(6)):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            ends = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(end is None for end in ends[1::2])
        assert store.state == "closed"
        await store.close()
        pool = store._redis.connection_pool
        assert not pool._in_use_connections


@pytest.mark.live
async def test_commands_cut_by_their_deadline_cross_no_answers(tmp_path: Path) -> None:
    """A reply that comes after its deadline is never read by the next command."""
    async with sick(tmp_path, deadline_seconds=30) as (_, store):
        for serial in range(50):
            await store.put(fresh(serial, body=b"%d" % serial * 20_000), VECTOR, 3600)
        store._line.breaker = Breaker(lambda state: None, failures=10**9, seconds=1e9)
        dice = random.Random(13)
        ends: Counter[str] = Counter()

        async def one() -> None:
            serial = dice.randrange(50)
            store._deadline = dice.choice([0.0005, 0.001, 0.002, 0.004, 30.0])
            try:
                found = (await store.fetch([digest(serial)]))[0]
            except MemoryUnavailable:
                ends["late"] += 1
                return
            assert found
            assert found[0].body == b"%d" % serial * 20_000
            ends["whole"] += 1

        for _ in range(40):
            await asyncio.gather(*(one() for _ in range(25)))
        assert min(ends["late"], ends["whole"]) > 50, ends
        assert not store._redis.connection_pool._in_use_connections


@pytest.mark.live
async def test_the_looks_of_one_tick_are_one_command(tmp_path: Path) -> None:
    """A hundred looks at once are one round trip, and so cost next to nothing each."""
    async with sick(tmp_path, deadline_seconds=30) as (_, store):
        await asyncio.gather(*(store.look(digest(serial), TOKEN) for serial in range(100)))
        stats = await store._redis.info("commandstats")
        assert stats["cmdstat_mget"]["calls"] == 1


async def test_a_store_that_is_not_there_is_unavailable() -> None:
    """A closed port: every call is our own error and none hangs."""
    store = Store("redis://127.0.0.1:1/0", secret=SECRET, fingerprint=FINGERPRINT)
    calls: list[Awaitable[object]] = [
        store.ping(),
        store.look(digest(1), TOKEN),
        store.fetch([digest(1)]),
        store.put(fresh(), VECTOR, 3600),
        store.size(),
        store.purge(Selector(), NOW),
        store.follow("$"),
    ]
    for call in calls:
        assert await took(call) < 0.5
    await store.close()


@pytest.mark.parametrize(
    "url", ["", "nonsense", "http://user:hunter2@host", "redis://:hunter2@h:x"]
)
async def test_a_url_that_cannot_be_read_is_refused_without_quoting_it(url: str) -> None:
    """The message names the setting and not the password."""
    with pytest.raises(ConfigError, match="redis_url") as caught:
        Store(url, secret=SECRET, fingerprint=FINGERPRINT)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


# The breaker ----------------------------------------------------------------------------------


def test_the_breaker_opens_after_five_failures_and_lets_one_probe_through() -> None:
    """Closed, open, half-open, open for longer, closed: each change is said once."""
    states: list[str] = []
    breaker = Breaker(states.append)
    for _ in range(4):
        breaker.failed(0.0)
    assert breaker.admits(0.0)
    breaker.failed(0.0)
    assert [breaker.admits(now) for now in (0.0, 0.99, 1.0, 1.0)] == [False, False, True, False]
    breaker.failed(1.0)
    assert [breaker.admits(now) for now in (2.99, 3.0)] == [False, True]
    breaker.failed(3.0)
    assert [breaker.admits(now) for now in (4.99, 5.0)] == [False, True]
    breaker.succeeded()
    assert breaker.admits(5.0)
    assert states == ["open", "half-open", "open", "half-open", "open", "half-open", "closed"]


@pytest.mark.parametrize(("gap", "state"), [(0.99, "closed"), (1.0, "open")])
def test_a_second_of_nothing_but_failure_opens_it(gap: float, state: str) -> None:
    """With little traffic five failures may take long; a second without success is enough."""
    breaker = Breaker(lambda state: None)
    breaker.failed(10.0)
    breaker.failed(10.0 + gap)
    assert breaker.state == state


def test_one_success_forgets_the_failures_before_it() -> None:
    """A blip darkens nothing."""
    breaker = Breaker(lambda state: None)
    for _ in range(20):
        breaker.failed(0.0)
        breaker.succeeded()
    assert breaker.state == "closed"


def test_a_probe_that_never_reports_does_not_shut_the_door() -> None:
    """Another may try once the first has had its time."""
    breaker = Breaker(lambda state: None, failures=1)
    breaker.failed(0.0)
    assert [breaker.admits(now) for now in (1.0, 2.9, 3.0)] == [True, False, True]


async def test_waiting_for_a_seat_is_not_the_stores_fault() -> None:
    """Our own crowding is unavailable in time, bounded, and leaves the breaker closed."""
    line = Line(Breaker(lambda state: None), down=(OSError,), refused=(), seats=1, waiters=3)
    release = asyncio.Event()
    first = asyncio.create_task(line.call(release.wait, 5.0))
    await asyncio.sleep(0)
    crowd = [line.call(release.wait, 0.02) for _ in range(10)]
    ends = await asyncio.gather(*crowd, return_exceptions=True)
    assert {type(end) for end in ends} == {MemoryUnavailable}
    assert line.breaker.state == "closed"
    release.set()
    assert await first


async def test_a_store_that_got_too_little_time_is_not_blamed() -> None:
    """Who had its seat late and ran out of time has learnt nothing of the store."""
    states: list[str] = []
    line = Line(Breaker(states.append, failures=1), down=(OSError,), refused=(), seats=1)
    first = asyncio.create_task(line.call(lambda: asyncio.sleep(0.15), 5.0))
    await asyncio.sleep(0)
    with pytest.raises(MemoryUnavailable):
        await line.call(asyncio.Event().wait, 0.2)
    await first
    assert states == []
    with pytest.raises(MemoryUnavailable):
        await line.call(asyncio.Event().wait, 0.02)
    assert states == ["open"]


async def test_a_caller_who_leaves_does_not_cut_the_command() -> None:
    """The command goes on to its end, so its connection stays clean."""
    line = Line(Breaker(lambda state: None), down=(OSError,), refused=())
    release, ended = asyncio.Event(), asyncio.Event()

    async def command() -> None:
        await release.wait()
        ended.set()

    caller = asyncio.create_task(line.call(command, 5.0))
    await asyncio.sleep(0)
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    release.set()
    await line.close()
    assert ended.is_set()
