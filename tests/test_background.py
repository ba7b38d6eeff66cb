"""What a threshold rests on: labels for the packaged model, reports or a background for others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from embeddings import Encoder, load
from embeddings.background import MEASURED, REPORTED, background, rests_on
from embeddings.models import PACKAGED, find

pytestmark = pytest.mark.live


def renamed(name: str, folder: Path) -> Encoder:
    """The packaged model's files as a model that nobody calibrated."""
    shutil.copytree(find(PACKAGED, folder).folder, folder / "model")
    spec = folder / "model/encoder.json"
    spec.write_text(json.dumps(json.loads(spec.read_text("utf-8")) | {"name": name}), "utf-8")
    return load(str(folder / "model"), folder)


def test_an_unknown_encoder_gets_a_threshold_above_its_background(tmp_path: Path) -> None:
    """Of the packaged model it would be near the one that labels gave: 0.92."""
    unknown = renamed("someone/else", tmp_path)
    assert unknown.threshold is None
    assert 0.88 <= background(unknown) <= 0.94
    assert rests_on(unknown).startswith("its background")


@pytest.mark.parametrize("name", sorted(REPORTED))
def test_a_known_encoder_gets_the_reported_one_and_says_whose_word_it_is(
    tmp_path: Path, name: str
) -> None:
    """Wherever it came from; never without a threshold of one's own to serve by."""
    known = renamed(f"somewhere/{name}", tmp_path)
    assert known.threshold is None
    assert background(known) == REPORTED[name][0] >= 0.9
    assert rests_on(known) == f"reported for {name}, not measured here: {REPORTED[name][1]}"


def test_the_packaged_model_rests_on_labels(tmp_path: Path) -> None:
    """And on a command that measures them again."""
    packaged = load(PACKAGED, tmp_path)
    assert packaged.threshold == 0.92
    assert rests_on(packaged) == MEASURED[PACKAGED]
    assert "python -m benchmarks.accuracy" in MEASURED[PACKAGED]
