"""`cache-stats` on a terminal: a report as tables.

Words only what the report says, in the figures that its JSON has; prints nothing itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .stats import NONE, Churn, Report, by_class, iso
from .tally import (
    DAY_SECONDS,
    ENOUGH_DAYS,
    Tally,
    attempts,
    audits,
    numbers,
    priority,
    provider,
    requests,
    roi,
    shadow,
    share,
)

__all__ = ["render", "shadow_table", "wrong_rate"]

SHOWN_REASONS = 8
SHOWN_GROUPS = 25


def render(report: Report) -> RenderableType:
    """The same report for a terminal."""
    if report.requests == 0:
        nothing = Text("no data: no request was counted in this time")
        return Group(_title(report), nothing, _held(report))
    parts = [_title(report), _outcomes(report.total), _money(report), _roi(report)]
    parts += [_latency(report.total), _upstream(report.total)]
    parts += [part for part in (_reasons(report.total), _grouped(report)) if part is not None]
    parts += [_quality(report.total), _held(report)]
    return Group(*parts) if report.churn is None else Group(*parts, _blame(report.churn))


def _title(report: Report) -> RenderableType:
    since, until = (iso(seconds)[:16].replace("T", " ") for seconds in (report.since, report.until))
    span = f"{since} to {until} UTC"
    return Text.assemble(("cache-stats  ", "bold"), (span, "dim"))


def _outcomes(tally: Tally) -> RenderableType:
    said = numbers(tally)
    all_of = said["requests"]
    exact, semantic = said["hits"]["exact"], said["hits"]["semantic"]
    bypassed = sum(said["bypasses"].values())
    rate, cacheable = _percent(said["hit_rate"]), _percent(said["hit_rate_cacheable"])
    table = _table("", "requests", "share", "")
    rows = (
        ("hits", exact + semantic, f"exact {exact:,}, semantic {semantic:,}"),
        ("misses", said["misses"], f"{said['collapsed']:,} shared an upstream call"),
        ("bypasses", bypassed, "passed through, not for the cache"),
        ("errors", said["errors"], "our own failures"),
    )
    for name, n, note in rows:
        table.add_row(name, f"{n:,}", _percent(share(n, all_of)), Text(note, "dim"))
    note = f"hit rate {rate}, {cacheable} of the cacheable"
    table.add_row("all", f"{all_of:,}", "", Text(note, "bold"), style="bold")
    return table


def _money(report: Report) -> RenderableType:
    said = numbers(report.total)
    table = _table("", "US dollars", "input tokens", "output tokens")
    for name in ("saved", "spent"):
        tokens = said[f"tokens_{name}"]
        table.add_row(
            name, _usd(said[f"usd_{name}"]), f"{tokens['input']:,}", f"{tokens['output']:,}"
        )
    own = said["upstream_own"]
    if own["calls"]:
        tokens = own["tokens"]
        cells = (_usd(own["usd"]), f"{tokens['input']:,}", f"{tokens['output']:,}")
        table.add_row("audits, probes", *cells)
    unknown = said["price_unknown"]
    note = f"prices as of {report.prices or 'unknown'}"
    if unknown["requests"]:
        note += f"; not in the dollars, for want of a price: {unknown['requests']:,} requests, "
        note += f"{unknown['tokens']:,} tokens"
    return Group(table, Text(note, "dim"))


def _roi(report: Report) -> RenderableType:
    said = roi(report.total, report.covered)
    table = _table("upstream's bill", "in this time", "a day", "a month")
    for name in ("without_cache", "with_cache", "saved"):
        spans = (f"usd_{name}", f"{name}_per_day", f"{name}_per_month")
        cells = [_usd(said[span]) for span in spans]
        if report.covered < ENOUGH_DAYS * DAY_SECONDS:
            cells[1:] = ["no data", "no data"]
        table.add_row(name.replace("_", " the "), *cells)
    note = f"a day, and a month of 30, as projected from {said['days']:,.1f} days"
    if report.covered < ENOUGH_DAYS * DAY_SECONDS:
        note = "a day and a month are projected once a whole day was counted"
    return Group(table, Text(note, "dim"))


def _upstream(tally: Tally) -> RenderableType:
    said = attempts(tally)
    return Text(
        f"calls to upstream: {said['calls']:,}, of them {said['retries']:,} retries and "
        f"{said['fallbacks']:,} to a fallback; {said['shed']:,} requests turned away unsent",
        "dim",
    )


def _latency(tally: Tally) -> RenderableType:
    said = numbers(tally)["latency_ms"]
    table = _table("milliseconds", "p50", "p95", "p99")
    for timer, values in said.items():
        table.add_row(timer.replace("_", " "), *(_ms(value) for value in values.values()))
    return table


def _reasons(tally: Tally) -> RenderableType | None:
    said = numbers(tally)
    kinds = (
        ("miss", said["miss_reasons"]),
        ("bypass", said["bypasses"]),
        ("error", said["error_reasons"]),
        ("not stored", said["discards"]),
        ("guard", said["vetoes"]),
    )
    table = _table("why not", "reason", "times", left=2)
    for kind, reasons in kinds:
        for reason, n in list(reasons.items())[:SHOWN_REASONS]:
            table.add_row(kind, reason, f"{n:,}")
    return table if table.row_count else None


def _grouped(report: Report) -> RenderableType | None:
    if report.by is None:
        return None
    if report.by == "priority":
        return _classes(report)
    if report.by == "provider":
        return _providers(report)
    table = _table(f"by {report.by}", "requests", "hits", "hit rate", "saved", "spent", "hit p50")
    asked = [
        (key, tally)
        for key, tally in report.groups.items()
        if requests(tally) or tally.sum("spent.nano")  # a fallback is paid for and never asked for
    ]
    for key, tally in asked[:SHOWN_GROUPS]:
        said = numbers(tally)
        table.add_row(
            key,
            f"{said['requests']:,}",
            f"{sum(said['hits'].values()):,}",
            _percent(said["hit_rate"]),
            _usd(said["usd_saved"]),
            _usd(said["usd_spent"]),
            _ms(said["latency_ms"]["hit"]["p50"]),
        )
    if len(asked) <= SHOWN_GROUPS:
        return table
    return Group(table, Text(f"the first {SHOWN_GROUPS} of {len(asked)}; --json has all"))


def _classes(report: Report) -> RenderableType:
    """Each class against its target, then each of its models."""
    table = _table(
        "by priority", "model", "requests", "target", "in time", "p50", "p95", "p99", left=2
    )
    for name, model, tally in list(by_class(report))[:SHOWN_GROUPS]:
        said = priority(tally)
        table.add_row(
            "" if model else name,
            model or "all",
            f"{said['requests']:,}",
            _ms(said["target_ms"]),
            _percent(said["share_within"]),
            *(_ms(value) for value in said["latency_ms"].values()),
        )
    if not table.row_count:
        return Text("by priority: no data: no request had a priority")
    return Group(table, Text("milliseconds until a good answer began; in time of all", "dim"))


def _providers(report: Report) -> RenderableType:
    table = _table(
        "provider", "asked", "hits", "calls", "retries", "shed", "spent", "p50 / p95 / p99"
    )
    for name, tally in list(report.groups.items())[:SHOWN_GROUPS]:
        said = provider(tally)
        table.add_row(
            name,
            f"{said['requests']:,}",
            f"{said['hits']:,}",
            f"{said['upstream_attempts']['calls']:,}",
            f"{said['upstream_attempts']['retries']:,}",
            f"{said['upstream_attempts']['shed']:,}",
            _usd(said["usd_spent"]).removeprefix("price "),
            " / ".join(_ms(value) for value in said["latency_ms"].values()),
        )
    if not table.row_count:
        return Text("by provider: no data: no call was made to one")
    return Group(table, Text("milliseconds of calls to upstream", "dim"))


def shadow_table(report: Report) -> RenderableType:
    """What each threshold would have served of the requests that were only looked up."""
    rows = shadow(report.total)
    if not rows:
        return Group(_title(report), "no data: no request was looked up in shadow mode")
    names = ("threshold", "would hit", "hit rate", "by meaning", "wrong", "share", "95 %")
    table = _table(*names)
    for row in rows:
        interval = f"{_percent(row['low'])} to {_percent(row['high'])}" if row["semantic"] else "-"
        table.add_row(
            f"{row['threshold']:.2f}",
            str(row["hits"]),
            _percent(row["hit_rate"]),
            str(row["semantic"]),
            str(row["wrong"]),
            _percent(row["wrong_rate"]),
            interval,
        )
    return Group(_title(report), table)


def _quality(tally: Tally) -> RenderableType:
    said = audits(tally)
    if said["rate"] is None:
        return Text("wrong-hit rate unknown: no semantic hit was audited", "dim")
    threshold = numbers(tally)["tightened"]
    text = "" if threshold is None else f"; wrong hits raised a threshold to {threshold:.2f}"
    return Text(wrong_rate(said) + text)


def wrong_rate(said: Mapping[str, Any]) -> str:
    """ "wrong-hit rate 0.4 % (95 %: 0.1 to 1.1 %, 500 audited)"; the interval rounded outwards."""
    low = math.floor(round(said["low"] * 1_000, 6)) / 10
    high = math.ceil(round(said["high"] * 1_000, 6)) / 10
    rate = f"wrong-hit rate {said['rate'] * 100:.1f} %"
    return f"{rate} (95 %: {low:.1f} to {high:.1f} %, {said['audited']:,} audited)"


def _held(report: Report) -> RenderableType:
    return Text(f"stored now: {report.entries:,} entries, {report.bytes / 1e6:,.1f} MB")


def _blame(churn: Churn) -> RenderableType:
    who = f"model {churn.model or NONE}, tenant {churn.tenant or NONE}"
    return Text.assemble(
        ("never repeats: ", "bold yellow"),
        (
            f"the field '{churn.field}' differs on {_percent(churn.share)} of the calls of {who}, ",
            "",
        ),
        (f"so none of its {churn.misses:,} misses could be a hit", ""),
    )


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        # Words to the left, numbers to the right; a last column without a name holds notes.
        words = number < left or not column
        table.add_column(column, justify="left" if words else "right")
    return table


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _usd(value: float | None) -> str:
    if value is None:
        return "price unknown"
    if value == 0 or value >= 1:
        return f"${value:,.2f}"
    return f"${value:.4f}" if value >= 0.0001 else "<$0.0001"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
