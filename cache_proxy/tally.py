"""Counters added up, and the numbers that `cache-stats` says of a sum.

Plain arithmetic on its arguments: no I/O, no clock. What nothing was counted for is None, never a
division by zero and never an invented 0.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from .counters import KINDS, TIMERS, bucket_value

__all__ = ["Tally", "audits", "interval", "numbers", "percentiles", "requests", "share"]

QUANTILES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99))
Z95 = 1.959964


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
        "latency_ms": {timer: percentiles(tally, timer) for timer in TIMERS},
        "audits": audits(tally),
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
    """Wrong hits among those audited, with the 95 % Wilson interval of their rate."""
    wrong, right = tally["audit", "wrong"], tally["audit", "right"]
    low, high = interval(wrong, wrong + right)
    return {
        "audited": wrong + right,
        "wrong": wrong,
        "rate": share(wrong, wrong + right),
        "low": low,
        "high": high,
    }


def interval(wrong: int, audited: int) -> tuple[float | None, float | None]:
    """The 95 % Wilson score interval; (None, None) when nothing was audited."""
    if audited == 0:
        return None, None
    rate, z2 = wrong / audited, Z95 * Z95
    middle = (rate + z2 / (2 * audited)) / (1 + z2 / audited)
    spread = math.sqrt(rate * (1 - rate) / audited + z2 / (4 * audited * audited))
    reach = Z95 * spread / (1 + z2 / audited)
    low = 0.0 if wrong == 0 else max(0.0, middle - reach)
    high = 1.0 if wrong == audited else min(1.0, middle + reach)
    return round(low, 6), round(high, 6)


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
