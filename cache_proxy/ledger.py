"""One outcome per request, counted once, kept in the store.

Counting is a few dict increments on the event loop; a background loop writes what changed. Values
are written as absolute numbers of this process and hour, never as increments: writing twice is
harmless, and a store that lost its last second is whole again after the next full write. Never
raises into a request, never keeps prompt text: labels are a model's name, twelve characters of a
tenant's MAC, and closed words.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Literal, NamedTuple, Protocol

from .counters import (
    LAST_BUCKET,
    OTHER,
    PROVIDERS_PURSE,
    PURSES,
    SEP,
    TIMERS,
    UNNAMED,
    Hour,
    Names,
    Row,
    bucket_of,
    label,
)
from .dial import bin_of
from .errors import MemoryUnavailable
from .metrics import expose
from .model import Attempt, Outcome, Usage
from .upstream.fair_queue import CLASSES, PriorityClass

__all__ = ["CounterStore", "Ledger", "PriceDate", "Source"]

Source = Literal["audit", "miss", "shadow", "report"]

# I7.
MAX_HOURS = 24  # unwritten hours kept while the store is away
MAX_PREDECESSORS = 1000  # model and tenant pairs whose last request is remembered for churn
MAX_CHURN_FIELDS = 48
MAX_ROUTES = 256  # providers, times what happened at them

HEAL_SECONDS = 10.0  # a full write this often: an append-only file synced each second may lose one
STAGES = (*TIMERS, "hit.exact")  # a hit is semantic unless it is said to be exact
FIELDS_A_WRITE = 500  # about; keeps each store call, and each turn of the event loop, short


class CounterStore(Protocol):
    """Where counters live: `Store`, or a dict in tests."""

    async def write_counters(self, hour: int, fields: Mapping[str, int], /) -> None:
        """Set these fields of this hour (Unix time // 3600) to these values."""

    def read_counters(self, since: int, until: int, /) -> AsyncIterator[tuple[int, dict[str, int]]]:
        """All fields of each hour from `since` to `until`, both included."""

    async def size(self) -> tuple[int, int]:
        """Entries and bytes held."""


class PriceDate(Protocol):
    """What the ledger wants of a `PriceBook`: which data it used."""

    @property
    def as_of(self) -> str | None: ...


class Ledger:
    """The counts of one process.

    `process` must differ between processes and between runs of one (a restart within the hour
    would otherwise overwrite its predecessor's numbers). `clock` gives Unix seconds. `encoder` is
    the fingerprint whose scores the labels are about, `classes` names the latency target of each
    priority class.
    """

    def __init__(
        self,
        *,
        process: str,
        clock: Callable[[], float],
        prices: PriceDate | None = None,
        encoder: str = "none",
        classes: Mapping[str, PriorityClass] = CLASSES,
    ) -> None:
        self.lost_hours = 0  # dropped unwritten, because the store was away for too long
        self.failed_flushes = 0
        self._process = label(process)
        self._encoder = label(encoder)
        self._clock = clock
        self._prices = prices
        self._classes = {name: _ClassNames.of(name, each) for name, each in classes.items()}
        self._hours: dict[int, Hour] = {}
        self._newest = 0
        self._reruns = 0
        self._before: Counter[str] = Counter()  # counts of hours no longer held, for `metrics`
        self._last: dict[tuple[str, str], Mapping[str, str]] = {}
        self._writing = asyncio.Lock()
        self._whole = True  # the next flush writes everything
        self._healed = 0.0
        self._errors = Names("error")
        self._kinds = {"miss": Names("miss"), "bypass": Names("bypass"), "error": self._errors}
        self._hit, self._veto = Names("hit"), Names("veto")
        self._discard, self._purpose = Names("discard"), Names("upstream.calls")
        self._churned = Names("churned", MAX_CHURN_FIELDS)
        self._purses = {purse: _purse(purse) for purse in (*PURSES, PROVIDERS_PURSE)}
        self._attempts, self._routed = Names("attempt", MAX_ROUTES), Names("routed", MAX_ROUTES)
        self._shed, self._fell = Names("shed"), Names("fell")
        self._times = {stage: _bucket_names(stage) for stage in STAGES}
        self._sums = {timer: f"us.{timer}{SEP}" for timer in TIMERS}
        self._flags = {
            flag: f"{flag}{SEP}"
            for flag in ("collapsed", "refresh", "shadow", "shadow.exact", "stored", "compared")
        }

    def record(self, outcome: Outcome) -> None:
        """Count one request, once. Some microseconds, no I/O."""
        row, timer = self._hour().find(outcome.model, outcome.tenant)
        if outcome.kind == "hit":
            row.add(self._hit[outcome.tier or "semantic"])
        else:
            row.add(self._kinds.get(outcome.kind, self._errors)[outcome.reason or OTHER])
        for guard in outcome.vetoes:
            row.add(self._veto[guard])
        if outcome.discard:
            row.add(self._discard[outcome.discard])
        self._count_flags(row, outcome)
        self._count_money(row, outcome)
        self._count_time(timer, outcome)
        if outcome.priority in self._classes:
            self._count_class(row, timer, outcome)
        if outcome.provider:
            self._count_provider(row, timer, outcome)
        if outcome.reason == "shed":
            row.add(self._shed[outcome.provider or UNNAMED])
        if 0 < len(outcome.churn) <= MAX_CHURN_FIELDS:
            self._count_churn(row, outcome)

    def record_upstream(
        self,
        purpose: str,
        usage: Usage | None,
        cost: int | None,
        *,
        model: str = "",
        tenant: str = "",
        provider: str = "",
    ) -> None:
        """Count an upstream call that is no request of a client: an audit, probe, revalidation.

        `cost` in nano-dollars; None when unknown.
        """
        row, _ = self._hour().find(model, tenant)
        row.add(self._purpose[purpose])
        if usage is not None:
            self._pay(row, "upstream", purpose, usage, cost)
            if provider:
                self._pay(row, PROVIDERS_PURSE, provider, usage, cost)

    def record_attempt(
        self, why: Attempt, *, provider: str = "", model: str = "", tenant: str = ""
    ) -> None:
        """Count one call to upstream, whoever it is for, as it is sent."""
        row, _ = self._hour().find(model, tenant)
        row.add(self._attempts[f"{provider or UNNAMED}.{why}"])

    def record_label(
        self, source: Source, score: float, *, wrong: bool, model: str = "", tenant: str = ""
    ) -> None:
        """Count whether a stored answer was (or would have been) right at this score.

        "audit": a served semantic hit that was asked upstream as well. "miss" and "shadow": what
        upstream answered to a request, against what its nearest neighbour holds. "report": a
        person said so.
        """
        row, _ = self._hour().find(model, tenant)
        word = "wrong" if wrong else "right"
        if source == "audit":
            row.add(f"audit{SEP}{word}")
        row.add(f"label.{source}{SEP}{word}.{bin_of(score)}.{self._encoder}")

    def record_tightened(self, threshold: float, *, model: str) -> None:
        """Count that wrong hits raised the threshold of this model's requests, and to what."""
        row, _ = self._hour().find(model, "")
        row.add(f"tightened{SEP}{bin_of(threshold)}")

    def record_unstored(self) -> None:
        """Count an answer that was good enough to keep and that the store did not take."""
        row, _ = self._hour().find("", "")
        row.add(f"unstored{SEP}")

    def pending(self) -> dict[int, dict[str, int]]:
        """What the next flush writes: hour -> field -> absolute value."""
        whole = self._whole or abs(self._clock() - self._healed) >= HEAL_SECONDS
        found = {number: hour.fields(everything=whole) for number, hour in self._hours.items()}
        return {number: fields for number, fields in found.items() if fields}

    async def flush(self, store: CounterStore) -> None:
        """Write what changed. On MemoryUnavailable the next one writes everything again."""
        async with self._writing:
            now = self._clock()
            whole = self._whole or abs(now - self._healed) >= HEAL_SECONDS
            self._whole = True  # until this one went well; a cancelled flush counts as failed
            self._note_prices()
            for hour in list(self._hours.values()):
                for fields in hour.take(FIELDS_A_WRITE, everything=whole):
                    await store.write_counters(hour.number, fields)
            self._whole = False
            if whole:
                self._healed = now
                self._retire(now)

    async def run(self, store: CounterStore, every: float = 1.0) -> None:
        """Flush every so many seconds until cancelled; a store that is away is tried again."""
        while True:
            await asyncio.sleep(every)
            try:
                await self.flush(store)
            except MemoryUnavailable:
                self.failed_flushes += 1

    def metrics(self, rejected: Mapping[str, int] | None = None) -> bytes:
        """Prometheus text of this process since it began. No tenants and no models in it.

        `rejected`: stored values that the store read and did not believe, by reason.
        """
        totals = Counter(self._before)
        totals.update({f"rejected{SEP}{why}": n for why, n in (rejected or {}).items()})
        for hour in self._hours.values():
            _sum_into(totals, hour)
        totals[f"ledger.lost_hours{SEP}"] = self.lost_hours
        totals[f"ledger.failed_flushes{SEP}"] = self.failed_flushes
        return expose(totals)

    def _hour(self) -> Hour:
        number = int(self._clock()) // 3600
        return self._hours.get(number) or self._begin(number)

    def _begin(self, number: int) -> Hour:
        process = self._process
        if number <= self._newest:
            # The clock went back into an hour already written and dropped: under the same name its
            # small new numbers would overwrite the old ones.
            self._reruns += 1
            process = f"{process}.{self._reruns}"
        self._newest = max(self._newest, number)
        while len(self._hours) >= MAX_HOURS:
            self._drop(min(self._hours))
            self.lost_hours += 1
        hour = self._hours[number] = Hour(number, process)
        return hour

    def _retire(self, now: float) -> None:
        """Drop past hours that a full write has covered well after their end."""
        for number, hour in list(self._hours.items()):
            if now >= (number + 1) * 3600 + HEAL_SECONDS and hour.settled:
                self._drop(number)

    def _drop(self, number: int) -> None:
        _sum_into(self._before, self._hours.pop(number))

    def _note_prices(self) -> None:
        as_of = self._prices.as_of if self._prices is not None else None
        hour = self._hours.get(self._newest)
        if as_of and hour is not None:
            row, _ = hour.find("", "")
            name = f"prices{SEP}{as_of.replace(SEP, ' ')}"
            if name not in row.counts:
                row.add(name)

    def _count_flags(self, row: Row, outcome: Outcome) -> None:
        if outcome.stored:
            row.add(self._flags["stored"])
        if outcome.collapsed:
            row.add(self._flags["collapsed"])
        if outcome.refresh:
            row.add(self._flags["refresh"])
        if outcome.shadow:
            row.add(self._flags["shadow"])
            if outcome.tier == "exact":
                row.add(self._flags["shadow.exact"])

    def _count_money(self, row: Row, outcome: Outcome) -> None:
        # Who shared a call and left last pays for it, and saved nothing.
        shared = outcome.collapsed and outcome.spent is None
        if outcome.kind == "hit" or shared or outcome.saved is not None:
            source = "collapsed" if outcome.collapsed else outcome.tier or "exact"
            self._pay(row, "saved", source, outcome.saved, outcome.saved_cost)
        if outcome.spent is not None or _unmeasured(outcome):
            paid = row  # what another model was paid for stands in its own row
            if outcome.answered_by:
                paid, _ = self._hour().find(outcome.answered_by, outcome.tenant)
            self._pay(paid, "spent", outcome.kind, outcome.spent, outcome.spent_cost)
            if outcome.provider:
                self._pay(
                    paid, PROVIDERS_PURSE, outcome.provider, outcome.spent, outcome.spent_cost
                )

    def _pay(
        self, row: Row, purse: str, detail: str, usage: Usage | None, cost: int | None
    ) -> None:
        tokens_in, tokens_out, nano, unpriced, unpriced_tokens = self._purses[purse]
        if usage is not None:
            row.add(tokens_in[detail], usage.input)
            row.add(tokens_out[detail], usage.output)
        if cost is not None:
            row.add(nano[detail], cost)
        else:
            row.add(unpriced[detail])
            if usage is not None:
                row.add(unpriced_tokens[detail], usage.input + usage.output)

    def _count_time(self, row: Row, outcome: Outcome) -> None:
        if outcome.kind == "hit":
            self._time(row, "hit", "hit.exact" if outcome.tier == "exact" else "hit", outcome.ms)
        elif outcome.kind == "miss":
            self._time(row, "miss", "miss", outcome.ms)
        if outcome.upstream_ms is not None:
            self._time(row, "upstream", "upstream", outcome.upstream_ms)
        if outcome.first_token_ms is not None:
            self._time(row, "first_token", "first_token", outcome.first_token_ms)
        if outcome.encode_ms is not None:
            self._time(row, "encode", "encode", outcome.encode_ms)

    def _count_class(self, row: Row, timer: Row, outcome: Outcome) -> None:
        """By the moment its answer began: for one in a single piece that is its end."""
        names = self._classes[outcome.priority]
        row.add(names.asked)
        if not 200 <= outcome.status < 400 or outcome.kind == "error":
            return
        began = outcome.ms if outcome.first_token_ms is None else outcome.first_token_ms
        if began <= names.target_ms:
            row.add(names.within)
        timer.add(names.times[bucket_of(began)])

    def _count_provider(self, row: Row, timer: Row, outcome: Outcome) -> None:
        row.add(self._routed[f"{outcome.provider}.{outcome.kind}"])
        if outcome.answered_by:
            row.add(self._fell[outcome.provider])
        if outcome.upstream_ms is not None:
            bucket = bucket_of(outcome.upstream_ms)
            timer.add(f"ms.provider{SEP}{label(outcome.provider)}.{bucket}")

    def _time(self, row: Row, timer: str, stage: str, ms: float) -> None:
        row.add(self._times[stage][bucket_of(ms)])
        if 0 < ms < 1e9:  # neither NaN nor nonsense
            row.add(self._sums[timer], int(ms * 1000 + 0.5))

    def _count_churn(self, row: Row, outcome: Outcome) -> None:
        key = (row.model, row.tenant)
        if OTHER in key:  # a mixture, in which everything seems to differ
            return
        last = self._last.pop(key, None)
        self._last[key] = now = outcome.churn  # at the end: the longest unused goes first
        if len(self._last) > MAX_PREDECESSORS:
            del self._last[next(iter(self._last))]
        if last is None or outcome.kind != "miss":
            return
        row.add(self._flags["compared"])
        if now != last:
            for field in now.keys() | last.keys():
                if now.get(field) != last.get(field):
                    row.add(self._churned[field])


class _ClassNames(NamedTuple):
    """Where one priority class is counted."""

    target_ms: int
    asked: str
    within: str
    times: tuple[str, ...]

    @classmethod
    def of(cls, name: str, each: PriorityClass) -> _ClassNames:
        place = f"{name}.{each.target_ms}"
        times = tuple(f"ms.class{SEP}{name}.{bucket}" for bucket in range(LAST_BUCKET + 1))
        return cls(each.target_ms, f"class{SEP}{place}", f"within{SEP}{place}", times)


def _bucket_names(stage: str) -> tuple[str, ...]:
    timer, _, tier = stage.partition(".")
    before = f"ms.{timer}{SEP}{tier or 'semantic'}." if timer == "hit" else f"ms.{timer}{SEP}"
    return tuple(f"{before}{bucket}" for bucket in range(LAST_BUCKET + 1))


def _purse(purse: str) -> tuple[Names, Names, Names, Names, Names]:
    return (
        Names(f"{purse}.in"),
        Names(f"{purse}.out"),
        Names(f"{purse}.nano"),
        Names(f"{purse}.unpriced"),
        Names(f"{purse}.unpriced_tokens"),
    )


def _unmeasured(outcome: Outcome) -> bool:
    """A good answer that upstream billed for without saying how much."""
    return outcome.kind == "miss" and not outcome.collapsed and 200 <= outcome.status < 300


def _sum_into(totals: Counter[str], hour: Hour) -> None:
    for row in hour.all_rows():
        totals.update(row.counts)
