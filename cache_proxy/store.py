"""Entries, purge rules, acceptances, journal and counters in Redis or Valkey.

Redis holds the truth and is not trusted: whatever is read is checked before it is believed. All
trouble is MemoryUnavailable("store"); nothing is retried, logged or decided here.

Keys (`prefix` first): e:<digest> the entries, entries (a sorted set of digests by expiry), sizes
and bytes (what the caps are kept by), journal (a stream for the other sidecars), epoch and purges,
ok:<token> the accepted credentials, n:<hour> the counters. The prefix carries the schema; on a
cluster it must carry one hash tag, since a script touches several keys.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

from redis import exceptions as redis_errors
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from cache_proxy import scripts
from cache_proxy.breaker import Breaker, Line, State
from cache_proxy.codec import (
    HEAD_BYTES,
    Corrupt,
    Head,
    head_length,
    pack,
    unpack,
    unpack_head,
)
from cache_proxy.errors import ConfigError, MemoryUnavailable
from cache_proxy.model import Entry, Selector
from cache_proxy.purges import Purges, Rule, pack_rule, thin, unpack_rule

__all__ = ["Change", "Look", "Store"]

_DAY = 86_400
_DIGEST = 20  # bytes
_BATCH = 128  # looks in one MGET; more of 2 kB each would hold the loop for milliseconds
_FLIGHTS = 1  # MGETs under way at once; further looks gather for the next
_QUEUE = 1024  # looks waiting for one; more is a store that cannot follow
_EVICTIONS = 64  # at most, of each kind, by one write: it has a deadline to keep
_NO_FLOOR = -2.0
_FLOORS = 10_000  # entries with a floor, about 1 MB
_FLOOR_PARTS = 1_000_000  # floors are kept as whole millionths of a cosine
_RULES = 1000  # purge rules kept
# Not taken from the settings: a command with a shorter TTL than the server's must not drop the
# rules that the server still needs. No entry lives longer than a year.
_RULE_SECONDS = 367 * _DAY
_LONGEST_SECONDS = 366 * _DAY
_LONG = 2.0  # seconds for scans, purges and statistics, which nobody's answer waits for
_ACCEPTED_SECONDS = _DAY
_COUNTER_SECONDS = 90 * _DAY


@dataclass(frozen=True, slots=True)
class Look:
    """What one round trip says about a digest and a credential."""

    entry: Entry | None
    vector: bytes  # fp16, of the entry
    epoch: int  # in force now; the epoch of an entry stored for this request
    accepted: int | None  # Unix seconds when upstream last accepted the credential
    stale: Entry | None = None  # in place of `entry`: expired, and held for when upstream fails


class Change(NamedTuple):
    """One journal record."""

    digest: bytes  # empty for a purge
    kind: str  # "put", "del", "purge"
    writer: bytes  # the `Store.writer` that did it


class _Asked(NamedTuple):
    digest: bytes
    token: bytes
    answer: asyncio.Future[Look]


class Store:
    """One Redis or Valkey by URL: `redis://`, `rediss://`, `unix:///path?db=0`.

    `secret` keys the checksums; `fingerprint` (8 bytes) names the encoder whose entries count.
    `clock` gives Unix seconds. No entry counts longer than `longest_ttl_seconds`; expired ones are
    held for another `stale_seconds`, for `look` alone. `on_state` is told each change of the
    breaker. Raises ConfigError for a URL it cannot read.
    """

    def __init__(
        self,
        url: str,
        *,
        secret: bytes,
        fingerprint: bytes,
        prefix: str = "cp1",
        clock: Callable[[], float] = time.time,
        deadline_seconds: float = 0.05,
        max_entries: int = 1_000_000,
        max_bytes: int = 2**30,
        longest_ttl_seconds: int = 30 * _DAY,
        stale_seconds: int = 0,
        on_state: Callable[[State], None] = lambda state: None,
        client: Redis | None = None,
    ) -> None:
        self.writer = os.urandom(8)
        self.rejected: Counter[str] = Counter()
        self._redis: Any = _connect(url) if client is None else client
        self._key = blake2b(secret, person=b"stored entry", digest_size=32).digest()
        self._fingerprint = fingerprint
        self._clock = clock
        self._deadline = deadline_seconds
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._longest = longest_ttl_seconds
        self._stale = stale_seconds
        self._on_state = on_state
        self._line = Line(
            Breaker(self._turned),
            down=(
                redis_errors.ConnectionError,
                redis_errors.TimeoutError,
                redis_errors.InvalidResponse,
                OSError,
            ),
            refused=(redis_errors.RedisError,),
        )
        self._background: set[asyncio.Task[None]] = set()
        self._asked: list[_Asked] = []
        self._flights = 0
        self._own: Any = None  # the looks' own connection
        self._epoch = 0  # the highest ever seen, which a store that lost it is healed to
        self._purged = Purges()
        self._floors: dict[bytes, float] = {}
        self._heal_at = 0.0
        self._head_guess = HEAD_BYTES + 768  # a 384-wide vector; grows to what is met
        name = prefix.encode()
        self._e = name + b":e:"
        self._ok = name + b":ok:"
        self._n = name + b":n:"
        self._entries = name + b":entries"
        self._journal = name + b":journal"
        self._epoch_key = name + b":epoch"
        self._purges = name + b":purges"
        self._floors_key = name + b":floors"
        self._total = name + b":bytes"
        self._books = (self._e, self._entries, name + b":sizes", self._total, self._journal)

    @property
    def state(self) -> State:
        """Of the breaker: "closed" is healthy."""
        return self._line.breaker.state

    async def close(self) -> None:
        """Let calls under way end by their deadlines, then close all connections."""
        await self._line.close()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._own is not None:
            await self._redis.connection_pool.release(self._own)
            self._own = None
        with suppress(redis_errors.RedisError, OSError):
            await self._redis.aclose(close_connection_pool=True)

    async def ping(self) -> None:
        """Return when the store answers; MemoryUnavailable when it does not."""
        await self._call("PING")

    # Entries ------------------------------------------------------------------------------------

    async def look(self, digest: bytes, token: bytes) -> Look:
        """The entry, the epoch and the credential's acceptance; all looks of a tick in one MGET."""
        self._line.admit()
        if len(self._asked) >= _QUEUE:
            raise MemoryUnavailable("store")
        loop = asyncio.get_running_loop()
        if not self._asked:
            loop.call_soon(self._take_off)
        answer: asyncio.Future[Look] = loop.create_future()
        self._asked.append(_Asked(digest, token, answer))
        return await answer

    async def fetch(self, digests: Sequence[bytes]) -> list[tuple[Entry, bytes] | None]:
        """The entries and their vectors, checked as by `look`; None for each that is not to be."""
        if not digests:
            return []
        values = await self._line.call(lambda: self._read(digests), self._deadline)
        now = self._clock()
        return [
            self._check(value, digest, now) for value, digest in zip(values, digests, strict=True)
        ]

    async def put(self, entry: Entry, vector: bytes, ttl_seconds: int) -> list[bytes]:
        """Store the entry for `ttl_seconds`; the digests that had to go for it, or had expired.

        The books, the journal and the caps are kept in the same atomic step.
        """
        # Whoever asked for a shorter time than ours wants it gone after that.
        stale = self._stale if ttl_seconds >= self._longest else 0
        try:
            value = pack(entry, vector, self._key)
        except Corrupt as exc:
            raise MemoryUnavailable("store") from exc
        if len(value) > self._max_bytes:
            return [entry.digest]
        gone: list[bytes] = await self._script(
            scripts.PUT,
            self._books,
            entry.digest,
            value,
            min(max(1, min(ttl_seconds, self._longest)) + stale, _LONGEST_SECONDS),
            entry.expires,
            int(self._clock()) - self._stale,
            self._max_entries,
            self._max_bytes,
            _EVICTIONS,
            self.writer,
        )
        return gone

    async def forget(self, digests: Sequence[bytes]) -> None:
        """Remove the entries and tell the other sidecars."""
        if digests:
            await self._script(scripts.FORGET, self._books, self.writer, b"0", *digests)

    async def size(self) -> tuple[int, int]:
        """Entries, and the bytes of their values."""
        entries, total = await self._pipeline(("ZCARD", self._entries), ("GET", self._total))
        return int(entries), int(total or 0)

    # Purges -------------------------------------------------------------------------------------

    async def purge(self, selector: Selector, now: float) -> int:
        """From here on no entry counts that matches and whose request began before; the new epoch.

        Waits for the disk where the store can do that. The bytes go by `sweep`, or by expiry.
        """
        rule = pack_rule(Rule(0, int(now), selector))
        keys = (self._epoch_key, self._purges, self._journal)
        numbers = (self._epoch, int(now * 1000))
        answers = await self._line.call(
            lambda: self._send(
                ("EVAL", scripts.PURGE, len(keys), *keys, *numbers, rule, self.writer),
                ("WAITAOF", 1, 0, 1000),  # unknown to old servers, refused where there is no AOF
                raising=False,
            ),
            _LONG,
        )
        if isinstance(answers[0], Exception):
            raise MemoryUnavailable("store") from answers[0]
        await self._line.call(self._follow_rules, _LONG)
        await self._drop_rules()
        return int(answers[0])

    async def sweep(self, selector: Selector) -> int:
        """Delete what a purge by `selector` made invalid, slice by slice; how many there were."""
        swept = 0
        async for digests in self._digests(64):
            read = await self._line.call(partial(self._read, digests), _LONG)
            dead = [
                d for d, value in zip(digests, read, strict=True) if self._dead(value, selector)
            ]
            await self.forget(dead)
            swept += len(dead)
        return swept

    # Floors -------------------------------------------------------------------------------------

    def floor(self, digest: bytes) -> float:
        """The similarity up to which this entry was shown to be wrong; -2 for nearly all."""
        return self._floors.get(digest, _NO_FLOOR)

    async def raise_floor(self, digest: bytes, similarity: float) -> None:
        """From here on, everywhere, serve this entry by meaning only above `similarity`.

        It outlives the entry: the same question asked again gets the same digest. Where too many
        have one already, the entry is purged instead.
        """
        parts = max(1, min(_FLOOR_PARTS * 2, int(similarity * _FLOOR_PARTS) + 1))
        now = self._clock()
        keys = (self._epoch_key, self._floors_key)
        held = await self._line.call(
            lambda: self._redis.execute_command(
                "EVAL", scripts.FLOOR, 2, *keys, digest, parts, int(now * 1000), _FLOORS
            ),
            _LONG,
        )
        if not held:
            await self.purge(Selector(digest=digest), now)
        await self._line.call(self._follow_rules, _LONG)

    # Credentials --------------------------------------------------------------------------------

    async def accept(self, token: bytes, now: float) -> None:
        """Remember for a day that upstream accepted this credential."""
        await self._call("SET", self._ok + token, int(now), "EX", _ACCEPTED_SECONDS)

    async def close_token(self, token: bytes) -> None:
        """Forget it again: upstream said no."""
        await self._call("DEL", self._ok + token)

    # For the index ------------------------------------------------------------------------------

    async def slices(self, count: int = 512) -> AsyncIterator[list[Head]]:
        """The heads of all entries, in no order and some perhaps twice; ghosts leave the books."""
        async for digests in self._digests(count):
            found, ghosts = await self._heads(digests)
            if ghosts:
                await self._script(scripts.FORGET, self._books, self.writer, b"1", *ghosts)
            yield [head for head in found if head is not None]

    async def heads(self, digests: Sequence[bytes]) -> list[Head | None]:
        """Their heads; None where there is no entry, or one that does not count."""
        return (await self._heads(digests))[0] if digests else []

    async def follow(self, after: str) -> tuple[list[Change], str, bool]:
        """What happened after that journal id, the last id, and whether records are missing.

        Does not wait. "$" asks for the last id alone: take it, read all `slices`, then follow.
        At most 1000 records a call; ask again while there are any.
        """
        start = "+" if after == "$" else after
        info, read = await self._pipeline(
            ("XINFO STREAM", self._journal),
            ("XREAD", "COUNT", 1000, "STREAMS", self._journal, "0" if after == "$" else after),
            raising=False,
            atomic=True,
        )
        if isinstance(info, Exception):  # no journal yet, or none any more
            return [], "0-0", start not in ("+", "0-0")
        if isinstance(read, Exception):
            raise MemoryUnavailable("store") from read
        last = _text(info["last-generated-id"])
        if after == "$":
            return [], last, False
        records = read[0][1] if read else []
        gap = _order(after) > _order(last) or (
            info.get("entries-added") != info["length"]
            and bool(info["first-entry"])
            and _order(after) < _order(_text(info["first-entry"][0]))
        )
        return list(_changes(records)), _text(records[-1][0]) if records else after, gap

    # Counters -----------------------------------------------------------------------------------

    async def write_counters(self, hour: int, fields: Mapping[str, int]) -> None:
        """Set these counters of the hour (Unix seconds // 3600) to absolute values.

        Absolute and not added: written twice it is the same, and a lost second heals.
        """
        if fields:
            key = self._n + str(hour).encode()
            flat = [part for pair in fields.items() for part in pair]
            await self._pipeline(("HSET", key, *flat), ("EXPIRE", key, _COUNTER_SECONDS))

    async def read_counters(
        self, since: int, until: int
    ) -> AsyncIterator[tuple[int, dict[str, int]]]:
        """The counters of each hour from `since` up to and with `until` that has any."""
        for start in range(since, until + 1, 48):
            hours = range(start, min(start + 48, until + 1))
            commands = [("HGETALL", self._n + str(hour).encode()) for hour in hours]
            for hour, fields in zip(hours, await self._pipeline(*commands), strict=True):
                if fields:
                    yield hour, {_text(name): int(value) for name, value in fields.items()}

    # Looks in flight ----------------------------------------------------------------------------

    def _take_off(self) -> None:
        while self._asked and self._flights < _FLIGHTS:
            batch, self._asked = self._asked[:_BATCH], self._asked[_BATCH:]
            self._flights += 1
            self._spawn(self._fly([asked for asked in batch if not asked.answer.done()]))

    async def _fly(self, batch: list[_Asked]) -> None:
        try:
            if batch:
                await self._answer(batch)
        except MemoryUnavailable as exc:
            # Those who wait for a seat would fare no better, only later.
            waiting, self._asked = self._asked, []
            for asked in (*batch, *waiting):
                if not asked.answer.done():
                    trouble = MemoryUnavailable("store")
                    trouble.__cause__ = exc.__cause__
                    asked.answer.set_exception(trouble)
        finally:
            self._flights -= 1
            self._take_off()

    async def _answer(self, batch: list[_Asked]) -> None:
        keys = [self._e + asked.digest for asked in batch]
        keys += [self._ok + asked.token for asked in batch]
        values = await self._line.run(lambda: self._mget_own(keys), self._deadline)
        now = self._clock()
        accepted = values[len(batch) :]
        for (digest, _, answer), value, at in zip(batch, values, accepted, strict=False):
            if not answer.done():
                entry, vector = self._check(value, digest, now - self._stale) or (None, b"")
                stale = None
                if entry is not None and entry.expires <= now:
                    entry, stale = None, entry
                answer.set_result(Look(entry, vector, self._epoch, _number(at), stale))

    # Reading and checking -----------------------------------------------------------------------

    async def _read(self, digests: Sequence[bytes]) -> list[bytes | None]:
        return await self._mget([self._e + digest for digest in digests])

    async def _mget(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The values, with the purge rules brought up to the epoch read beside them."""
        answer = await self._redis.execute_command("MGET", self._epoch_key, *keys)
        return await self._in_force(answer)

    async def _mget_own(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """The same over a connection that only looks use: what a pool does to lend one and take
        it back costs as much as the command, and looks are what every hit pays for."""
        connection, self._own = self._own, None
        if connection is None:
            connection = await self._redis.connection_pool.get_connection()
        try:
            await connection.send_command("MGET", self._epoch_key, *keys, check_health=False)
            answer = await connection.read_response()
        except BaseException:
            # A reply may still come, and must not meet the next question.
            await connection.disconnect(nowait=True)
            await self._redis.connection_pool.release(connection)
            raise
        if self._own is None:
            self._own = connection
        else:
            await self._redis.connection_pool.release(connection)
        return await self._in_force(answer)

    async def _in_force(self, answer: list[bytes | None]) -> list[bytes | None]:
        """An MGET's values, less the epoch at their front, which may tell of new purge rules."""
        epoch, *values = answer
        known = _number(epoch) or 0
        if known > self._epoch or (known < self._epoch and self._may_heal()):
            await self._follow_rules()
        return values

    def _check(self, value: bytes | None, digest: bytes, now: float) -> tuple[Entry, bytes] | None:
        if value is None:
            return None
        try:
            found = unpack(value, self._key)
        except Corrupt:
            self.rejected["corrupt"] += 1
            return None
        if why := self._objection(found[0], digest, now):
            self.rejected[why] += 1
            return None
        return found

    def _objection(self, entry: Entry, digest: bytes, now: float) -> str:
        if entry.digest != digest:
            return "foreign"
        if entry.fingerprint != self._fingerprint:
            return "fingerprint"
        if entry.expires <= now:
            return "expired"
        if entry.epoch > self._epoch:
            return "epoch"
        return "purged" if self._purged.mean(entry) else ""

    def _dead(self, value: bytes | None, selector: Selector) -> bool:
        try:
            entry = unpack(value, self._key)[0] if value else None
        except Corrupt:
            return False  # perhaps another version's; it expires by itself
        return entry is not None and selector.matches(entry) and self._purged.mean(entry)

    async def _heads(self, digests: Sequence[bytes]) -> tuple[list[Head | None], list[bytes]]:
        """The heads, and which digests have no value at all."""
        parts = await self._script(scripts.HEADS, (self._e,), self._head_guess - 1, *digests)
        longest = max((_head_length(part) for part in parts), default=0)
        if longest > self._head_guess:
            self._head_guess = longest
            parts = await self._script(scripts.HEADS, (self._e,), longest - 1, *digests)
        now = self._clock()
        pairs = list(zip(parts, digests, strict=True))
        return (
            [self._check_head(part, digest, now) for part, digest in pairs],
            [digest for part, digest in pairs if not part],
        )

    def _check_head(self, part: bytes, digest: bytes, now: float) -> Head | None:
        try:
            head = unpack_head(part, self._key)
        except Corrupt:
            return None
        same = head.digest == digest and head.fingerprint == self._fingerprint
        return head if same and head.expires > now else None

    async def _digests(self, count: int) -> AsyncIterator[list[bytes]]:
        # By cursor: unlike ranks and scores it neither skips nor sticks while entries come and go.
        cursor = 0
        while True:
            cursor, members = await self._long("ZSCAN", self._entries, cursor, "COUNT", count)
            for start in range(0, len(members), count):
                yield [member for member, _ in members[start : start + count]]
            if not cursor:
                return

    # Purge rules --------------------------------------------------------------------------------

    def _may_heal(self) -> bool:
        # Once a second: a replica that cannot be written to would cost every look three trips.
        now = time.monotonic()
        due = now >= self._heal_at
        if due:
            self._heal_at = now + 1.0
        return due

    async def _follow_rules(self) -> None:
        """Learn the store's rules, and give it back those that it has lost."""
        epoch, stored, floors = await self._send(
            ("GET", self._epoch_key),
            ("HGETALL", self._purges),
            ("HGETALL", self._floors_key),
            atomic=True,
        )
        for digest, parts in floors.items():
            known = int(parts) / _FLOOR_PARTS
            self._floors[digest] = max(known, self._floors.get(digest, _NO_FLOOR))
        theirs = {int(name): unpack_rule(int(name), rule) for name, rule in stored.items()}
        ours = {rule.epoch: rule for rule in self._purged.rules}
        rules = thin((ours | theirs).values(), int(self._clock()) - _RULE_SECONDS, _RULES)
        self._purged = Purges(rules)
        self._epoch = max(self._epoch, _number(epoch) or 0, *theirs, *ours)
        lost = [rule for rule in rules if rule.epoch not in theirs and rule.epoch in ours]
        if lost or (_number(epoch) or 0) < self._epoch:
            flat = [part for rule in lost for part in (rule.epoch, pack_rule(rule))]
            with suppress(
                redis_errors.RedisError
            ):  # judged by what we know, healed when it can be written to
                keys = (self._epoch_key, self._purges)
                await self._redis.execute_command(
                    "EVAL", scripts.HEAL, 2, *keys, self._epoch, *flat
                )

    async def _drop_rules(self) -> None:
        """Take the rules that no longer matter out of the store."""
        stored = await self._long("HGETALL", self._purges)
        kept = {str(rule.epoch).encode(): pack_rule(rule) for rule in self._purged.rules}
        commands: list[tuple[Any, ...]] = []
        if changed := [
            part for name in kept if stored.get(name) != kept[name] for part in (name, kept[name])
        ]:
            commands.append(("HSET", self._purges, *changed))
        if stale := [name for name in stored if name not in kept]:
            commands.append(("HDEL", self._purges, *stale))
        if commands:
            await self._pipeline(*commands)

    # Calls --------------------------------------------------------------------------------------

    async def _call(self, *command: Any) -> Any:
        return await self._line.call(lambda: self._redis.execute_command(*command), self._deadline)

    async def _long(self, *command: Any) -> Any:
        return await self._line.call(lambda: self._redis.execute_command(*command), _LONG)

    async def _pipeline(self, *commands: tuple[Any, ...], **how: bool) -> list[Any]:
        return await self._line.call(lambda: self._send(*commands, **how), _LONG)

    async def _send(
        self, *commands: tuple[Any, ...], raising: bool = True, atomic: bool = False
    ) -> list[Any]:
        pipe = self._redis.pipeline(transaction=atomic)
        for command in commands:
            pipe.execute_command(*command)
        answers: list[Any] = await pipe.execute(raise_on_error=raising)
        return answers

    async def _script(self, script: str, keys: Sequence[bytes], *args: Any) -> Any:
        # A write is waited for by nobody's answer, but many can pile up behind a slow one.
        seconds = self._deadline if script is scripts.PUT else _LONG
        return await self._line.call(lambda: self._eval(script, keys, args), seconds)

    async def _eval(self, script: str, keys: Sequence[bytes], args: Sequence[Any]) -> Any:
        do: Callable[..., Awaitable[Any]] = self._redis.execute_command
        try:
            return await do("EVALSHA", scripts.SHA[script], len(keys), *keys, *args)
        except redis_errors.NoScriptError:
            return await do("EVAL", script, len(keys), *keys, *args)
        except redis_errors.ReadOnlyError:
            # A replica now, after a failover: the address may lead to the new master.
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            raise

    def _turned(self, state: State) -> None:
        if state == "open":
            # What lies idle may lead nowhere; the probe gets a fresh connection.
            self._spawn(self._redis.connection_pool.disconnect(inuse_connections=False))
        self._on_state(state)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _connect(url: str) -> Redis:
    """A client that never retries and never asks more of a fresh connection than it must.

    Its pool is wider than the line's seats, so that a full pool is never mistaken for a dead store.
    """
    extra = {} if url.startswith("unix:") else {"socket_keepalive": True}
    try:
        pool = ConnectionPool.from_url(
            url,
            **extra,
            max_connections=64,
            socket_connect_timeout=1.0,
            socket_timeout=None,  # the deadline around each call is the limit, and costs less
            retry=Retry(NoBackoff(), 0),
            protocol=2,
            driver_info=None,
        )
    except (ValueError, redis_errors.RedisError):
        # Not chained: the message of the original may hold the password.
        raise ConfigError("redis_url cannot be read") from None
    return Redis(connection_pool=pool)


def _number(value: bytes | None) -> int | None:
    return int(value) if value is not None and value.isdigit() else None


def _text(value: bytes | str) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", "replace")


def _order(journal_id: str) -> tuple[int, int]:
    """Journal ids in their order: a time in milliseconds, and a serial number within it."""
    at, _, serial = journal_id.partition("-")
    return int(at), int(serial or 0)


def _changes(records: Iterable[tuple[bytes, Mapping[bytes, bytes]]]) -> Iterable[Change]:
    for _, fields in records:
        kind, digests = _text(fields.get(b"k", b"")), fields.get(b"d", b"")
        writer = fields.get(b"w", b"")
        for start in range(0, max(len(digests), 1), _DIGEST):
            yield Change(digests[start : start + _DIGEST], kind, writer)


def _head_length(part: bytes) -> int:
    try:
        return head_length(part)
    except Corrupt:
        return 0
