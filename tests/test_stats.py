"""`cache-stats` adds up what was counted, and says "no data" rather than something invented."""

from __future__ import annotations

import io
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cache_proxy.ledger import Ledger
from cache_proxy.model import Outcome, Usage
from cache_proxy.stats import By, Report, as_json, collect, parse_since, render
from cache_proxy.tally import Tally, numbers, percentiles

NOW = 1_795_000_000.0
HOUR = 3600
TENANTS = ("aa" * 20, "bb" * 20)

DOCUMENTED: dict[str, type | tuple[type, ...]] = {
    "since": str,
    "until": str,
    "requests": int,
    "hits": dict,
    "misses": int,
    "collapsed": int,
    "bypasses": dict,
    "errors": int,
    "hit_rate": (float, type(None)),
    "hit_rate_cacheable": (float, type(None)),
    "vetoes": dict,
    "tokens_saved": dict,
    "usd_saved": (float, type(None)),
    "tokens_spent": dict,
    "usd_spent": (float, type(None)),
    "latency_ms": dict,
    "audits": dict,
    "entries": int,
    "bytes": int,
    "prices_as_of": (str, type(None)),
}
NESTED = {
    "hits": {"exact", "semantic"},
    "tokens_saved": {"input", "output"},
    "tokens_spent": {"input", "output"},
    "audits": {"audited", "wrong", "rate", "low", "high"},
    "labels": {"audit", "miss", "shadow", "report"},
}


class DictStore:
    """The counters' half of a store, in memory."""

    def __init__(self, entries: int = 0, held: int = 0) -> None:
        self.hours: dict[int, dict[str, int]] = {}
        self.held = (entries, held)

    async def write_counters(self, hour: int, fields: Mapping[str, int], /) -> None:
        self.hours.setdefault(hour, {}).update(fields)

    async def read_counters(
        self, since: int, until: int, /
    ) -> AsyncIterator[tuple[int, dict[str, int]]]:
        for hour in sorted(self.hours):
            if since <= hour <= until:
                yield hour, dict(self.hours[hour])

    async def size(self) -> tuple[int, int]:
        return self.held


class Prices:
    as_of = "2026-11-09 genai-prices 0.2.3"


class World:
    """A ledger, its store, and a clock we hold."""

    def __init__(self) -> None:
        self.now = NOW
        self.store = DictStore(12, 34_567)
        self.ledger = Ledger(process="p1", clock=lambda: self.now, prices=Prices())

    def ask(self, kind: str, model: str = "m", tenant: str = TENANTS[0], **more: Any) -> None:
        self.ledger.record(Outcome(kind=kind, model=model, tenant=tenant, **more))  # type: ignore[arg-type]

    async def report(self, by: By | None = None, since: float = NOW - 7 * 86_400) -> Report:
        await self.ledger.flush(self.store)
        return await collect(self.store, since, self.now, by)


@pytest.fixture
def world() -> World:
    return World()


def busy(world: World) -> None:
    """Ten requests of two models, tenants and hours."""
    for tenant in TENANTS:
        world.ask("hit", tenant=tenant, tier="exact", saved=Usage(100, 10), saved_cost=10**9, ms=1)
        world.ask("hit", "n", tenant, tier="semantic", saved=Usage(100, 10), saved_cost=10**8, ms=9)
        world.ask("miss", tenant=tenant, reason="no-neighbour", spent=Usage(5, 5), spent_cost=7)
        world.ask("bypass", "n", tenant, reason="time-bound", spent=Usage(1, 1), spent_cost=3)
        world.now += HOUR
    world.ask("miss", reason="guard", vetoes=("negation", "numbers"), collapsed=True, ms=100)
    world.ask("error", reason="internal")
    world.ledger.record_label("audit", 0.95, wrong=False)
    world.ledger.record_upstream("audit", Usage(7, 8), 5 * 10**8)


async def test_the_json_has_the_documented_shape(world: World) -> None:
    """Names and types as documented, with data and without."""
    for fill in (False, True):
        if fill:
            busy(world)
        document = as_json(await world.report())
        for name, kind in DOCUMENTED.items():
            assert isinstance(document[name], kind), name
        for name, keys in NESTED.items():
            assert set(document[name]) == keys
        for timer in ("hit", "miss", "upstream", "first_token"):
            assert set(document["latency_ms"][timer]) == {"p50", "p95", "p99"}
        assert document["data"] is fill
        orjson.dumps(document)


async def test_the_numbers_are_the_sums(world: World) -> None:
    """Counted by hand."""
    busy(world)
    said = as_json(await world.report())
    assert said["requests"] == 10
    assert said["hits"] == {"exact": 2, "semantic": 2}
    assert (said["misses"], said["collapsed"], said["errors"]) == (3, 1, 1)
    assert said["miss_reasons"] == {"no-neighbour": 2, "guard": 1}
    assert said["bypasses"] == {"time-bound": 2}
    assert said["vetoes"] == {"negation": 1, "numbers": 1}
    assert (said["hit_rate"], said["hit_rate_cacheable"]) == (0.4, 0.5)
    assert said["tokens_saved"] == {"input": 400, "output": 40}
    assert said["tokens_spent"] == {"input": 12, "output": 12}
    assert (said["usd_saved"], said["usd_spent"]) == (2.2, 2e-8)
    assert said["upstream_own"]["usd"] == 0.5
    assert said["price_unknown"] == {"requests": 1, "tokens": 0}
    assert said["audits"]["audited"] == 1
    assert (said["entries"], said["bytes"]) == (12, 34_567)
    assert (said["prices_as_of"], said["prices_source"]) == ("2026-11-09", "genai-prices 0.2.3")


async def test_nothing_counted_is_no_data(world: World) -> None:
    """No division by zero, no rate of nothing; the table says so in words."""
    report = await world.report()
    said = as_json(report)
    assert said["data"] is False
    assert said["hit_rate"] is None
    assert said["hit_rate_cacheable"] is None
    assert said["latency_ms"]["hit"] == {"p50": None, "p95": None, "p99": None}
    assert said["audits"] == {"audited": 0, "wrong": 0, "rate": None, "low": None, "high": None}
    assert said["churn"]["field"] is None
    assert "no data" in printed(report)


async def test_labels_are_told_by_source_and_score(world: World) -> None:
    """And by model, where that is asked for; what wrong hits led to is told as well."""
    for score, wrong in ((0.931, False), (0.934, False), (0.936, True), (0.88, True)):
        world.ledger.record_label("miss", score, wrong=wrong, model="m")
    world.ledger.record_label("report", 0.95, wrong=True, model="n")
    world.ledger.record_tightened(0.96, model="n")
    said = as_json(await world.report("model"))
    assert said["labels"]["miss"] == [
        {"score": 0.93, "right": 2, "wrong": 1},
        {"score": 0.88, "right": 0, "wrong": 1},
    ]
    groups = {group["model"]: group for group in said["by"]}
    assert groups["m"]["labels"]["report"] == []
    assert groups["n"]["labels"]["report"] == [{"score": 0.95, "right": 0, "wrong": 1}]
    assert (said["tightened"], groups["m"]["tightened"], groups["n"]["tightened"]) == (
        0.96,
        None,
        0.96,
    )


async def test_money_without_any_price_is_unknown_not_zero(world: World) -> None:
    """Fault 43: tokens are known, dollars are not."""
    world.ask("hit", tier="exact", saved=Usage(10, 5), saved_cost=None)
    report = await world.report()
    said = as_json(report)
    assert said["usd_saved"] is None
    assert said["price_unknown"] == {"requests": 1, "tokens": 15}
    assert said["tokens_saved"] == {"input": 10, "output": 5}
    assert "for want of a price: 1 requests, 15 tokens" in printed(report)


@pytest.mark.parametrize("by", ["model", "tenant", "day", "tier", "reason"])
async def test_groups_say_the_same_numbers(world: World, by: By) -> None:
    """And add up to the whole wherever a group is a property of a request."""
    busy(world)
    said = as_json(await world.report(by))
    groups = {group[by]: group for group in said["by"]}
    assert all("hit_rate" in group and "latency_ms" in group for group in groups.values())
    requests = sum(group["requests"] for group in groups.values())
    hits = sum(sum(group["hits"].values()) for group in groups.values())
    if by == "reason":
        assert groups["no-neighbour"]["misses"] == 2
        assert (requests, hits) == (6, 0)
    else:
        assert (requests, hits) == (10, 4)
        saved = sum(group["usd_saved"] or 0 for group in groups.values())
        assert saved == pytest.approx(2.2)


async def test_groups_are_named_as_people_name_them(world: World) -> None:
    """Models by name, tenants by the beginning of their MAC, days by date."""
    busy(world)
    names = {}
    bys: tuple[By, ...] = ("model", "tenant", "tier", "day")
    for by in bys:
        said = as_json(await world.report(by))
        names[by] = {group[by] for group in said["by"]}
    assert names["model"] >= {"m", "n"}
    assert names["tenant"] >= {"a" * 12, "b" * 12}
    assert names["tier"] == {"exact", "semantic", "collapsed", "none"}
    assert all(len(day) == 10 for day in names["day"])


async def test_only_the_asked_span_counts(world: World) -> None:
    """By whole hours."""
    world.ask("hit", tier="exact")
    world.now += 5 * HOUR
    world.ask("hit", tier="exact")
    assert (await world.report(since=world.now - 60)).requests == 1
    assert (await world.report(since=NOW)).requests == 2


async def test_processes_add_up(world: World) -> None:
    """Several sidecars over one store are one report."""
    other = Ledger(process="p2", clock=lambda: NOW)
    world.ask("hit", tier="exact", ms=1)
    other.record(Outcome(kind="hit", model="m", tenant=TENANTS[0], tier="exact", ms=100))
    await other.flush(world.store)
    said = as_json(await world.report())
    assert said["requests"] == 2
    assert said["latency_ms"]["hit"]["p99"] == pytest.approx(100, rel=0.025)


async def test_foreign_fields_are_passed_over(world: World) -> None:
    """A field that a later version wrote must not break this one."""
    world.ask("hit", tier="exact")
    await world.ledger.flush(world.store)
    world.store.hours[int(NOW) // HOUR]["what is this"] = 5
    assert (await world.report()).requests == 1


async def test_a_field_that_changes_on_every_call_is_named(world: World) -> None:
    """For an app that never hits, even while another one hits well."""
    for n in range(30):
        world.ask("hit", "good", TENANTS[1], tier="exact")
        churn = {"system": "same", "history": str(n), "x_request": str(n)}
        world.ask("miss", "bad", reason="no-neighbour", churn=churn)
    report = await world.report()
    said = as_json(report)["churn"]
    assert (said["field"], said["share"], said["misses"]) == ("x_request", 1.0, 30)
    assert (said["model"], said["tenant"]) == ("bad", "a" * 12)
    assert "'x_request' differs on 100.0%" in printed(report)


@pytest.mark.parametrize("case", ["few", "hits", "steady"])
async def test_no_field_is_blamed_without_cause(world: World, case: str) -> None:
    """Not after a few misses, not when there are hits, not when nothing churns."""
    for n in range(10 if case == "few" else 40):
        value = str(n // 10) if case == "steady" else str(n)
        world.ask("miss", reason="no-neighbour", churn={"x": value})
    if case == "hits":
        world.ask("hit", tier="exact")
    assert as_json(await world.report())["churn"]["field"] is None


@given(st.lists(st.floats(min_value=0.01, max_value=1e6), min_size=1, max_size=200))
def test_percentiles_are_within_two_and_a_half_percent(values: list[float]) -> None:
    """Of the nearest-rank percentile of the sorted values."""
    ledger = Ledger(process="p", clock=lambda: NOW)
    for ms in values:
        ledger.record(Outcome(kind="hit", tier="semantic", ms=ms))
    tally = tally_of(ledger)
    ordered = sorted(values)
    for name, share in (("p50", 0.5), ("p95", 0.95), ("p99", 0.99)):
        exact = ordered[math.ceil(share * len(ordered)) - 1]
        told = percentiles(tally, "hit")[name]
        assert told is not None
        assert abs(told / exact - 1) <= 0.0255  # 2.5 %, and the rounding to four digits


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30m", NOW - 1800),
        ("24h", NOW - 86_400),
        ("7d", NOW - 604_800),
        ("1.5h", NOW - 5400),
        ("2w", NOW - 1_209_600),
        (" 90s ", NOW - 90),
        ("2026-01-31", 1_769_817_600),
        ("2026-01-31T12:00:00", 1_769_860_800),
        ("2026-01-31T12:00:00+02:00", 1_769_853_600),
        ("2026-01-31T12:00:00Z", 1_769_860_800),
    ],
)
def test_a_beginning_is_a_span_or_a_date(text: str, seconds: float) -> None:
    """Times without a zone are UTC."""
    assert parse_since(text, NOW) == seconds


@pytest.mark.parametrize(
    "text", ["", "7", "d", "7 days", "-7d", "2099-01-01", "31.01.2026", "9999w"]
)
def test_any_other_beginning_is_refused_in_words(text: str) -> None:
    """Never a traceback of the date parser, never a silent default."""
    with pytest.raises(ValueError, match=r"say how far back|must lie between"):
        parse_since(text, NOW)


async def test_the_table_says_what_the_json_says(world: World) -> None:
    """Rates, money, latencies, reasons, the price date and what is stored."""
    busy(world)
    text = printed(await world.report("model"))
    for words in (
        "hit rate 40.0%, 50.0% of the cacheable",
        "exact 2, semantic 2",
        "$2.20",
        "prices as of 2026-11-09 genai-prices 0.2.3",
        "no-neighbour",
        "negation",
        "wrong-hit rate 0.0 % (95 %: 0.0 to 97.5 %, 1 audited)",
        "12 entries",
        "by model",
    ):
        assert words in text, words


def test_numbers_of_nothing_are_numbers() -> None:
    """An empty tally has all names."""
    assert numbers(Tally())["requests"] == 0


def tally_of(ledger: Ledger) -> Tally:
    from cache_proxy.counters import parse_field

    tally = Tally()
    for fields in ledger.pending().values():
        for text, n in fields.items():
            field = parse_field(text)
            assert field is not None
            tally[field.counter, field.detail] += n
    return tally


def printed(report: Report) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=False)
    console.print(render(report))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()
