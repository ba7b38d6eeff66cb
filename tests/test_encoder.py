"""What the encoder promises: unit vectors or an error, honest windows, one fingerprint a model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from embeddings import Encoded, Encoder, EncoderError, load, pack, self_test, unpack
from embeddings.models import PACKAGED, find, fingerprint, read
from embeddings.onnx import groups, open_onnx
from embeddings.vectors import Floats, checked


class Stub:
    """An encoder that answers what it is told to."""

    name = "stub"
    fingerprint = "0" * 16
    dimension = 4
    window = 8
    languages: frozenset[str] | None = None
    threshold: float | None = None
    note = ""

    def __init__(self, answer: Callable[[str], Floats]) -> None:
        self._answer = answer

    def encode(self, texts: Sequence[str]) -> Encoded:
        return Encoded(np.stack([self._answer(t) for t in texts]), (False,) * len(texts))


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    return load(PACKAGED, tmp_path_factory.mktemp("data"))


def unit(*values: float) -> Floats:
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)


@pytest.mark.parametrize(
    "vectors",
    [
        np.full((1, 4), np.nan, dtype=np.float32),
        np.full((1, 4), np.inf, dtype=np.float32),
        np.zeros((1, 4), dtype=np.float32),
        np.ones((1, 4), dtype=np.float32),
        np.array([[0.98, 0, 0, 0]], dtype=np.float32),
        np.array([[1, 0, 0]], dtype=np.float32),
        np.array([[1, 0, 0, 0], [1, 0, 0, 0]], dtype=np.float32),
    ],
    ids=["nan", "infinite", "zero", "long", "short", "narrow", "too many"],
)
def test_a_vector_that_is_not_a_unit_vector_is_refused(vectors: Floats) -> None:
    """A broken vector must never reach a search or the store."""
    with pytest.raises(EncoderError):
        checked(Encoded(vectors, (False,)), 1, 4)


def test_a_truncated_text_needs_no_vector() -> None:
    """Its row is zeros and passes, because nobody may use it."""
    encoded = Encoded(np.stack([np.zeros(4, np.float32), unit(1, 0, 0, 0)]), (True, False))
    assert checked(encoded, 2, 4) is encoded


def test_the_stored_form_survives_a_round_trip() -> None:
    """What the store gives back is bit for bit what the index was given."""
    vector = unit(0.1, -0.2, 0.3, 0.9)
    once = unpack(pack(vector))
    assert len(pack(vector)) == 8
    assert pack(once) == pack(vector)
    np.testing.assert_allclose(once, vector, atol=1e-3)


def test_odd_bytes_are_no_vector() -> None:
    """A value cut short in the store is an error, not a shorter vector."""
    with pytest.raises(ValueError, match="buffer"):
        unpack(b"abc")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda text: unit(1, 1, 1, 1), "same vector"),
        (lambda text: unit(1, 0, 0, len(text) / 1000), "paraphrase|same vector"),
        (lambda text: np.full(4, np.nan, np.float32), "unit length"),
        (lambda text: unit(*np.random.default_rng().standard_normal(4)), "different"),
    ],
    ids=["constant", "nearly constant", "nan", "random"],
)
def test_the_self_test_refuses_what_would_make_everything_hit(
    answer: Callable[[str], Floats], said: str
) -> None:
    """A constant or meaningless encoder is found at start, not by its wrong answers."""
    with pytest.raises(EncoderError, match=said):
        self_test(Stub(answer))


@pytest.mark.parametrize(
    ("lengths", "limit", "expected"),
    [
        ([], 10, []),
        ([0, 0], 10, []),
        ([5], 1, [[0]]),
        ([4, 4, 4], 8, [[0, 1], [2]]),
        ([4, 0, 5], 10, [[2, 0]]),
        ([10, 4], 100, [[0], [1]]),
        ([10, 5], 100, [[0, 1]]),
    ],
)
def test_texts_run_together_only_with_their_likes(
    lengths: list[int], limit: int, expected: list[list[int]]
) -> None:
    """No run is wider than the limit or half padding; a single long text still runs."""
    assert list(groups(lengths, limit)) == expected


def test_equal_models_share_a_fingerprint_and_any_change_breaks_it(tmp_path: Path) -> None:
    """A new model, revision, pooling, prefix, window or weights file starts on empty shelves."""
    spec = read(find(PACKAGED, tmp_path))
    assert spec is not None
    changes = [
        {"name": "other"},
        {"revision": "2"},
        {"weights_sha256": "0"},
        {"tokenizer_sha256": "0"},
        {"pooling": "cls"},
        {"prefix": "query: "},
        {"quantisation": "int8"},
        {"window": 255},
    ]
    prints = [fingerprint(dataclasses.replace(spec, **change)) for change in changes]  # type: ignore[arg-type]
    assert len({fingerprint(spec), *prints}) == len(changes) + 1
    assert fingerprint(dataclasses.replace(spec, folder=tmp_path)) == fingerprint(spec)
    assert all(len(p) == 16 for p in prints)


@pytest.mark.parametrize("spec", ["../../etc/passwd", "a/b/c", "", "-rf", ".hidden", "a b", "a\nb"])
def test_a_name_that_cannot_be_a_model_is_refused(spec: str, tmp_path: Path) -> None:
    """Nothing odd reaches a path, a hub or a command line."""
    with pytest.raises(EncoderError):
        load(spec, tmp_path)


@pytest.mark.parametrize("spec", ["org/model", "org-model", "model"])
def test_a_hub_model_lives_in_one_flat_folder_of_its_own(spec: str, tmp_path: Path) -> None:
    """Two names never share a folder, and none leaves the data folder."""
    folders = {find(s, tmp_path).folder for s in ("org/model", "org-model", "model")}
    assert len(folders) == 3
    assert find(spec, tmp_path).folder.parent == tmp_path.resolve() / "models"


def test_an_exported_file_that_changed_is_refused(tmp_path: Path) -> None:
    """A damaged or swapped file must not serve under the fingerprint of the one it was."""
    for file in ("encoder.json", "tokenizer.json", "model.onnx"):
        shutil.copy(find(PACKAGED, tmp_path).folder / file, tmp_path / file)
    assert read(find(str(tmp_path), tmp_path)) is not None
    with (tmp_path / "model.onnx").open("ab") as model:
        model.write(b"\0")
    with pytest.raises(EncoderError, match=r"model\.onnx"):
        load(str(tmp_path), tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"name": 1}', "\xff"])
def test_a_spec_that_cannot_be_read_is_an_error(text: str, tmp_path: Path) -> None:
    """Half a folder is never taken for a model."""
    (tmp_path / "encoder.json").write_text(text, "latin-1")
    with pytest.raises(EncoderError, match=r"encoder\.json"):
        load(str(tmp_path), tmp_path)


@pytest.mark.live
def test_the_packaged_model_passes_its_own_test(minilm: Encoder) -> None:
    """It is English, calibrated, 384 wide, and close things are close."""
    self_test(minilm)
    assert (minilm.name, minilm.dimension, minilm.window) == (PACKAGED, 384, 256)
    assert (minilm.languages, minilm.threshold, minilm.note) == (frozenset({"en"}), 0.92, "")


@pytest.mark.live
@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("", False),
        ("hello", False),
        ("word " * 254, False),
        ("word " * 255, True),
        ("x " * 3_000, True),
        ("a" * 100_000, True),
        ("What does \N{CRYING FACE} mean?", True),
        ("[SEP] [PAD] [UNK] [MASK]", False),
    ],
    ids=["empty", "word", "full window", "one over", "long", "100 kB", "emoji", "specials"],
)
def test_a_text_the_model_saw_only_in_part_is_said_to_be_truncated(
    minilm: Encoder, text: str, cut: bool
) -> None:
    """Two long texts with one beginning, or two emoji, would otherwise score 1.0."""
    assert minilm.encode([text]).truncated == (cut,)


@pytest.mark.live
def test_company_does_not_change_a_score(minilm: Encoder) -> None:
    """Alone, in a batch, in another order: the same vector up to rounding."""
    texts = [f"{'really ' * (n % 7)}how do I change setting number {n}?" for n in range(24)]
    alone = np.concatenate([minilm.encode([t]).vectors for t in texts])
    together = minilm.encode(texts).vectors
    turned = minilm.encode(texts[::-1]).vectors[::-1]
    for batch in (together, turned):
        assert np.abs((batch @ batch.T) - (alone @ alone.T)).max() < 5e-6


@pytest.mark.live
def test_special_tokens_typed_by_a_user_are_text(minilm: Encoder) -> None:
    """A prompt cannot speak the model's control words."""
    plain, typed = minilm.encode(["what is this", "what is [SEP] [CLS] this"]).vectors
    assert float(plain @ typed) < 0.95


@pytest.mark.live
def test_a_batch_of_nothing_is_nothing(minilm: Encoder) -> None:
    """No rows in, no rows out."""
    assert minilm.encode([]).vectors.shape == (0, 384)


@pytest.mark.live
def test_serving_never_imports_torch_and_stays_small() -> None:
    """A process with the packaged model loaded and used stays under 200 MB, torch unseen."""
    script = """
import json, pathlib, sys, tempfile
import embeddings
early = {m for m in ("faiss", "onnxruntime", "tokenizers", "torch") if m in sys.modules}
encoder = embeddings.load("all-MiniLM-L6-v2", pathlib.Path(tempfile.gettempdir()))
embeddings.self_test(encoder)
encoder.encode(["word " * 250] * 4)
status = pathlib.Path("/proc/self/status").read_text()
kb = int(status.split("VmRSS:")[1].split()[0])
late = [m for m in ("torch", "transformers", "sentence_transformers") if m in sys.modules]
print(json.dumps([sorted(early), late, kb]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    early, late, kb = json.loads(done.stdout)
    assert (early, late) == ([], [])
    assert kb < 200 * 1024


@pytest.mark.live
def test_an_exported_folder_anywhere_serves_the_same_vectors(
    minilm: Encoder, tmp_path: Path
) -> None:
    """The folder alone is the model; only what it was calibrated for stays with the package."""
    folder = tmp_path / "copy"
    shutil.copytree(find(PACKAGED, tmp_path).folder, folder)
    spec = read(find(str(folder), tmp_path))
    assert spec is not None
    copy = open_onnx(spec)
    assert copy.threshold is None
    assert copy.fingerprint == minilm.fingerprint
    texts = ["the same text"]
    np.testing.assert_array_equal(copy.encode(texts).vectors, minilm.encode(texts).vectors)
