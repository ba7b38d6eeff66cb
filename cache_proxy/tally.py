"""Counters added up, and the numbers that `cache-stats` says of a sum.

Plain arithmetic on its arguments: no I/O, no clock. What nothing was counted for is None, never a
division by zero and never an invented 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .certify import interval
from .counters import KINDS, PROVIDERS_PURSE, TIMERS, bucket_value
from .dial import BINS, Labels

__all__ = [
    "DAY_SECONDS",
    "ENOUGH_DAYS",
    "Tally",
    "attempts",
    "audits",
    "labels",
    "numbers",
    "percentiles",
    "priority",
    "provider",
    "requests",
    "roi",
    "shadow",
    "share",
]

SOURCES = ("audit", "miss", "shadow", "report")  # of labels
DAY_SECONDS = 86_400
MONTH_DAYS = 30
# Nights and days differ too much for a part of one to tell of a month.
ENOUGH_DAYS = 1.0

QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))


class Tally(Counter[tuple[str, str]]):
    """(counter, detail) -> sum, over whatever hours, processes, models and tenants were added."""

    def details(self, counter: str) -> dict[str, int]:
        """detail -> sum, the largest first."""
        found = [(detail, n) for (name, detail), n in self.items() if name == counter and n]
        return dict(sorted(found, key=lambda item: (-item[1], item[0])))

    def has(self, counter: str) -> bool:
        return any(name == counter for name, _ in self)

    def sum(self, counter: str) -> int:
        return sum(n for (name, _), n in self.items() if name == counter)


def numbers(tally: Tally) -> dict[str, Any]:
    """What `cache-stats` says of one tally, in the documented names."""
    asked, bypassed, hit = requests(tally), tally.sum("bypass"), tally.sum("hit")
    return {
        "requests": asked,
        "hits": {tier: tally["hit", tier] for tier in ("exact", "semantic")},
        "misses": tally.sum("miss"),
        "miss_reasons": tally.details("miss"),
        "collapsed": tally.sum("collapsed"),
        "refreshes": tally.sum("refresh"),
        "shadows": tally.sum("shadow"),
        "bypasses": tally.details("bypass"),
        "errors": tally.sum("error"),
        "error_reasons": tally.details("error"),
        "hit_rate": share(hit, asked),
        "hit_rate_cacheable": share(hit, asked - bypassed),
        "stored": tally.sum("stored"),
        "unstored": tally.sum("unstored"),
        "discards": tally.details("discard"),
        "vetoes": tally.details("veto"),
        "tokens_saved": _tokens(tally, "saved"),
        "usd_saved": _dollars(tally, "saved"),
        "tokens_spent": _tokens(tally, "spent"),
        "usd_spent": _dollars(tally, "spent"),
        "price_unknown": {
            "requests": tally.sum("saved.unpriced") + tally.sum("spent.unpriced"),
            "tokens": tally.sum("saved.unpriced_tokens") + tally.sum("spent.unpriced_tokens"),
        },
        "upstream_own": {
            "calls": tally.details("upstream.calls"),
            "tokens": _tokens(tally, "upstream"),
            "usd": _dollars(tally, "upstream"),
        },
        "upstream_attempts": attempts(tally),
        "latency_ms": {timer: percentiles(tally, timer) for timer in TIMERS},
        "audits": audits(tally),
        "tightened": _strictest(tally),
        "labels": {source: _pool(labels(tally, source)) for source in SOURCES},
    }


def requests(tally: Tally) -> int:
    """I12: this sum is what a request is; there is no other count that could disagree."""
    return sum(tally.sum(kind) for kind in KINDS)


def percentiles(tally: Tally, timer: str) -> dict[str, float | None]:
    """Nearest-rank percentiles in milliseconds, each within 2.5 % of the value measured."""
    counts: Counter[int] = Counter()
    for detail, n in tally.details(f"ms.{timer}").items():
        counts[int(detail.rpartition(".")[2])] += n
    return {name: _quantile(counts, q) for name, q in QUANTILES}


def audits(tally: Tally) -> dict[str, float | int | None]:
    """Wrong hits among those audited, with the exact 95 % interval (Clopper-Pearson)."""
    wrong, right = tally["audit", "wrong"], tally["audit", "right"]
    audited = wrong + right
    low, high = interval(wrong, audited)[1:] if audited else (None, None)
    return {
        "audited": audited,
        "wrong": wrong,
        "rate": share(wrong, audited),
        "low": None if low is None else round(low, 6),
        "high": None if high is None else round(high, 6),
    }


def attempts(tally: Tally) -> dict[str, int]:
    """Calls made to upstream, and why; and the requests turned away without one."""
    why: Counter[str] = Counter()
    for detail, n in tally.details("attempt").items():
        why[detail.rpartition(".")[2]] += n
    return {
        "calls": why.total(),
        "retries": why["retry"],
        "fallbacks": why["fallback"],
        "shed": tally.sum("shed"),
    }


def priority(tally: Tally) -> dict[str, Any]:
    """One class against its target: how long until good answers began, and the share in time.

    The share is of all requests of the class: one that failed or was turned away was not in time.
    """
    asked, within = tally.sum("class"), tally.sum("within")
    targets = [int(detail.rpartition(".")[2]) for detail in tally.details("class")]
    return {
        "requests": asked,
        "target_ms": targets[0] if targets else None,  # the one most requests had
        "within_target": within,
        "share_within": share(within, asked),
        "latency_ms": percentiles(tally, "class"),
    }


def provider(tally: Tally) -> dict[str, Any]:
    """One provider: the requests it was for, the calls it got, what they cost and took."""
    routed: Counter[str] = Counter()
    for detail, n in tally.details("routed").items():
        routed[detail.rpartition(".")[2]] += n
    return {
        "requests": routed.total(),
        "hits": routed["hit"],
        "misses": routed["miss"],
        "bypasses": routed["bypass"],
        "errors": routed["error"],
        "answered_for_others": tally.sum("fell"),
        "upstream_attempts": attempts(tally),
        "tokens_spent": _tokens(tally, PROVIDERS_PURSE),
        "usd_spent": _dollars(tally, PROVIDERS_PURSE),
        "latency_ms": percentiles(tally, "provider"),
    }


def roi(tally: Tally, seconds: float) -> dict[str, float | None]:
    """What upstream cost with the cache, and would have cost without it.

        with    = spent on requests + spent on our own calls (audits, their judge)
        without = spent on requests + saved by hits and shared calls

    In US dollars over the `seconds` that were counted, then as a mean day, and as a month of 30
    such days: null until a whole day was counted. What has no known price is in neither; a sum
    with nothing but unknown prices in one of its parts is null.
    """
    spent, own, saved = (_dollars(tally, purse) for purse in ("spent", "upstream", "saved"))
    days = seconds / DAY_SECONDS
    figures: dict[str, float | None] = {"days": round(days, 4)}
    sums = {
        "without_cache": _plus(spent, saved),
        "with_cache": _plus(spent, own),
        "saved": None if saved is None or own is None else saved - own,
    }
    for name, usd in sums.items():
        mean = None if usd is None or days < ENOUGH_DAYS else usd / days
        figures[f"usd_{name}"] = usd
        figures[f"{name}_per_day"] = mean
        figures[f"{name}_per_month"] = None if mean is None else mean * MONTH_DAYS
    return figures


def _plus(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def labels(tally: Tally, *sources: str, encoder: str | None = None) -> Labels:
    """What was learnt from these sources, by bin of the score; an encoder's own, if one is named:
    a score says nothing about another's."""
    found = Labels()
    for source in sources:
        for detail, count in tally.details(f"label.{source}").items():
            word, place, *of = detail.split(".")
            if encoder is None or of == [encoder]:
                found.add(int(place), wrong=word == "wrong", count=count)
    return found


def _pool(found: Labels) -> list[dict[str, float | int]]:
    """Labels by hundredth of the score, from near to far."""
    places = sorted(found.right.keys() | found.wrong.keys(), reverse=True)
    return [
        {
            "score": place / BINS,
            "right": found.right.get(place, 0),
            "wrong": found.wrong.get(place, 0),
        }
        for place in places
    ]


def shadow(tally: Tally) -> list[dict[str, float | int | None]]:
    """What each threshold would have served of the requests that were only looked up.

    Exact hits count as hits at any threshold; wrong ones are looked for among the others only.
    """
    asked, exact = tally.sum("shadow"), tally.sum("shadow.exact")
    found = labels(tally, "shadow")
    rows = []
    for place in range(80, BINS):
        semantic, wrong = found.above(place)
        low, high = interval(wrong, semantic)[1:] if semantic else (None, None)
        rows.append(
            {
                "threshold": place / BINS,
                "requests": asked,
                "hits": exact + semantic,
                "semantic": semantic,
                "hit_rate": share(exact + semantic, asked),
                "wrong": wrong,
                "wrong_rate": share(wrong, semantic),
                "low": low,
                "high": high,
            }
        )
    return rows if asked else []


def _strictest(tally: Tally) -> float | None:
    """The highest threshold that wrong hits led to in this time; None when they led to none."""
    return max((int(place) / BINS for place in tally.details("tightened")), default=None)


def share(part: int, whole: int) -> float | None:
    """A rate with six decimals; None when there is no whole."""
    return round(part / whole, 6) if whole else None


def _quantile(counts: Mapping[int, int], q: float) -> float | None:
    rank = math.ceil(sum(counts.values()) * q)
    seen = 0
    for bucket in sorted(counts):
        seen += counts[bucket]
        if seen >= rank:
            return float(f"{bucket_value(bucket):.4g}")
    return None


def _tokens(tally: Tally, purse: str) -> dict[str, int]:
    return {"input": tally.sum(f"{purse}.in"), "output": tally.sum(f"{purse}.out")}


def _dollars(tally: Tally, purse: str) -> float | None:
    """None when there is something to pay for and no price for any of it."""
    if not tally.has(f"{purse}.nano") and tally.has(f"{purse}.unpriced"):
        return None
    return tally.sum(f"{purse}.nano") / 1e9
