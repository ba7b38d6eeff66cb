"""What is counted, under which names, and how durations become buckets.

The ledger writes these names and `cache-stats` reads them; both import them from here, so that a
counter has one definition. No I/O, no clock, no logging.

A stored field is process, counter, model, tenant and detail, joined by 0x1f; its value is a whole
number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

__all__ = [
    "KINDS",
    "LAST_BUCKET",
    "OTHER",
    "PROVIDERS_PURSE",
    "PURSES",
    "SEP",
    "TIMERS",
    "UNNAMED",
    "Field",
    "Hour",
    "Names",
    "Row",
    "bucket_of",
    "bucket_top",
    "bucket_value",
    "field_of",
    "label",
    "parse_field",
]

SEP = "\x1f"
OTHER = "other"  # what is beyond a cap, or is no fit label

# One of these for each request, so that together they are the requests (I12). Their detail is the
# tier of a hit and the reason of anything else.
KINDS = ("hit", "miss", "bypass", "error")

# Of the requests, no detail: "collapsed" misses shared somebody else's upstream call, "refresh"
# misses were asked for by the client, "shadow" misses were only looked up ("shadow.exact" of them
# would have been exact hits), "stored" had an answer good enough to keep; "unstored" of those did
# not reach the store.
# With a detail: "discard" (why an answer was not stored), "veto" (the guard that objected),
# "audit" ("right" or "wrong"), "prices" (the price data in force; its value says nothing),
# "label.<source>" (right or wrong, hundredth of the score, encoder), "tightened" (to which
# hundredth wrong hits raised a threshold).
# "compared" are misses that had a predecessor of the same tenant and model; "churned" counts, by
# request field, those in which that field differed from the predecessor's.

# Of the way upstream. "attempt" counts every call made, with detail "<provider>.<why>": "first",
# "retry" or "fallback". By provider: "shed" (requests turned away unsent), "fell" (requests that it
# answered in another's stead) and, for named ones, "routed" ("<provider>.<kind of request>").
# By class and its target in milliseconds ("critical.500"), for requests that have a class:
# "class" are the requests, "within" those whose good answer began within the target. "ms.class" and
# "ms.provider" are durations as below, of good answers until they began and of upstream calls.
UNNAMED = "upstream"  # the one provider, when the configuration names none

# Tokens and money, each purse with the counters "<purse>.in", ".out" (tokens), ".nano" (dollars),
# ".unpriced" (calls whose price or usage is unknown) and ".unpriced_tokens". Their details: saved:
# "exact", "semantic", "collapsed"; spent: the kind of request; upstream: the purpose of a call that
# is no request (audit, probe, revalidation).
PURSES = ("saved", "spent", "upstream")
# The last two again, by named provider: never to be added to them.
PROVIDERS_PURSE = "provider"

# Durations: "ms.<timer>" by bucket, and "us.<timer>", their sum in microseconds. A bucket's detail
# is its number, after the tier and a dot where there is one ("exact.210").
TIMERS = ("hit", "miss", "upstream", "first_token", "encode")

# Neighbouring bucket bounds are 5 % apart: the middle is at most 2.5 % away from anything inside.
LOWEST_MS = 0.001
LAST_BUCKET = 472  # from 1 us to 2.8 hours
STEP = 1.05
_PER_STEP = 1 / math.log(STEP)

# I7. Per process and hour; what is beyond counts as "other".
MAX_MODELS = 200
MAX_TENANTS = 500
MAX_PAIRS = 2000  # of a model and a tenant
MAX_TIMED_MODELS = 50  # a model's histograms are some hundred fields
TENANT_CHARS = 12

_LABEL = re.compile(r"[\w.:/@+\-]{1,80}", re.ASCII)


class Field(NamedTuple):
    """A stored field without its process."""

    counter: str
    model: str
    tenant: str
    detail: str


class Names(dict[str, str]):
    """detail -> "counter SEP detail", made once each; beyond `cap` details it is "other".

    A dict, so that the usual case costs one look-up; the cap holds when a detail turns out not to
    come from a closed set after all.
    """

    def __init__(self, counter: str, cap: int = 64) -> None:
        super().__init__()
        self._counter = counter
        self._cap = cap

    def __missing__(self, detail: str) -> str:
        if len(self) >= self._cap or label(detail) != detail:
            return f"{self._counter}{SEP}{OTHER}"
        name = self[detail] = f"{self._counter}{SEP}{detail}"
        return name


class Row:
    """Counts of one model and tenant in one hour, and which of them are not written yet."""

    __slots__ = ("changed", "counts", "model", "tenant")

    def __init__(self, model: str, tenant: str) -> None:
        self.model = model
        self.tenant = tenant
        self.counts: dict[str, int] = {}
        self.changed: set[str] = set()

    def add(self, name: str, n: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + n
        self.changed.add(name)

    def fields(self, process: str, *, everything: bool) -> Iterator[tuple[str, int]]:
        for name in self.counts if everything else self.changed:
            yield field_of(process, self.model, self.tenant, name), self.counts[name]


class Hour:
    """The rows of one hour, capped."""

    def __init__(self, number: int, process: str) -> None:
        self.number = number
        self.process = process
        self.rows: dict[tuple[str, str], Row] = {}
        self.timers: dict[str, Row] = {}
        self._models: set[str] = set()
        self._tenants: set[str] = set()
        self._seen: dict[tuple[str, str], tuple[Row, Row]] = {}

    def find(self, model: str, tenant: str) -> tuple[Row, Row]:
        """The rows that count this model and tenant, and this model's durations."""
        key = (model, tenant)
        return self._seen.get(key) or self._place(key)

    def _place(self, key: tuple[str, str]) -> tuple[Row, Row]:
        model = _capped(self._models, label(key[0]), MAX_MODELS)
        tenant = _capped(self._tenants, label(key[1])[:TENANT_CHARS], MAX_TENANTS)
        if (model, tenant) not in self.rows and len(self.rows) >= MAX_PAIRS:
            model = tenant = OTHER
        timed = model if model in self.timers or len(self.timers) < MAX_TIMED_MODELS else OTHER
        row = self.rows.setdefault((model, tenant), Row(model, tenant))
        timer = self.timers.setdefault(timed, Row(timed, ""))
        if len(self._seen) < MAX_PAIRS and len(key[0]) + len(key[1]) < 400:  # both are a caller's
            self._seen[key] = (row, timer)
        return row, timer

    def all_rows(self) -> Iterator[Row]:
        yield from self.rows.values()
        yield from self.timers.values()

    def fields(self, *, everything: bool) -> dict[str, int]:
        return {
            field: value
            for row in self.all_rows()
            for field, value in row.fields(self.process, everything=everything)
        }

    def take(self, size: int, *, everything: bool) -> Iterator[dict[str, int]]:
        """The fields in parts of about `size`; what was handed out no longer counts as changed.

        Lazily, so that a caller may wait between parts while counting goes on.
        """
        part: dict[str, int] = {}
        for row in list(self.all_rows()):
            part.update(row.fields(self.process, everything=everything))
            row.changed.clear()
            if len(part) >= size:
                yield part
                part = {}
        if part:
            yield part

    @property
    def settled(self) -> bool:
        return not any(row.changed for row in self.all_rows())


def label(text: str) -> str:
    """`text` if it is short and plain enough to be a label or part of a key, else "other"."""
    return text if not text or _LABEL.fullmatch(text) else OTHER


def field_of(process: str, model: str, tenant: str, name: str) -> str:
    """The stored field; `name` is "counter SEP detail"."""
    counter, _, detail = name.partition(SEP)
    return SEP.join((process, counter, model, tenant, detail))


def parse_field(field: str) -> Field | None:
    """The inverse of `field_of`, less the process; None for what is no field of ours."""
    parts = field.split(SEP)
    return Field(*parts[1:]) if len(parts) == 5 else None


def bucket_of(ms: float) -> int:
    """The bucket of a duration in milliseconds; nonsense (negative, NaN) goes to the first."""
    if not ms > LOWEST_MS:
        return 0
    if ms > 1e7:
        return LAST_BUCKET
    return int(math.log(ms / LOWEST_MS) * _PER_STEP)


def bucket_value(bucket: int) -> float:
    """Milliseconds in the (geometric) middle of a bucket."""
    return float(LOWEST_MS * STEP ** (bucket + 0.5))


def bucket_top(bucket: int) -> float:
    """Milliseconds at the upper bound of a bucket."""
    return float(LOWEST_MS * STEP ** (bucket + 1))


def _capped(known: set[str], name: str, cap: int) -> str:
    if name not in known:
        if len(known) >= cap:
            return OTHER
        known.add(name)
    return name
