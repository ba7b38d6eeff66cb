"""`cache-stats`: the ledger's counters of a span of time -> one report, and that as JSON.

Only adds up and words what the ledger wrote; decides nothing, reads no clock and prints nothing.
Counters are kept by the hour, so a span begins at the hour that holds its beginning.
"""

from __future__ import annotations

import asyncio
import datetime
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from .counters import PROVIDERS_PURSE, Field, parse_field
from .ledger import CounterStore
from .tally import (
    Tally,
    numbers,
    priority,
    provider,
    requests,
    roi,
    shadow,
)
from .upstream.fair_queue import CLASSES

__all__ = ["BYS", "By", "Churn", "Report", "as_json", "by_class", "collect", "iso", "parse_since"]

By = Literal["model", "tenant", "day", "tier", "reason", "priority", "provider"]
BYS: tuple[By, ...] = get_args(By)

ENOUGH_MISSES = 20  # without a hit, before a field is named as the one that churns
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
    first: int | None  # the beginning of the first hour that was counted; None of no data

    @property
    def requests(self) -> int:
        return requests(self.total)

    @property
    def covered(self) -> float:
        """Seconds from the first count to the end of the span."""
        return 0 if self.first is None else max(0, self.until - self.first)


async def collect(store: CounterStore, since: float, until: float, by: By | None = None) -> Report:
    """Add up what the ledger wrote from the hour of `since` to the hour of `until`.

    MemoryUnavailable when the store does not answer; an empty store gives an empty report.
    """
    # The same fields come hour after hour: added up as they are first, taken apart once a day.
    days: dict[str, dict[str, int]] = {}
    first = None
    async for hour, fields in store.read_counters(int(since) // 3600, int(until) // 3600):
        if fields:
            first = min(hour * 3600, first if first is not None else hour * 3600)
        sums = days.setdefault(iso(hour * 3600)[:10], {})
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
        first=first,
    )


def as_json(report: Report) -> dict[str, Any]:
    """The documented shape. Rates and percentiles of nothing are null; `data` says if there is any.

    Money in US dollars, times in milliseconds, `since` and `until` in ISO 8601 (UTC).
    """
    day, _, source = (report.prices or "").partition(" ")
    churn = report.churn
    document = {
        "data": report.requests > 0,
        "since": iso(report.since),
        "until": iso(report.until),
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
        "roi": roi(report.total, report.covered),
    }
    if report.by == "priority":
        document["by"] = [
            {"priority": name, "model": model or None, **priority(tally)}
            for name, model, tally in by_class(report)
        ]
    elif report.by is not None:
        said = provider if report.by == "provider" else numbers
        document["by"] = [{report.by: key, **said(tally)} for key, tally in report.groups.items()]
    return document


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
    elif by == "priority" and field.counter in ("class", "within", "ms.class"):
        name = field.detail.rpartition(".")[0]
        yield name
        yield f"{name} {field.model or NONE}"
    elif by == "provider" and field.counter in ("attempt", "routed", "ms.provider"):
        yield field.detail.rpartition(".")[0]
    elif by == "provider" and (field.counter in ("shed", "fell") or _of_provider(field.counter)):
        yield field.detail


def _of_provider(counter: str) -> bool:
    return counter.startswith(f"{PROVIDERS_PURSE}.")


def _tier(field: Field) -> Iterator[str]:
    tier = field.detail.partition(".")[0]
    if field.counter in ("hit", "ms.hit") or field.counter.startswith("saved."):
        yield tier
    elif field.counter in UNTIERED or field.counter.startswith("spent."):
        yield NONE


def _ordered(by: By | None, groups: Mapping[str, Tally]) -> dict[str, Tally]:
    """Days in order, classes by rank, providers by calls, anything else by requests."""
    if by == "day":
        return dict(sorted(groups.items()))
    if by == "priority":
        ranks = list(CLASSES)
        return dict(sorted(groups.items(), key=lambda item: _rank(ranks, *item)))
    if by == "provider":
        return dict(sorted(groups.items(), key=lambda item: (-item[1].sum("attempt"), item[0])))
    return dict(sorted(groups.items(), key=lambda item: (-requests(item[1]), item[0])))


def _rank(ranks: list[str], key: str, tally: Tally) -> tuple[int, bool, int, str]:
    """Each class before its models, these by requests."""
    name, _, model = key.partition(" ")
    rank = ranks.index(name) if name in ranks else len(ranks)
    return rank, bool(model), -tally.sum("class"), key


def by_class(report: Report) -> Iterator[tuple[str, str, Tally]]:
    """Class, model and what was counted; model "" is all of the class."""
    for key, tally in report.groups.items():
        name, _, model = key.partition(" ")
        if tally.sum("class"):
            yield name, model, tally


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


def iso(seconds: int) -> str:
    """A Unix time in words, UTC."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
