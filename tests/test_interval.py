"""The printed wrong-hit rate: its interval covers the true rate as often as it says."""

from __future__ import annotations

import asyncio
import random
import re

import pytest

from cache_proxy.ledger import Ledger
from cache_proxy.stats import as_json, collect
from cache_proxy.stats_table import wrong_rate
from tests.test_stats import NOW, DictStore

_LINE = re.compile(r"wrong-hit rate ([\d.]+) % \(95 %: ([\d.]+) to ([\d.]+) %, ([\d,]+) audited\)")


async def printed(dice: random.Random, true_rate: float, audited: int) -> tuple[float, float]:
    """One life of a sidecar: audits counted, written, collected, put into the line that
    `cache-stats` and `cache-proxy audit` print; its bounds in per cent."""
    store, ledger = DictStore(), Ledger(process="p", clock=lambda: NOW)
    for _ in range(audited):
        ledger.record_label("audit", 0.95, wrong=dice.random() < true_rate, model="m")
    await ledger.flush(store)
    line = wrong_rate(as_json(await collect(store, NOW - 60, NOW))["audits"])
    found = _LINE.fullmatch(line)
    assert found is not None, line
    assert int(found[4].replace(",", "")) == audited
    return float(found[2]), float(found[3])


@pytest.mark.parametrize(("true_rate", "audited"), [(0.004, 500), (0.02, 120), (0.3, 20)])
def test_the_printed_interval_covers_the_true_rate_in_19_of_20_runs(
    true_rate: float, audited: int
) -> None:
    """Read back from the line that people see, rounding included; 250 runs at each rate."""
    dice, runs = random.Random(77), 250

    async def simulate() -> int:
        covered = 0
        for _ in range(runs):
            low, high = await printed(dice, true_rate, audited)
            covered += low <= 100 * true_rate <= high
        return covered

    assert asyncio.run(simulate()) >= 0.95 * runs


def test_the_line_is_worded_as_documented_and_rounds_outwards() -> None:
    """A bound that rounds to less than itself would be a claim."""
    said = {"rate": 0.004, "low": 0.00109, "high": 0.01021, "audited": 500}
    assert wrong_rate(said) == "wrong-hit rate 0.4 % (95 %: 0.1 to 1.1 %, 500 audited)"
    whole = {"rate": 0.03, "low": 0.029, "high": 0.031, "audited": 1_000}
    assert wrong_rate(whole) == "wrong-hit rate 3.0 % (95 %: 2.9 to 3.1 %, 1,000 audited)"
