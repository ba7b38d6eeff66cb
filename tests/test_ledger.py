"""One request, one count; what was counted survives a store that comes and goes."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType

import fakeredis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from cache_proxy import counters
from cache_proxy.counters import (
    KINDS,
    LAST_BUCKET,
    MAX_MODELS,
    MAX_PAIRS,
    MAX_TENANTS,
    bucket_of,
    bucket_top,
    bucket_value,
    parse_field,
)
from cache_proxy.errors import MemoryUnavailable
from cache_proxy.ledger import HEAL_SECONDS, MAX_HOURS, Ledger
from cache_proxy.model import Kind, Outcome, Tier, Usage
from cache_proxy.stats import collect
from cache_proxy.store import Store

TENANT = "ab" * 20
NOON = 497_000 * 3600.0


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


class DictStore:
    """The counters' half of a store, in memory; may be told to fail."""

    def __init__(self) -> None:
        self.hours: dict[int, dict[str, int]] = {}
        self.writes = 0
        self.left: int | None = None  # writes that go well before it fails
        self.refused = 0
        self.refused_thrice = asyncio.Event()
        self.taken = asyncio.Event()

    async def write_counters(self, hour: int, fields: Mapping[str, int], /) -> None:
        if self.left is not None:
            if self.left == 0:
                self.refused += 1
                if self.refused == 4:  # so that the third is counted by whoever made it
                    self.refused_thrice.set()
                raise MemoryUnavailable("store")
            self.left -= 1
        await asyncio.sleep(0)
        self.writes += len(fields)
        self.hours.setdefault(hour, {}).update(fields)
        self.taken.set()

    async def read_counters(
        self, since: int, until: int, /
    ) -> AsyncIterator[tuple[int, dict[str, int]]]:
        for hour in sorted(self.hours):
            if since <= hour <= until:
                yield hour, dict(self.hours[hour])

    async def size(self) -> tuple[int, int]:
        return 7, 7000

    def sum(self, counter: str, detail: str | None = None) -> int:
        total = 0
        for fields in self.hours.values():
            for text, n in fields.items():
                field = parse_field(text)
                assert field is not None
                if field.counter == counter and detail in (None, field.detail):
                    total += n
        return total


def ledger_at(clock: Clock, process: str = "p1") -> Ledger:
    return Ledger(process=process, clock=clock)


def hit(tier: Tier = "exact", **more: object) -> Outcome:
    return Outcome(kind="hit", model="m", tenant=TENANT, tier=tier, **more)  # type: ignore[arg-type]


def miss(reason: str = "unknown", **more: object) -> Outcome:
    return Outcome(kind="miss", model="m", tenant=TENANT, reason=reason, **more)  # type: ignore[arg-type]


outcomes = st.builds(
    Outcome,
    kind=st.sampled_from(["hit", "miss", "bypass", "error"]),
    model=st.text(max_size=100),
    tenant=st.text(alphabet="0123456789abcdef", max_size=40),
    tier=st.sampled_from([None, "exact", "semantic"]),
    reason=st.text(max_size=80),
    status=st.sampled_from([0, 200, 404, 500]),
    vetoes=st.lists(st.text(max_size=9), max_size=3).map(tuple),
    collapsed=st.booleans(),
    stored=st.booleans(),
    saved=st.none() | st.builds(Usage, input=st.integers(0, 9), output=st.integers(0, 9)),
    saved_cost=st.none() | st.integers(0, 9),
    spent=st.none() | st.builds(Usage, input=st.integers(0, 9), output=st.integers(0, 9)),
    spent_cost=st.none() | st.integers(0, 9),
    churn=st.dictionaries(st.text(max_size=9), st.text(max_size=4), max_size=4),
    ms=st.floats(),
    upstream_ms=st.none() | st.floats(),
)


@given(st.lists(outcomes, max_size=40))
def test_each_request_is_counted_exactly_once(requests: list[Outcome]) -> None:
    """I12: hits + misses + bypasses + errors = requests, whatever the outcomes hold."""
    ledger = ledger_at(Clock())
    for outcome in requests:
        ledger.record(outcome)
    counted = dict.fromkeys(KINDS, 0)
    for fields in ledger.pending().values():
        for text, n in fields.items():
            field = parse_field(text)
            assert field is not None
            if field.counter in counted:
                counted[field.counter] += n
    assert counted == {kind: sum(o.kind == kind for o in requests) for kind in KINDS}


async def test_money_and_tokens_add_up_exactly() -> None:
    """Integers all the way: the sums are the sums."""
    clock, store, dice = Clock(), DictStore(), random.Random(1)
    ledger = ledger_at(clock)
    saved = spent = tokens = 0
    for _ in range(500):
        cost, used = dice.randrange(10**12), Usage(dice.randrange(10**6), dice.randrange(10**6))
        ledger.record(hit(saved=used, saved_cost=cost))
        ledger.record(miss(spent=used, spent_cost=cost + 1))
        saved, spent, tokens = saved + cost, spent + cost + 1, tokens + used.input + used.output
        clock.now += 30
        await ledger.flush(store)
    assert store.sum("saved.nano", "exact") == saved
    assert store.sum("spent.nano", "miss") == spent
    assert store.sum("saved.in") + store.sum("saved.out") == tokens


async def test_unknown_money_is_counted_apart() -> None:
    """Fault 43: no usage or no price is "unknown", neither 0 nor invented."""
    store, ledger = DictStore(), ledger_at(Clock())
    ledger.record(hit(saved=Usage(10, 5), saved_cost=None))
    ledger.record(hit("semantic"))  # the stored answer came without a usage
    ledger.record(miss(status=200))  # and so did this one
    ledger.record(miss(status=500))  # upstream's failure cost nothing
    ledger.record(miss(status=200, collapsed=True, saved=Usage(10, 5), saved_cost=4))
    await ledger.flush(store)
    assert (store.sum("saved.unpriced"), store.sum("saved.unpriced_tokens")) == (2, 15)
    assert (store.sum("spent.unpriced"), store.sum("spent.unpriced_tokens")) == (1, 0)
    assert (store.sum("saved.nano", "collapsed"), store.sum("spent.nano")) == (4, 0)


async def test_upstream_calls_of_our_own_are_no_requests() -> None:
    """Audits and probes have rows of their own (I12)."""
    store, ledger = DictStore(), ledger_at(Clock())
    ledger.record_upstream("audit", Usage(3, 4), 99, model="m")
    ledger.record_upstream("probe", None, None)
    ledger.record_label("audit", 0.95, wrong=True)
    ledger.record_label("audit", 0.95, wrong=False)
    await ledger.flush(store)
    assert sum(store.sum(kind) for kind in KINDS) == 0
    assert (store.sum("upstream.calls"), store.sum("upstream.nano", "audit")) == (2, 99)
    assert (store.sum("audit", "wrong"), store.sum("audit", "right")) == (1, 1)
    assert store.sum("label.audit", "wrong.95.none") == 1


async def test_only_changes_are_written_and_writing_twice_is_harmless() -> None:
    """Values are absolute: the same flush again leaves the same numbers."""
    store, ledger = DictStore(), ledger_at(Clock())
    ledger.record(hit())
    await ledger.flush(store)
    first = {hour: dict(fields) for hour, fields in store.hours.items()}
    before = store.writes
    await ledger.flush(store)
    assert store.writes == before
    ledger.record(hit())
    (fields,) = ledger.pending().values()
    await ledger.flush(store)
    await store.write_counters(int(NOON) // 3600, fields)
    await store.write_counters(int(NOON) // 3600, fields)
    assert store.sum("hit") == 2
    assert store.hours.keys() == first.keys()


@pytest.mark.parametrize("survivors", [0, 1, 2])
async def test_a_failed_flush_is_made_good_by_the_next(survivors: int) -> None:
    """Whatever part of it the store took."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    for hours in range(3):
        clock.now = NOON + hours * 3600
        ledger.record(hit())
        ledger.record(miss())
    store.left = survivors
    with pytest.raises(MemoryUnavailable):
        await ledger.flush(store)
    ledger.record(hit())
    store.left = None
    await ledger.flush(store)
    assert (store.sum("hit"), store.sum("miss")) == (4, 3)


async def test_a_store_that_lost_its_last_second_is_whole_again_soon() -> None:
    """Absolute values, all of them again every few seconds."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    ledger.record(hit())
    await ledger.flush(store)
    store.hours.clear()
    clock.now += HEAL_SECONDS
    await ledger.flush(store)
    assert store.sum("hit") == 1


async def test_a_cancelled_flush_counts_as_failed() -> None:
    """Shutting down in the middle of a write must not lose what was on its way."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    ledger.record(hit())
    await ledger.flush(store)
    ledger.record(hit())
    task = asyncio.create_task(ledger.flush(store))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await ledger.flush(store)
    assert store.sum("hit") == 2


async def test_what_is_counted_during_a_flush_is_written_by_the_next() -> None:
    """The event loop goes on counting while the store is waited for."""
    store, ledger = DictStore(), ledger_at(Clock())
    ledger.record(hit())
    flush = asyncio.create_task(ledger.flush(store))
    await asyncio.sleep(0)
    ledger.record(hit())
    await flush
    await ledger.flush(store)
    assert store.sum("hit") == 2


async def test_the_loop_outlives_a_store_that_is_away() -> None:
    """It tries again, and stops when it is cancelled."""
    store, ledger = DictStore(), ledger_at(Clock())
    store.left = 0
    ledger.record(hit())
    task = asyncio.create_task(ledger.run(store, every=0.001))
    async with asyncio.timeout(60):
        await store.refused_thrice.wait()
        store.left = None
        await store.taken.wait()
    assert store.sum("hit") == 1
    assert ledger.failed_flushes >= 3
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_processes_do_not_overwrite_each_other() -> None:
    """Several sidecars share one store."""
    clock, store = Clock(), DictStore()
    for process in ("p1", "p2", "p3"):
        ledger = ledger_at(clock, process)
        ledger.record(hit())
        await ledger.flush(store)
    assert store.sum("hit") == 3


async def test_a_clock_that_steps_back_loses_no_count() -> None:
    """An hour that was written and dropped is not overwritten when it comes again."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    for step in (0, 3700, 3700, -3600, 0, 7300):
        clock.now = NOON + step
        ledger.record(hit())
        await ledger.flush(store)
    assert store.sum("hit") == 6


async def test_past_hours_leave_memory_once_they_are_safe() -> None:
    """I7, and none of their counts is lost on the way, in the store or in the metrics."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    for hour in range(50):
        clock.now = NOON + hour * 3600 + 60
        ledger.record(hit())
        await ledger.flush(store)
        assert len(ledger._hours) <= 2
    assert store.sum("hit") == 50
    assert b'cache_proxy_requests_total{kind="hit",reason="",tier="exact"} 50.0' in ledger.metrics()


async def test_a_store_away_for_days_costs_bounded_memory() -> None:
    """I7: the oldest hours go, and are counted as lost."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    for hour in range(MAX_HOURS + 5):
        clock.now = NOON + hour * 3600
        ledger.record(hit())
    assert ledger.lost_hours == 5
    await ledger.flush(store)
    assert store.sum("hit") == MAX_HOURS


async def test_ten_thousand_tenants_and_models_stay_within_bounds() -> None:
    """Fault 82: beyond the cap a count goes to "other"; none is dropped."""
    store, ledger = DictStore(), ledger_at(Clock())
    for n in range(10_000):
        usage = Usage(n, 1)
        ledger.record(
            Outcome(kind="hit", model=f"m{n % 3000}", tenant=f"{n:040x}"[::-1], saved=usage, ms=n)
        )
    await ledger.flush(store)
    assert store.sum("hit") == 10_000
    assert store.sum("saved.out") == 10_000
    fields = [field for text in store.hours[int(NOON) // 3600] if (field := parse_field(text))]
    assert len({field.model for field in fields}) <= MAX_MODELS + 1
    assert len({field.tenant for field in fields}) <= MAX_TENANTS + 2  # "other", and histograms' ""
    assert len({(f.model, f.tenant) for f in fields if f.counter == "hit"}) <= MAX_PAIRS + 1


def test_labels_that_are_no_labels_become_other() -> None:
    """I9: what a caller can write into a name is short and plain, or not kept at all."""
    ledger = ledger_at(Clock())
    prompt = "please tell me\x1fmy secret sk-123 " * 10
    ledger.record(
        Outcome(
            kind="miss",
            model=prompt,
            tenant=prompt,
            reason=prompt,
            vetoes=(prompt,),
            churn={prompt: "1"},
        )
    )
    ledger.record_upstream(prompt, Usage(1, 1), None)
    ledger.record(Outcome(kind="miss", discard=prompt))
    (fields,) = ledger.pending().values()
    assert all(parse_field(text) for text in fields)
    assert not any("secret" in text for text in fields)
    assert b"secret" not in ledger.metrics()


async def test_the_field_that_changes_on_every_call_is_counted() -> None:
    """Per tenant and model, against the request before it."""
    store, ledger = DictStore(), ledger_at(Clock())
    for n in range(10):
        churn = {"system": str(n), "tools": "same"}
        ledger.record(miss(churn=MappingProxyType(churn)))
    ledger.record(hit(churn={"system": "x"}))
    ledger.record(miss(churn={"system": "x", "extra": "new"}))
    await ledger.flush(store)
    assert store.sum("compared") == 10
    assert store.sum("churned", "system") == 9
    assert store.sum("churned", "extra") == 1
    assert store.sum("churned", "tools") == 0


async def test_the_prices_in_force_are_written_beside_the_counts() -> None:
    """So that `cache-stats` can say which prices were used without loading any."""

    class Prices:
        as_of: str | None = None

    store, prices = DictStore(), Prices()
    ledger = Ledger(process="p1", clock=Clock(), prices=prices)
    ledger.record(hit())
    await ledger.flush(store)
    assert store.sum("prices") == 0
    prices.as_of = "2026-11-09 genai-prices 0.2.3"
    await ledger.flush(store)
    await ledger.flush(store)
    assert store.sum("prices", "2026-11-09 genai-prices 0.2.3") == 1


@given(st.floats(min_value=0.001, max_value=1e7))
def test_a_bucket_tells_a_duration_within_two_and_a_half_percent(ms: float) -> None:
    """And never one above its upper bound."""
    bucket = bucket_of(ms)
    assert 0 <= bucket <= LAST_BUCKET
    assert abs(bucket_value(bucket) / ms - 1) <= 0.025
    assert ms <= bucket_top(bucket) * (1 + 1e-9)


@pytest.mark.parametrize("ms", [0.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e300])
def test_nonsense_durations_land_in_a_bucket(ms: float) -> None:
    """A clock that misbehaves must not fail a request."""
    assert 0 <= bucket_of(ms) <= LAST_BUCKET


async def test_metrics_are_what_prometheus_reads_with_closed_labels() -> None:
    """I9: no tenant, no model; the histogram is cumulative and complete."""
    clock = Clock()
    ledger = ledger_at(clock)
    kinds: tuple[Kind, ...] = ("hit", "miss", "bypass", "error")
    for n in range(100):
        kind = kinds[n % 4]
        tier: Tier | None = "semantic" if kind == "hit" else None
        ledger.record(
            Outcome(
                kind=kind,
                model="gpt-secret",
                tenant=TENANT,
                tier=tier,
                reason="r1",
                vetoes=("negation",),
                saved=Usage(10, 2) if kind == "hit" else None,
                saved_cost=10**9 if kind == "hit" else None,
                ms=float(n),
            )
        )
    text = ledger.metrics().decode()
    assert "gpt-secret" not in text
    assert TENANT[:8] not in text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    assert sum(s.value for s in samples if s.name == "cache_proxy_requests_total") == 100
    dollars = [s for s in samples if s.name == "cache_proxy_dollars_total"]
    assert {s.labels["purse"]: s.value for s in dollars}["saved"] == 25.0
    buckets = [
        s.value
        for s in samples
        if s.name == "cache_proxy_seconds_bucket" and s.labels["stage"] == "hit"
    ]
    assert buckets == sorted(buckets)
    assert buckets[-1] == 25
    sums = [s for s in samples if s.name == "cache_proxy_seconds_sum"]
    assert {s.labels["stage"]: s.value for s in sums}["hit"] == pytest.approx(
        sum(range(0, 100, 4)) / 1e3
    )


async def test_the_way_upstream_is_counted_by_provider_and_reason() -> None:
    """I9: providers, reasons and classes are labels of closed sets; a made-up one is "other", and
    whatever stands in a record, nothing is raised into the request."""
    ledger = ledger_at(Clock())
    ledger.record_attempt("first", provider="one", model="m")
    for _ in range(3):
        ledger.record_attempt("retry", provider="one", model="m")
    ledger.record_attempt("fallback", provider="sk-secret key", model="m")
    ledger.record(hit("exact", priority="critical", status=200, ms=501.0))
    ledger.record(hit("exact", priority="my prompt", provider="my prompt", status=200))
    ledger.record(miss("shed", provider="one", upstream_ms=float("nan"), status=503))
    text = ledger.metrics().decode()
    assert "secret" not in text
    assert "my prompt" not in text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    told = {(s.name.removeprefix("cache_proxy_"), *s.labels.values()): s.value for s in samples}
    assert told["attempt_total", "one", "first"] == 1
    assert told["attempt_total", "one", "retry"] == 3
    assert told["attempt_total", "", "other"] == 1
    assert told["class_total", "critical", "500"] == 1
    assert ("within_total", "critical", "500") not in told
    assert told["shed_total", "one"] == 1


async def test_strange_providers_do_not_pile_up() -> None:
    """I7: ten thousand names that come from nowhere cost a few hundred fields."""
    clock, store = Clock(), DictStore()
    ledger = ledger_at(clock)
    for number in range(10_000):
        ledger.record_attempt("first", provider=f"p{number}")
        ledger.record(miss("x", provider=f"p{number}", status=200))
    await ledger.flush(store)
    assert sum(map(len, store.hours.values())) < 1_500


async def test_the_real_store_keeps_and_gives_back_the_same_counts() -> None:
    """The two sides agree on fields, hours and values."""
    client = fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer())
    store = Store("redis://unused", secret=b"s" * 32, fingerprint=b"f" * 8, client=client)
    clock = Clock()
    ledger = ledger_at(clock)
    for n in range(300):
        clock.now = NOON + n * 60
        ledger.record(hit("semantic", saved=Usage(10, 5), saved_cost=10**9, ms=float(n)))
        ledger.record(miss(spent=Usage(1, 1), spent_cost=None, status=200))
    await ledger.flush(store)
    report = await collect(store, NOON, clock.now)
    await store.close()
    assert (report.requests, report.total["hit", "semantic"]) == (600, 300)
    assert report.total.sum("saved.nano") == 300 * 10**9


def test_recording_costs_microseconds() -> None:
    """It runs on the event loop for each request. The bound is 10 times what it takes."""
    import time

    ledger = ledger_at(Clock())
    outcome = hit("semantic", saved=Usage(100, 50), saved_cost=12_345, ms=3.3, encode_ms=2.5)
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(1000):
            ledger.record(outcome)
        best = min(best, (time.perf_counter() - begun) / 1000)
    assert best < 50e-6


def test_each_public_name_exists() -> None:
    """`__all__` is the promise."""
    assert all(hasattr(counters, name) for name in counters.__all__)
