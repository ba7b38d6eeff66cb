"""The benchmark of thresholds, and the notebook that shows it: run for real, on a small size."""

from __future__ import annotations

import csv
import itertools
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks.hit_rate import (
    OWN_STREAM,
    Line,
    Row,
    default_stream,
    measure,
    plot,
    read_stream,
    table,
)

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


def row(threshold: float = 0.92, **changes: float) -> Row:
    counted = {"requests": 100, "exact": 20, "semantic": 30, "wrong": 5, "bypasses": 1, "vetoes": 4}
    money = {"tokens_saved": 9_000, "usd_saved": 0.5, "usd_spent": 1.5, "seconds": 2.0}
    return Row(threshold=threshold, **(counted | money | changes))  # type: ignore[arg-type]


def test_the_own_stream_holds_repeats_paraphrases_and_traps() -> None:
    """At least 120 lines; words repeated, answers shared by other words, and answers of one."""
    lines = read_stream(OWN_STREAM)
    texts = {line.text for line in lines}
    phrasings = [len(list(group)) for _, group in _by_answer(set(lines))]
    assert len(lines) >= 120
    assert len(lines) - len(texts) >= 30
    assert sum(n > 1 for n in phrasings) >= 20
    assert sum(n == 1 for n in phrasings) >= 20


def test_a_stream_that_wants_two_answers_to_one_prompt_is_refused(tmp_path: Path) -> None:
    """Upstream could not give both, and a hit would count as wrong that is not."""
    stream = tmp_path / "stream.jsonl"
    stream.write_text('{"text": "a", "answer_id": "1"}\n{"text": "a", "answer_id": "2"}\n')
    with pytest.raises(ValueError, match="two answers"):
        read_stream(stream)


def test_a_csv_comes_in_the_same_shuffled_order_every_time(tmp_path: Path) -> None:
    """Sorted by intent, a stream would ask all paraphrases in a row."""
    path = tmp_path / "train.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *((f"t{n}", str(n)) for n in range(50))])
    lines = read_stream(path, 20)
    assert lines == read_stream(path, 20)
    assert len(lines) == 20
    assert lines != [Line(f"t{n}", str(n)) for n in range(20)]
    assert all(line.text == f"t{line.answer_id}" for line in lines)


def test_shares_are_of_the_requests_the_hits_and_the_bill() -> None:
    """Hit rate of all requests, wrong share of the hits, savings of the bill without a cache."""
    found = row()
    assert (found.hit_rate, found.wrong_share, found.bill_saved) == (0.5, 0.1, 0.25)
    low, high = found.wrong_interval
    assert 0 < low < 0.1 < high < 1


def test_nothing_hit_is_no_division_by_zero() -> None:
    """No hits: no wrong share, and nothing known about it."""
    found = row(exact=0, semantic=0, wrong=0, usd_saved=0.0, usd_spent=0.0)
    assert (found.wrong_share, found.bill_saved, found.wrong_interval) == (0.0, 0.0, (0.0, 1.0))
    assert " 0.0% (0.0% to 100.0%)" in table([found])


def test_the_plot_shows_hit_rate_wrong_share_and_savings() -> None:
    """One line each, over the thresholds, in per cent."""
    (axes,) = plot([row(0.8), row(0.9, wrong=0)]).axes
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.get_lines()}
    assert drawn == {
        "hit rate": [50, 50],
        "share of the bill saved": [25, 25],
        "wrong share of the hits": [10, 0],
    }


@pytest.mark.live
async def test_a_replay_counts_as_cache_stats_does_and_guards_take_out_the_wrong_hits() -> None:
    """The real sidecar: every request counted (I12); with cosine alone the traps are served."""
    lines = read_stream(OWN_STREAM, 100)
    (guarded,) = await measure(lines, [0.9])
    (bare,) = await measure(lines, [0.9], guards=False)
    assert guarded.requests == bare.requests == len(lines)
    assert guarded.semantic > 0
    assert guarded.wrong == 0
    assert guarded.vetoes > 0
    assert bare.wrong > 0
    assert bare.vetoes == 0
    assert 0 < guarded.usd_saved < guarded.usd_saved + guarded.usd_spent
    assert abs(guarded.bill_saved - guarded.hit_rate) < 0.02  # answers of one price


@pytest.mark.live
def test_the_notebook_runs_and_shows_tables_and_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Executed as it stands, in its own folder, with a small size set from outside."""
    monkeypatch.setenv("HIT_RATE_STREAM", str(default_stream()))
    monkeypatch.setenv("HIT_RATE_LIMIT", "60")
    monkeypatch.setenv("HIT_RATE_THRESHOLDS", "0.8 0.92")
    notebook = nbformat.read(FOLDER / "hit_rate.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = list(itertools.chain.from_iterable(c.get("outputs", []) for c in notebook.cells))
    printed = "".join(output.get("text", "") for output in outputs)
    drawn = [o for o in outputs if "image/png" in o.get("data", {})]
    assert [line.split()[0] for line in printed.splitlines()] == ["threshold", "0.80", "0.92"] * 2
    assert len(drawn) == 2


def test_the_notebook_is_kept_without_outputs_and_without_logic() -> None:
    """Thin: what it does is in the module, what it showed is made again."""
    notebook = nbformat.read(FOLDER / "hit_rate.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 20
    assert not any(word in cell.source for cell in cells for word in ("def ", "class ", "for row"))


def _by_answer(lines: set[Line]) -> itertools.groupby[str, Line]:
    def answer(line: Line) -> str:
        return line.answer_id

    return itertools.groupby(sorted(lines, key=answer), answer)
