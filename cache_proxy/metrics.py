"""Counts -> the text that Prometheus scrapes.

A plain function of its argument: no I/O, no clock, no registry of its own. Every label comes from a
closed set: no tenants, no models, no prompt text; providers are named by the configuration.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from .counters import KINDS, LAST_BUCKET, PURSES, SEP, TIMERS, bucket_top

if TYPE_CHECKING:
    from prometheus_client.core import (
        CounterMetricFamily,
        HistogramMetricFamily,
        Metric,
    )

__all__ = ["expose"]

PREFIX = "cache_proxy"
EVERY = 14  # fine buckets to a coarse one: bounds that double, and fall on fine ones exactly

PLAIN = (
    ("collapsed", "Misses that shared somebody else's upstream call."),
    ("refresh", "Misses that the client asked for."),
    ("shadow", "Misses that were only looked up."),
    ("stored", "Answers good enough to store."),
    ("unstored", "Of those, answers that the store did not take."),
    ("ledger.lost_hours", "Hours of counts dropped while the store was away."),
    ("ledger.failed_flushes", "Writes of counts that the store did not take."),
)
LABELLED = (
    ("veto", "guard", "Neighbours that a guard refused."),
    ("discard", "reason", "Answers that were not stored."),
    ("rejected", "why", "Stored values that were read and not believed."),
    ("audit", "verdict", "Served semantic hits compared with a fresh answer."),
    ("tightened", "to", "Times wrong hits raised a threshold, and to which hundredth."),
    ("upstream.calls", "purpose", "Upstream calls that are no client's request."),
    ("shed", "provider", "Requests turned away unsent."),
    ("fell", "provider", "Requests answered in another provider's or model's stead."),
)
# Their detail is two labels, joined by a dot.
PAIRED = (
    ("attempt", ("provider", "why"), "Calls made to upstream."),
    ("class", ("priority", "target_ms"), "Requests of a priority class."),
    ("within", ("priority", "target_ms"), "Requests whose good answer began within the target."),
)


class _Source:
    """What `generate_latest` asks for: something with `collect`."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def expose(totals: Mapping[str, int]) -> bytes:
    """Text format 0.0.4 of totals named "counter SEP detail"."""
    from prometheus_client import generate_latest

    return generate_latest(_Source(_families(_by_counter(totals))))


def _families(totals: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
    yield _requests(totals)
    for counter, help_text in PLAIN:
        family = _counter(counter, help_text)
        family.add_metric([], sum(totals.get(counter, {}).values()))
        yield family
    for counter, key, help_text in LABELLED:
        family = _counter(counter, help_text, key)
        for detail, n in sorted(totals.get(counter, {}).items()):
            family.add_metric([detail], n)
        yield family
    for counter, keys, help_text in PAIRED:
        family = _counter(counter, help_text, *keys)
        for detail, n in sorted(totals.get(counter, {}).items()):
            one, _, other = detail.rpartition(".")
            family.add_metric([one, other], n)
        yield family
    yield from _money(totals)
    yield _durations(totals)


def _requests(totals: Mapping[str, Mapping[str, int]]) -> Metric:
    family = _counter("requests", "Requests, one outcome each.", "kind", "tier", "reason")
    for kind in KINDS:
        for detail, n in sorted(totals.get(kind, {}).items()):
            tier, reason = (detail, "") if kind == "hit" else ("", detail)
            family.add_metric([kind, tier, reason], n)
    return family


def _money(totals: Mapping[str, Mapping[str, int]]) -> Iterator[Metric]:
    tokens = _counter("tokens", "Tokens saved, spent, and spent on our own calls.", "purse", "way")
    dollars = _counter("dollars", "US dollars, where the price is known.", "purse")
    unpriced = _counter("unpriced_tokens", "Tokens whose price is unknown.", "purse")
    for purse in PURSES:
        for way in ("in", "out"):
            tokens.add_metric([purse, way], sum(totals.get(f"{purse}.{way}", {}).values()))
        dollars.add_metric([purse], sum(totals.get(f"{purse}.nano", {}).values()) / 1e9)
        unpriced.add_metric([purse], sum(totals.get(f"{purse}.unpriced_tokens", {}).values()))
    yield from (tokens, dollars, unpriced)


def _durations(totals: Mapping[str, Mapping[str, int]]) -> Metric:
    from prometheus_client.core import HistogramMetricFamily

    family: HistogramMetricFamily = HistogramMetricFamily(
        f"{PREFIX}_seconds", "How long hits, misses and their parts took.", labels=["stage"]
    )
    for timer in TIMERS:
        fine = [0] * (LAST_BUCKET + EVERY)
        for detail, n in totals.get(f"ms.{timer}", {}).items():
            fine[int(detail.rpartition(".")[2])] += n
        buckets, below = [], 0
        for first in range(0, LAST_BUCKET, EVERY):
            below += sum(fine[first : first + EVERY])
            buckets.append((f"{bucket_top(first + EVERY - 1) / 1000:.6g}", below))
        buckets.append(("+Inf", sum(fine)))
        seconds = sum(totals.get(f"us.{timer}", {}).values()) / 1e6
        family.add_metric([timer], buckets=buckets, sum_value=seconds)
    return family


def _counter(counter: str, help_text: str, *labels: str) -> CounterMetricFamily:
    from prometheus_client.core import CounterMetricFamily

    return CounterMetricFamily(f"{PREFIX}_{counter.replace('.', '_')}", help_text, labels=labels)


def _by_counter(totals: Mapping[str, int]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for name, n in totals.items():
        counter, _, detail = name.partition(SEP)
        found.setdefault(counter, {})[detail] = n
    return found
