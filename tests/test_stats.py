"""`cache-stats` adds up what was counted, and says "no data" rather than something invented."""

from __future__ import annotations

import io
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cache_proxy.ledger import Ledger
from cache_proxy.model import Outcome, Usage
from cache_proxy.stats import BYS, By, Report, as_json, collect, parse_since
from cache_proxy.stats_table import render
from cache_proxy.tally import Tally, numbers, percentiles
from cache_proxy.upstream.fair_queue import CLASSES

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


DAY = 86_400


async def test_what_the_cache_is_worth_a_day_and_a_month(world: World) -> None:
    """Spent and saved over four days, our own calls on the side of the cache; by hand."""
    world.now = NOW - 4 * DAY
    world.ask("miss", reason="x", spent=Usage(1, 1), spent_cost=6 * 10**9)
    world.ask("hit", tier="exact", saved=Usage(1, 1), saved_cost=9 * 10**9)
    world.ask("miss", reason="x", collapsed=True, saved=Usage(1, 1), saved_cost=10**9)
    world.ledger.record_upstream("audit", Usage(1, 1), 10**9)
    world.ledger.record_upstream("judge", Usage(1, 1), 10**9)
    world.now = int(NOW) // HOUR * HOUR
    report = await world.report(since=world.now - 30 * DAY)
    assert report.covered == 4 * DAY
    assert as_json(report)["roi"] == {
        "days": 4.0,
        "usd_without_cache": 16.0,
        "usd_with_cache": 8.0,
        "usd_saved": 8.0,
        "without_cache_per_day": 4.0,
        "with_cache_per_day": 2.0,
        "saved_per_day": 2.0,
        "without_cache_per_month": 120.0,
        "with_cache_per_month": 60.0,
        "saved_per_month": 60.0,
    }
    table = printed(report)
    assert "projected from 4.0 days" in table
    assert "$120.00" in table


async def test_nothing_is_projected_from_a_part_of_a_day(world: World) -> None:
    """Sums are said, a day and a month are "no data"; and a price nobody knows is not zero."""
    world.now -= 20 * HOUR
    world.ask("hit", tier="exact", saved=Usage(1, 1), saved_cost=10**9)
    world.now = NOW
    report = await world.report()
    said = as_json(report)["roi"]
    assert (said["usd_without_cache"], said["usd_with_cache"]) == (1.0, 0.0)
    assert {said[name] for name in said if "_per_" in name} == {None}
    assert printed(report).count("no data") == 6
    empty = as_json(await World().report())["roi"]
    assert (empty["days"], empty["usd_saved"], empty["saved_per_month"]) == (0, 0.0, None)

    unknown = World()
    unknown.now = NOW - 2 * DAY
    unknown.ask("miss", reason="x", spent=Usage(1, 1), spent_cost=5)
    unknown.ask("hit", tier="exact", saved=Usage(10, 5), saved_cost=None)
    unknown.now = NOW
    report = await unknown.report()
    said = as_json(report)["roi"]
    assert said["usd_with_cache"] == 5e-9
    assert (said["usd_without_cache"], said["usd_saved"], said["saved_per_day"]) == (None,) * 3
    assert "price unknown" in printed(report)


async def test_classes_are_measured_against_their_targets(world: World) -> None:
    """Until a good answer began: a stream by its first token, one in a piece by its end. Who failed
    or was turned away is one that was not in time."""
    for n in range(8):
        world.ask("miss", reason="x", status=200, priority="critical", ms=100.0 * (n + 1))
    world.ask(
        "miss", "n", reason="x", status=200, priority="critical", ms=9e3, first_token_ms=500.0
    )
    world.ask("miss", "n", reason="x", status=503, priority="critical", ms=1.0)
    world.ask("error", reason="shed", status=503, priority="best_effort", ms=1.0)
    world.ask("hit", tier="exact", status=200, priority="normal", ms=2_000.0)
    world.ask("hit", tier="exact", status=200, ms=1.0)
    report = await world.report("priority")
    rows = {(row["priority"], row["model"]): row for row in as_json(report)["by"]}
    assert list(rows) == [
        ("critical", None),
        ("critical", "m"),
        ("critical", "n"),
        ("normal", None),
        ("normal", "m"),
        ("best_effort", None),
        ("best_effort", "m"),
    ]
    critical = rows["critical", None]
    assert (critical["requests"], critical["within_target"]) == (10, 6)
    assert (critical["share_within"], critical["target_ms"]) == (0.6, 500)
    assert critical["latency_ms"]["p50"] == pytest.approx(500, rel=0.025)
    assert critical["latency_ms"]["p99"] == pytest.approx(800, rel=0.025)
    assert rows["critical", "n"]["share_within"] == 0.5
    assert rows["normal", None]["share_within"] == 1.0
    shed = rows["best_effort", None]
    assert (shed["requests"], shed["share_within"], shed["target_ms"]) == (1, 0.0, 5_000)
    assert shed["latency_ms"]["p99"] is None
    table = printed(report)
    for words in ("by priority", "60.0%", "2,000", "best_effort"):
        assert words in table, words


async def test_a_target_is_the_configured_one(world: World) -> None:
    """Counted against the target in force then; exactly at it is in time."""
    classes = {**CLASSES, "critical": replace(CLASSES["critical"], target_ms=50)}
    world.ledger = Ledger(process="p2", clock=lambda: NOW, classes=classes)
    for ms in (49.0, 50.0, 50.1):
        world.ask("hit", tier="exact", status=200, priority="critical", ms=ms)
    (row, _) = as_json(await world.report("priority"))["by"]
    assert (row["target_ms"], row["within_target"], row["requests"]) == (50, 2, 3)


async def test_providers_are_told_apart(world: World) -> None:
    """Requests, calls, tokens and money of each; what a fallback answered is the fallback's."""
    call = world.ledger.record_attempt
    for why in ("first", "retry", "retry"):
        call(why, provider="one", model="m")
    call("fallback", provider="two", model="n")
    call("first", provider="two", model="n")
    usage = Usage(10, 5)
    world.ask("hit", tier="exact", provider="one", saved=usage, saved_cost=10**9)
    world.ask(
        "miss",
        reason="x",
        status=200,
        provider="two",
        answered_by="n",
        spent=usage,
        spent_cost=10**9,
        upstream_ms=70.0,
    )
    world.ask("error", reason="shed", status=503, provider="one")
    world.ledger.record_upstream("audit", usage, 10**9, model="n", provider="two")
    report = await world.report("provider")
    document = as_json(report)
    rows = {row["provider"]: row for row in document["by"]}
    one, two = rows["one"], rows["two"]
    assert one["upstream_attempts"] == {"calls": 3, "retries": 2, "fallbacks": 0, "shed": 1}
    assert two["upstream_attempts"] == {"calls": 2, "retries": 0, "fallbacks": 1, "shed": 0}
    assert (one["requests"], one["hits"], one["errors"], one["usd_spent"]) == (2, 1, 1, 0.0)
    assert (two["requests"], two["misses"], two["answered_for_others"]) == (1, 1, 1)
    assert (two["tokens_spent"], two["usd_spent"]) == ({"input": 20, "output": 10}, 2.0)
    assert two["latency_ms"]["p50"] == pytest.approx(70, rel=0.025)
    assert document["upstream_attempts"] == {"calls": 5, "retries": 2, "fallbacks": 1, "shed": 1}
    assert (document["usd_spent"], document["upstream_own"]["usd"]) == (1.0, 1.0)
    assert "calls to upstream: 5, of them 2 retries" in printed(report)
    models = {row["model"]: row for row in as_json(await world.report("model"))["by"]}
    assert (models["m"]["usd_spent"], models["n"]["usd_spent"]) == (0.0, 1.0)
    assert "$1.00" in printed(await world.report("model"))


async def test_the_one_provider_without_a_name_is_called_upstream(world: World) -> None:
    """Its calls are counted like anybody's."""
    world.ledger.record_attempt("first", model="m", tenant=TENANTS[0])
    world.ask("error", reason="shed", status=503)
    (row,) = as_json(await world.report("provider"))["by"]
    assert (row["provider"], row["upstream_attempts"]["calls"]) == ("upstream", 1)
    assert row["upstream_attempts"]["shed"] == 1


@pytest.mark.parametrize("by", BYS)
async def test_every_grouping_says_no_data_in_words(world: World, by: By) -> None:
    """An empty store, and one whose requests had neither priority nor provider."""
    assert "no data" in printed(await world.report(by))
    world.ask("hit", tier="exact")
    document = as_json(await world.report(by))
    orjson.dumps(document)
    assert "by " in printed(await world.report(by)) or by == "reason"


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
