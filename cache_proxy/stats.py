"""`cache-stats`: the ledger's counters of a span of time -> one report, as JSON or as a table.

Only adds up and words what the ledger wrote; decides nothing, reads no clock and prints nothing.
Counters are kept by the hour, so a span begins at the hour that holds its beginning.
"""

from __future__ import annotations

import asyncio
import datetime
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .counters import Field, parse_field
from .ledger import CounterStore
from .tally import Tally, audits, numbers, requests, shadow, share

__all__ = [
    "By",
    "Churn",
    "Report",
    "as_json",
    "collect",
    "parse_since",
    "render",
    "shadow_table",
    "wrong_rate",
]

By = Literal["model", "tenant", "day", "tier", "reason"]

ENOUGH_MISSES = 20  # without a hit, before a field is named as the one that churns
SHOWN_REASONS = 8
SHOWN_GROUPS = 25
NONE = "none"  # the group of what has no model, tenant or tier
MOSTLY = 0.5  # of the misses compared; a field that changes less often does not explain them

UNTIERED = frozenset({"miss", "bypass", "error", "ms.miss", "ms.upstream", "ms.first_token"})

_SPAN = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@dataclass(frozen=True, slots=True)
class Churn:
    """Why one app never hits: a request field that differs on (nearly) every call."""

    field: str
    share: float  # of the misses compared
    misses: int
    model: str
    tenant: str


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that `as_json` and the table say. Times are Unix seconds."""

    since: int
    until: int
    total: Tally
    by: By | None
    groups: Mapping[str, Tally]
    churn: Churn | None
    entries: int
    bytes: int
    prices: str | None  # "2026-11-09 genai-prices 0.2.3"

    @property
    def requests(self) -> int:
        return requests(self.total)


async def collect(store: CounterStore, since: float, until: float, by: By | None = None) -> Report:
    """Add up what the ledger wrote from the hour of `since` to the hour of `until`.

    MemoryUnavailable when the store does not answer; an empty store gives an empty report.
    """
    # The same fields come hour after hour: added up as they are first, taken apart once a day.
    days: dict[str, dict[str, int]] = {}
    async for hour, fields in store.read_counters(int(since) // 3600, int(until) // 3600):
        sums = days.setdefault(_iso(hour * 3600)[:10], {})
        for text, n in fields.items():
            sums[text] = sums.get(text, 0) + n
        await asyncio.sleep(0)  # the admin port shares the event loop with requests
    total, prices = Tally(), None
    groups: dict[str, Tally] = {}
    pairs: dict[tuple[str, str], Tally] = {}
    for day, sums in sorted(days.items()):
        for text, n in sums.items():
            field = parse_field(text)
            if field is None:
                continue
            if field.counter == "prices":
                prices = field.detail
                continue
            item = (field.counter, field.detail)
            total[item] += n
            pairs.setdefault((field.model, field.tenant), Tally())[item] += n
            for key in _keys(by, day, field):
                groups.setdefault(key, Tally())[item] += n
        await asyncio.sleep(0)
    entries, held = await store.size()
    return Report(
        since=int(since) // 3600 * 3600,
        until=int(until),
        total=total,
        by=by,
        groups=_ordered(by, groups),
        churn=_worst_churn(pairs),
        entries=entries,
        bytes=held,
        prices=prices,
    )


def as_json(report: Report) -> dict[str, Any]:
    """The documented shape. Rates and percentiles of nothing are null; `data` says if there is any.

    Money in US dollars, times in milliseconds, `since` and `until` in ISO 8601 (UTC).
    """
    day, _, source = (report.prices or "").partition(" ")
    churn = report.churn
    document = {
        "data": report.requests > 0,
        "since": _iso(report.since),
        "until": _iso(report.until),
        **numbers(report.total),
        "churn": {
            "field": churn.field if churn else None,
            "share": round(churn.share, 4) if churn else None,
            "misses": churn.misses if churn else None,
            "model": churn.model if churn else None,
            "tenant": churn.tenant if churn else None,
        },
        "shadow": shadow(report.total),
        "entries": report.entries,
        "bytes": report.bytes,
        "prices_as_of": day or None,
        "prices_source": source or None,
    }
    if report.by is not None:
        document["by"] = [
            {report.by: key, **numbers(tally)} for key, tally in report.groups.items()
        ]
    return document


def render(report: Report) -> RenderableType:
    """The same report for a terminal."""
    if report.requests == 0:
        nothing = Text("no data: no request was counted in this time")
        return Group(_title(report), nothing, _held(report))
    parts = [_title(report), _outcomes(report.total), _money(report), _latency(report.total)]
    parts += [part for part in (_reasons(report.total), _grouped(report)) if part is not None]
    parts += [_quality(report.total), _held(report)]
    return Group(*parts) if report.churn is None else Group(*parts, _blame(report.churn))


def parse_since(text: str, now: float) -> float:
    """The Unix time that "30m", "24h", "7d", "2w" ago or an ISO date or time means.

    A time without a zone is UTC. ValueError, fit to be shown, for anything else and the future.
    """
    if span := _SPAN.fullmatch(text.strip()):
        since = now - float(span[1]) * _SECONDS[span[2]]
    else:
        try:
            moment = datetime.datetime.fromisoformat(text.strip())
        except ValueError:
            raise ValueError(
                "say how far back, as 30m, 24h, 7d or a date like 2026-01-31"
            ) from None
        since = (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()
    if not 0 <= since <= now:
        raise ValueError("the beginning must lie between 1970 and now")
    return since


def _keys(by: By | None, day: str, field: Field) -> Iterator[str]:
    """The group a field belongs to; none when that grouping cannot tell."""
    if by == "day":
        yield day
    elif by == "model":
        yield field.model or NONE
    elif by == "tenant" and not field.counter.startswith(("ms.", "us.")):
        yield field.tenant or NONE  # durations are kept by model only
    elif by == "tier":
        yield from _tier(field)
    elif by == "reason" and field.counter in ("miss", "bypass", "error"):
        yield field.detail


def _tier(field: Field) -> Iterator[str]:
    tier = field.detail.partition(".")[0]
    if field.counter in ("hit", "ms.hit") or field.counter.startswith("saved."):
        yield tier
    elif field.counter in UNTIERED or field.counter.startswith("spent."):
        yield NONE


def _ordered(by: By | None, groups: Mapping[str, Tally]) -> dict[str, Tally]:
    """Days in order, anything else by requests."""
    if by == "day":
        return dict(sorted(groups.items()))
    return dict(sorted(groups.items(), key=lambda item: (-requests(item[1]), item[0])))


def _worst_churn(pairs: Mapping[tuple[str, str], Tally]) -> Churn | None:
    """The largest app (model and tenant) that misses and misses, and the field to blame."""
    found = [
        churn
        for (model, tenant), tally in pairs.items()
        if tally.sum("hit") == 0 and tally.sum("miss") >= ENOUGH_MISSES
        if (churn := _churn(tally, model, tenant)) is not None
    ]
    return max(found, key=lambda churn: churn.misses, default=None)


def _churn(tally: Tally, model: str, tenant: str) -> Churn | None:
    compared = tally.sum("compared")
    changed = tally.details("churned")
    if not changed or compared == 0:
        return None
    # Histories grow in every conversation: not to be named when another field changes as often.
    field = max(changed, key=lambda name: (changed[name], name != "history"))
    part = changed[field] / compared
    return Churn(field, part, tally.sum("miss"), model, tenant) if part >= MOSTLY else None


def _iso(seconds: int) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# The table ----------------------------------------------------------------------------------------


def _title(report: Report) -> RenderableType:
    since, until = (
        _iso(seconds)[:16].replace("T", " ") for seconds in (report.since, report.until)
    )
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
    table = _table(f"by {report.by}", "requests", "hits", "hit rate", "saved", "spent", "hit p50")
    asked = [(key, tally) for key, tally in report.groups.items() if requests(tally)]
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
        return "unknown"
    if value == 0 or value >= 1:
        return f"${value:,.2f}"
    return f"${value:.4f}" if value >= 0.0001 else "<$0.0001"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
