"""The bench's figures: whose turn it is, percentiles, rates, money, and what it says of nothing."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from cache_proxy.bench import (
    Arm,
    Measured,
    Plan,
    Shot,
    markdown,
    plot,
    report,
    table,
    turns,
)
from cache_proxy.model import Usage
from cache_proxy.pricing import PriceBook, parse_prices

A, B = Arm("gpt-a", "proxy"), Arm("gpt-a", "direct")
PRICES = parse_prices('[[price]]\nmodel = "gpt-a"\ninput = 2.5\noutput = 10\n')


def measured(shots: Sequence[Shot], arms: tuple[Arm, ...] = (A,), stream: bool = False) -> Measured:
    plan = Plan(
        arms=arms,
        bases={"proxy": "http://127.0.0.1:8080/v1", "direct": "https://api.openai.com/v1"},
        requests=100,
        concurrency=4,
        prompt_tokens=500,
        max_tokens=64,
        stream=stream,
        cached=False,
    )
    return Measured(plan, shots, began=0.0, seconds=1.0, interrupted=False)


def told(of: Measured) -> list[dict[str, object]]:
    book = PriceBook(overrides=PRICES, clock=time.time)
    arms: list[dict[str, object]] = report(of, book, "https://api.openai.com/v1")["arms"]
    return arms


def shown(renderable: Table) -> str:
    screen = Console(width=240, record=True, file=io.StringIO())
    screen.print(renderable)
    return screen.export_text()


def good(seconds: float, arm: Arm = A, **more: object) -> Shot:
    return Shot(arm, seconds, seconds, **more)  # type: ignore[arg-type]


def test_arms_take_turns_and_each_has_all_of_its_requests() -> None:
    """Never more than one turn of the same arm in a row, but where two rounds meet."""
    order = list(turns([A, B], 10, 3))
    assert (order.count(A), order.count(B)) == (10, 10)
    assert order[:12] == [A] * 3 + [B] * 6 + [A] * 3
    assert list(turns([A], 5, 2)) == [A] * 5
    assert list(turns([], 5, 2)) == []
    for first, after in pairwise([order[n : n + 6] for n in range(0, 18, 6)]):
        assert set(first) == set(after) == {A, B}


def test_percentiles_are_times_that_were_measured() -> None:
    """Nearest rank, as wrk has it: of 100 times the 99th is P99, of one it is that one."""
    times = [(n + 1) / 1_000 for n in range(100)]
    (arm,) = told(measured([good(each) for each in reversed(times)]))
    assert arm["ms"] == {"mean": 50.5, "p50": 50.0, "p95": 95.0, "p99": 99.0}
    (arm,) = told(measured([good(each) for each in (0.001, 0.002, 0.003)]))
    assert arm["ms"] == {"mean": 2.0, "p50": 2.0, "p95": 3.0, "p99": 3.0}
    (arm,) = told(measured([good(0.007)]))
    assert arm["ms"] == {"mean": 7.0, "p50": 7.0, "p95": 7.0, "p99": 7.0}


def test_failures_count_in_the_rates_and_not_in_the_times() -> None:
    """Four workers, each five times busy for 200 ms, get through 20 answers a second; quick
    refusals make no time look shorter."""
    shots = [good(0.2) for _ in range(20)] + [Shot(A, 0.0, 0.0, "429") for _ in range(20)]
    (arm,) = told(measured(shots))
    assert (arm["requests"], arm["good"], arm["error_rate"]) == (40, 20, 0.5)
    assert arm["errors"] == {"429": 20}
    assert arm["ms"] == {"mean": 200.0, "p50": 200.0, "p95": 200.0, "p99": 200.0}
    assert arm["requests_per_second"] == 20.0


def test_money_is_that_of_the_answers_that_were_paid_for() -> None:
    """A hit costs nothing; an answer without usage has an unknown price, and is said to."""
    usage = Usage(input=1_000, output=100)
    shots = [good(1, usage=usage), good(1, usage=usage, hit=True), good(1)]
    (arm,) = told(measured(shots))
    assert arm["usd"] == pytest.approx(0.0035)
    assert arm["usd_per_mtok"] == {"input": 2.5, "output": 10.0}
    assert (arm["hits"], arm["price_unknown"]) == (1, 1)
    (arm,) = told(measured([good(1, usage=usage, hit=True)]))
    assert arm["usd"] == 0


@pytest.mark.parametrize("shots", [[], [Shot(A, 0.0, 0.0, "no_answer")]], ids=["none", "failed"])
@pytest.mark.parametrize("stream", [False, True])
def test_without_one_success_it_says_so(shots: list[Shot], stream: bool, tmp_path: Path) -> None:
    """No division by zero, no made-up nought: null in JSON, words in the tables, a plot all the
    same."""
    of = measured(shots, stream=stream)
    (arm,) = told(of)
    assert arm["ms"] == dict.fromkeys(("mean", "p50", "p95", "p99"))
    assert arm["requests_per_second"] is None
    assert arm["usd"] is None
    assert arm["error_rate"] == (1.0 if shots else None)
    document = report(of, PriceBook(overrides=PRICES, clock=time.time), "")
    assert "no data" in markdown(document)
    assert "no data" in shown(table(document))
    plot(of, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_tables_name_every_arm_and_every_error() -> None:
    shots = [good(0.1), good(0.2, B, first=0.05), Shot(B, 0, 0, "429"), Shot(B, 0, 0, "503")]
    document = report(
        measured(shots, (A, B, Arm("unheard-of", "direct")), stream=True),
        PriceBook(overrides=PRICES, clock=time.time),
        "",
    )
    lines = markdown(document).splitlines()
    assert lines[0] == "100 streams of each, 4 at a time, prompts of about 500 tokens"
    assert len({line.count("|") for line in lines[2:]}) == 1
    assert lines[4].startswith("| gpt-a | proxy | 1 | 0.0% | 100.0 | 100.0 ")
    assert "66.7% (1 x 429, 1 x 503)" in lines[5]
    assert "50.0" in lines[5]
    assert "unknown" in lines[6]
    for text in ("gpt-a", "proxy", "direct", "unheard-of", "TTFT P50", "req/s"):
        assert text in shown(table(document))
