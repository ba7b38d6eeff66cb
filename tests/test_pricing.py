"""Money is exact, published or unknown; it is never guessed."""

from __future__ import annotations

import datetime
import sys
import textwrap
import time
from decimal import Decimal
from subprocess import run

import pytest

from cache_proxy.errors import ConfigError
from cache_proxy.model import Usage
from cache_proxy.pricing import MAX_REMEMBERED, PriceBook, Rates, parse_prices, shipped_prices

NOW = datetime.datetime(2026, 11, 21, 12, tzinfo=datetime.UTC).timestamp()
OPENAI = "https://api.openai.com/v1"
CLAUDE = "https://api.anthropic.com/v1"
QWEN = "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"


@pytest.fixture(scope="module")
def book() -> PriceBook:
    return PriceBook(overrides=shipped_prices(), clock=lambda: NOW)


def with_prices(text: str) -> PriceBook:
    return PriceBook(overrides=parse_prices(textwrap.dedent(text)), clock=lambda: NOW)


@pytest.mark.parametrize(
    ("model", "url", "usage", "nano"),
    [
        ("gpt-4.1", OPENAI, Usage(input=1000, output=100), 2_800_000),
        ("gpt-4.1", OPENAI, Usage(input=1000, output=100, cached=200), 2_500_000),
        ("gpt-4.1-2025-04-14", OPENAI, Usage(input=1000, output=100), 2_800_000),
        ("gpt-4.1", "http://127.0.0.1:9/v1", Usage(input=1000, output=100), 2_800_000),
        ("claude-sonnet-4-5", CLAUDE, Usage(input=1000, output=100, cached=200), 3_960_000),
        ("claude-sonnet-4-5", CLAUDE, Usage(input=200_000), 600_000_000),
        ("claude-sonnet-4-5", CLAUDE, Usage(input=200_001), 1_200_006_000),  # the long-input step
        ("text-embedding-3-small", OPENAI, Usage(input=1), 20),
        ("qwen-max", QWEN, Usage(input=1000, output=100), 2_240_000),
        ("qwen3.8-max", QWEN, Usage(input=1000, output=100, cached=1000), 850_000),
        ("gpt-4.1", OPENAI, Usage(), 0),
    ],
)
def test_a_published_price_is_charged_exactly(
    book: PriceBook, model: str, url: str, usage: Usage, nano: int
) -> None:
    """Whole nano-dollars, cached input at its own price, steps by length where there are any."""
    assert book.cost(usage, model, url) == nano


@pytest.mark.parametrize(
    ("model", "url"),
    [
        ("no-such-model", OPENAI),
        ("no-such-model", "http://127.0.0.1:9"),
        ("", ""),
        ("qwen-plus", QWEN),  # thinking tokens cost another price there
        ("qwen3.8-max-prime", QWEN),  # twice its cheaper namesake: names are not prefixes
        ("qwen-max", "https://dashscope.aliyuncs.com/compatible-mode/v1"),  # another currency
        ("deepseek-r1:7b", "http://localhost:11434/v1"),  # a local copy
    ],
)
def test_an_unknown_price_stays_unknown(book: PriceBook, model: str, url: str) -> None:
    """No price is made up from a similar name, another provider or another region."""
    assert book.cost(Usage(input=1000, output=100), model, url) is None


def test_output_without_an_output_price_is_unknown(book: PriceBook) -> None:
    """An embedding model's price says nothing about output tokens."""
    assert book.cost(Usage(input=1, output=1), "text-embedding-3-small", OPENAI) is None


def test_the_operators_prices_win() -> None:
    """First match in order, globs over model and base URL, other currencies at the given rate."""
    book = with_prices("""
        [[price]]
        model = "gpt-4.1*"
        provider = "https://gateway.example/*"
        input = 1
        cached_input = 0.1
        output = 3.5
        [[price]]
        model = "haus-*"
        input = 10
        output = 20
        currency = "CNY"
        usd = 0.14
        date = 2026-11-01
        source = "contract"
        """)
    bill = Usage(input=1000, output=100, cached=100)
    assert book.cost(bill, "GPT-4.1-mini", "https://gateway.example/v1") == 1_260_000
    assert book.cost(bill, "haus-1", "http://anywhere") == 1_680_000
    assert book.cost(bill, "gpt-4.1", OPENAI) == 2_650_000


def test_rounding_happens_once_and_half_goes_up() -> None:
    """0.0005 dollars per million tokens is half a nano-dollar a token."""
    book = with_prices('[[price]]\nmodel = "*"\ninput = 0.0005')
    costs = [book.cost(Usage(input=n), "m", "u") for n in (0, 1, 2, 3, 1_000_001)]
    assert costs == [0, 1, 1, 2, 500_001]


def test_a_model_of_ones_own_can_cost_nothing() -> None:
    """Zero is a known price; it is not the same as unknown."""
    book = with_prices(
        '[[price]]\nmodel = "*"\nprovider = "http://localhost*"\ninput = 0\noutput = 0'
    )
    assert book.cost(Usage(input=5, output=5), "gpt-4.1", "http://localhost:11434/v1") == 0


@pytest.mark.parametrize(
    "text",
    [
        "price = 3",
        "[[price]]\ninput = 1",
        '[[price]]\nmodel = "m"',
        '[[price]]\nmodel = "m"\ninput = -1',
        '[[price]]\nmodel = "m"\ninput = nan',
        '[[price]]\nmodel = "m"\ninput = true',
        '[[price]]\nmodel = "m"\ninput = "1"',
        '[[price]]\nmodel = "m"\ninput = 1\ncurrency = "CNY"',
        '[[price]]\nmodel = "m"\ninput = 1\noutptu = 2',
        '[[price]]\nmodel = "m"\ninput = 1\ndate = "last week"',
        '[[price]]\nmodel = "m"\ninput = 1\ndate = 2026-11-01T00:00:00',
        '[prices]\nmodel = "m"',
        "not toml",
    ],
)
def test_a_wrong_price_file_is_refused(text: str) -> None:
    """A typo must stop the start; silently ignored prices would be wrong money."""
    with pytest.raises(ConfigError, match="prices"):
        parse_prices(text)


def test_decimals_are_read_as_written() -> None:
    """0.1 and 0.3 are not binary floats on their way to money."""
    (override,) = parse_prices('[[price]]\nmodel = "m"\ninput = 0.1\noutput = 0.3')
    assert override.rates == Rates(100_000_000, None, 300_000_000)


def test_the_shipped_table_names_its_sources() -> None:
    """Each shipped price says where it is from and when somebody looked."""
    assert all(price.date and price.source for price in shipped_prices())


def test_the_data_has_a_date(book: PriceBook) -> None:
    """Known once warm, never in the future, with the version of its package."""
    cold = PriceBook(overrides=(), clock=lambda: NOW)
    assert cold.as_of is None
    book.warm()
    assert book.as_of is not None
    day, name = book.as_of.split(" ", 1)
    assert (
        datetime.date(2026, 1, 1) < datetime.date.fromisoformat(day) <= datetime.date(2026, 11, 21)
    )
    assert name.startswith("genai-prices ")


def test_the_prices_of_ones_own_have_a_date_too() -> None:
    """The newest of them, written as a date or as a text; none is said where none is known."""
    entry = '[[price]]\nmodel = "m"\ninput = 1\n'
    dated = with_prices(f"{entry}date = 2026-10-31\n{entry}date = '2026-11-20'\n{entry}")
    undated = with_prices(entry)
    for book in (dated, undated):
        book.warm()
    assert dated.as_of is not None
    assert undated.as_of is not None
    assert dated.as_of == f"{undated.as_of}, overrides of 2026-11-20"


def test_prices_follow_the_clock_that_is_handed_in() -> None:
    """A price that began on a date holds from that date on."""
    before = PriceBook(overrides=(), clock=lambda: NOW - 3 * 365 * 86_400)
    after = PriceBook(overrides=(), clock=lambda: NOW)
    bill = Usage(input=1_000_000)
    old, new = (each.cost(bill, "o3", OPENAI) for each in (before, after))
    assert old == 10_000_000_000
    assert new is not None
    assert new < old


def test_strange_model_names_do_not_pile_up() -> None:
    """I7: what is remembered by name is bounded."""
    book = with_prices('[[price]]\nmodel = "*"\ninput = 1')
    for n in range(MAX_REMEMBERED + 100):
        assert book.cost(Usage(input=1), f"m{n}", "u") == 1000
    assert len(book._found) <= MAX_REMEMBERED


def test_a_name_that_is_no_models_costs_no_time(book: PriceBook) -> None:
    """I7, I11: names come from clients, of any length."""
    began = time.process_time()
    assert book.cost(Usage(input=1), "gpt-4.1" + "x" * 1_000_000, OPENAI) is None
    assert time.process_time() - began < 0.1


def test_agrees_with_the_library_it_wraps(book: PriceBook) -> None:
    """Our arithmetic and theirs are the same for plain prices."""
    from genai_prices import Usage as Bill
    from genai_prices import calc_price

    bill = Usage(input=12_345, output=678, cached=910)
    now = datetime.datetime.fromtimestamp(NOW, datetime.UTC)
    for model in ("gpt-4o", "gpt-4o-mini", "gpt-4.1-nano", "o3", "gpt-3.5-turbo"):
        theirs = calc_price(
            Bill(input_tokens=12_345, output_tokens=678, cache_read_tokens=910),
            model,
            provider_api_url=OPENAI,
            genai_request_timestamp=now,
        ).total_price
        ours = book.cost(bill, model, OPENAI)
        assert ours is not None
        assert abs(Decimal(ours) - theirs * 10**9) <= Decimal("0.5")


def test_the_heavy_import_waits_until_it_is_needed() -> None:
    """The price data takes some 0.3 to 0.7 s to import; importing this module does not."""
    code = "import sys, cache_proxy.pricing; sys.exit('genai_prices' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
