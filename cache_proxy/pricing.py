"""What a number of tokens costs: usage + model + provider -> nano-dollars, or "unknown".

Plain arithmetic over tables it is given: no network, no logging, and no clock but the one handed in
(some prices begin on a date or hold at some hours). Never guesses: a price that nobody published is
None, so that savings are never invented. Money is whole nano-dollars; nothing here is a float.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fnmatch import fnmatchcase
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any, NamedTuple

from .errors import ConfigError
from .model import Usage

if TYPE_CHECKING:
    from genai_prices.data_snapshot import DataSnapshot
    from genai_prices.types import ModelInfo, ModelPrice, Provider

__all__ = ["Override", "PriceBook", "Rates", "parse_prices", "shipped_prices"]

# Rates are whole femto-dollars a token: one dollar per million tokens is 10^9 of them, so published
# prices stay exact down to a billionth of a dollar per million tokens.
FEMTO_PER_MTOK_DOLLAR = 10**9
FEMTO_PER_NANO = 10**6
MAX_TOKENS = 2**63  # longer than any input: a price without steps
LONGEST_NAME = 200  # characters; a longer one is nobody's model, and would cost time and memory
MAX_REMEMBERED = 4096  # (model, provider) pairs; model names come from clients
# Announced prices begin one by one; a day on which this many begin is a refresh of the data itself.
REFRESH = 10
FIELDS = frozenset(
    {"model", "provider", "input", "cached_input", "output", "currency", "usd", "date", "source"}
)
# "deepseek-r1:7b" is a local copy, not what a provider sells under the name before the colon.
LOCAL_TAG = re.compile(r":(latest$|\d+(\.\d+)?[bm]\b)", re.IGNORECASE)


class Rates(NamedTuple):
    """Femto-dollars a token. None: nobody said."""

    input: int | None
    cached: int | None  # None: as `input`
    output: int | None


class _Base(NamedTuple):
    """Published rates, and the longest input, in tokens, for which they hold."""

    rates: Rates
    longest: int


@dataclass(frozen=True, slots=True)
class Override:
    """One `[[price]]` table: a price that goes before the published ones."""

    model: str  # glob
    provider: str  # glob over the base URL
    rates: Rates
    date: str  # ISO 8601, or ""
    source: str

    def matches(self, model: str, provider_url: str) -> bool:
        return fnmatchcase(model.lower(), self.model.lower()) and fnmatchcase(
            provider_url.lower(), self.provider.lower()
        )


class PriceBook:
    """The prices in force, for one process.

    Call `warm` in a thread at start: the price data takes some 0.3 to 0.7 s to import, and the
    first `cost` that no override answers pays for it otherwise.
    """

    def __init__(self, *, overrides: Sequence[Override], clock: Callable[[], float]) -> None:
        self._overrides = tuple(overrides)
        self._clock = clock
        self._snapshot: DataSnapshot | None = None
        self._found: dict[tuple[str, str], Rates | tuple[Provider, ModelInfo] | None] = {}
        self._base: dict[int, _Base | None] = {}  # by id: the snapshot keeps its prices alive
        self._as_of: str | None = None

    def cost(self, usage: Usage, model: str, provider_url: str) -> int | None:
        """Nano-dollars for `usage`, rounded half up; None when the price is not known."""
        if len(model) > LONGEST_NAME:
            return None
        key = (model, provider_url)
        try:
            found = self._found[key]
        except KeyError:
            found = self._remember(key)
        if found is None:
            return None
        if isinstance(found, Rates):
            return _amount(found, usage)
        provider, info = found
        return self._published(usage, provider, info)

    @property
    def as_of(self) -> str | None:
        """The day of the data, its package, and the newest day of the prices that go before it:
        "2026-11-09 genai-prices 0.2.3, overrides of 2026-11-21". None until warm."""
        return self._as_of

    def warm(self) -> None:
        """Import the price data. Safe in any thread, and idempotent."""
        if self._snapshot is None:
            from genai_prices.data_snapshot import get_snapshot

            snapshot = get_snapshot()
            day = _data_day(snapshot, self._now().date())
            name = f"genai-prices {version('genai-prices')}"
            if newest := max((override.date for override in self._overrides), default=""):
                name += f", overrides of {newest}"
            self._as_of = f"{day} {name}" if day else name
            self._snapshot = snapshot

    def _now(self) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self._clock(), datetime.UTC)

    def _remember(self, key: tuple[str, str]) -> Rates | tuple[Provider, ModelInfo] | None:
        if len(self._found) >= MAX_REMEMBERED:
            self._found.clear()
        found = self._found[key] = self._find(*key)
        return found

    def _find(self, model: str, url: str) -> Rates | tuple[Provider, ModelInfo] | None:
        for override in self._overrides:
            if override.matches(model, url):
                return override.rates
        self.warm()
        if self._snapshot is None:  # pragma: no cover - warm() has just set it
            return None
        # Not the snapshot's own look-up: it remembers every name it is asked for, without bound.
        providers = self._snapshot.providers
        at_url = [p for p in providers if re.match(p.api_pattern, url)]
        for provider in at_url or _sellers(providers, model):
            info = provider.find_model(model, all_providers=providers)
            if info is not None:
                return provider, info
        return None

    def _published(self, usage: Usage, provider: Provider, info: ModelInfo) -> int | None:
        now = self._now()
        price = info.get_prices(now)
        key = id(price)
        if key not in self._base:
            self._base[key] = _base(price)
        base = self._base[key]
        if base is not None and usage.input <= base.longest:
            return _amount(base.rates, usage)
        from genai_prices import Usage as Bill

        # Steps by length or extra units: their own arithmetic, 170 us instead of 2.
        bill = Bill(
            input_tokens=usage.input,
            output_tokens=usage.output,
            cache_read_tokens=min(usage.cached, usage.input),
            output_reasoning_tokens=min(usage.reasoning, usage.output),
        )
        dollars = info.calc_price(bill, provider, genai_request_timestamp=now).total_price
        return _nano(int(dollars * 10**15))


def parse_prices(text: str) -> tuple[Override, ...]:
    """The `[[price]]` tables of a TOML text, in order. ConfigError names entry and field."""
    try:
        document = tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"prices: not valid TOML ({error})") from error
    entries = document.get("price", [])
    if not isinstance(entries, list) or set(document) - {"price"}:
        raise ConfigError("prices: expected nothing but [[price]] tables")
    return tuple(_override(number, entry) for number, entry in enumerate(entries, 1))


def shipped_prices() -> tuple[Override, ...]:
    """The table that comes with this package (`prices.toml`)."""
    return parse_prices(files(__package__).joinpath("prices.toml").read_text(encoding="utf-8"))


def _override(number: int, entry: Mapping[str, Any]) -> Override:
    where = f"prices: entry {number}"
    if not isinstance(entry, dict) or not isinstance(entry.get("model"), str):
        raise ConfigError(f"{where} needs a model, a name or a glob")
    if unknown := sorted(set(entry) - FIELDS):
        raise ConfigError(f"{where} ({entry['model']}) has an unknown field {unknown[0]!r}")
    if "input" not in entry:
        raise ConfigError(f"{where} ({entry['model']}) needs input, a price per million tokens")
    if entry.get("currency", "USD") != "USD" and "usd" not in entry:
        raise ConfigError(f"{where} ({entry['model']}) needs usd, the dollars for one unit")
    unit = _decimal(where, "usd", entry.get("usd", 1))
    rates = (_rate(where, name, entry, unit) for name in ("input", "cached_input", "output"))
    return Override(
        model=entry["model"],
        provider=str(entry.get("provider", "*")),
        rates=Rates(*rates),
        date=_date(where, entry.get("date", "")),
        source=str(entry.get("source", "")),
    )


def _date(where: str, value: object) -> str:
    """ISO 8601; "" when nobody said."""
    if value == "":
        return ""
    try:
        return datetime.date.fromisoformat(str(value)).isoformat()
    except ValueError:
        raise ConfigError(f"{where}: date must be a day, as 2026-01-31") from None


def _rate(where: str, name: str, entry: Mapping[str, Any], unit: Decimal) -> int | None:
    if name not in entry:
        return None
    return int(_decimal(where, name, entry[name]) * unit * FEMTO_PER_MTOK_DOLLAR)


def _decimal(where: str, name: str, value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | Decimal):
        raise ConfigError(f"{where}: {name} must be a number")
    amount = Decimal(value)
    if not amount.is_finite() or amount < 0:
        raise ConfigError(f"{where}: {name} must be zero or more")
    return amount


def _amount(rates: Rates, usage: Usage) -> int | None:
    """Exact: whole femto-dollars, rounded once."""
    if rates.input is None or (rates.output is None and usage.output > 0):
        return None
    cached = max(0, min(usage.cached, usage.input))
    femto = max(0, usage.input - cached) * rates.input
    femto += cached * (rates.input if rates.cached is None else rates.cached)
    femto += max(0, usage.output) * (rates.output or 0)
    return _nano(femto)


def _nano(femto: int) -> int:
    return (femto + FEMTO_PER_NANO // 2) // FEMTO_PER_NANO


def _base(price: ModelPrice) -> _Base | None:
    """The three plain rates and how far they hold; None when another unit has a say."""
    if price.output_reasoning_mtok is not None:
        return None
    plain = []
    longest = MAX_TOKENS
    for name in ("input_mtok", "cache_read_mtok", "output_mtok"):
        rate = getattr(price, name)
        if rate is not None and not isinstance(rate, Decimal):
            longest = min(longest, *(tier.start for tier in rate.tiers))
            rate = rate.base
        plain.append(None if rate is None else int(rate * FEMTO_PER_MTOK_DOLLAR))
    return _Base(Rates(*plain), longest)


def _sellers(providers: Sequence[Provider], model: str) -> Iterator[Provider]:
    """Who sells a model of this name, for base URLs that nobody in the data owns (a gateway)."""
    if not LOCAL_TAG.search(model):
        for provider in providers:
            if provider.model_match is not None and provider.model_match.is_match(model.lower()):
                yield provider
                return


def _data_day(snapshot: DataSnapshot, today: datetime.date) -> str | None:
    """The snapshot carries no date; the newest day on which many prices changed is it."""
    starts = Counter(
        conditional.constraint.start_date
        for provider in snapshot.providers
        for model in provider.models
        if isinstance(model.prices, list)
        for conditional in model.prices
        if conditional.constraint is not None and hasattr(conditional.constraint, "start_date")
    )
    days = [day for day, begun in starts.items() if begun >= REFRESH and day <= today]
    return max(days).isoformat() if days else None
