"""The lens: a second look at two vectors, through projections that labelled pairs made."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from embeddings import EncoderError, pack
from embeddings.lens import Lens, open_lens
from embeddings.models import PACKAGED, find

# Two projections of three dimensions onto two: one drops the last, the other the first.
PROJECTIONS = np.array([[[1, 0], [0, 1], [0, 0]], [[0, 0], [1, 0], [0, 1]]], dtype=np.float32)


def lens(*offsets: float) -> Lens:
    return Lens(PROJECTIONS, np.array(offsets or (0.0, 0.0), dtype=np.float32))


def unit(*values: float) -> np.ndarray:  # type: ignore[type-arg]
    vector = np.array(values, dtype=np.float32)
    return vector / np.linalg.norm(vector)  # type: ignore[no-any-return]


def test_the_best_projection_speaks_with_its_offset() -> None:
    """What one does not see another may; an offset puts it on the scale of the first."""
    one, other = unit(1, 1, 0), unit(1, 1, 1)
    seen = lens().views(np.stack([one, other]))
    assert seen.shape == (2, 2, 2)
    assert lens().compare(seen[:1], seen[1:])[0] == pytest.approx(1.0)
    shifted = lens(-0.5, 0.1).compare(seen[:1], seen[1:])[0]
    assert shifted == pytest.approx(max(1.0 - 0.5, 1 / np.sqrt(2) + 0.1))


def test_no_similarity_is_above_one() -> None:
    """An offset must not lift a near pair above equality."""
    seen = lens(0.3, 0.3).views(np.stack([unit(1, 2, 3)]))
    assert lens(0.3, 0.3).compare(seen, seen)[0] == 1.0


def test_a_vector_that_a_projection_maps_to_nothing_gives_a_number() -> None:
    """No NaN, which compares false with every threshold."""
    seen = lens().views(np.stack([unit(0, 0, 1), unit(1, 0, 0)]))
    assert np.isfinite(lens().compare(seen[:1], seen[1:])).all()


def test_stored_vectors_that_are_missing_have_no_similarity() -> None:
    """An entry that only the exact tier may serve has none; the others keep their places."""
    one, other = pack(unit(1, 1, 0)), pack(unit(1, 1, 1))
    found = lens().similarities(one, [b"", other, one])
    assert found[0] is None
    assert found[1:] == [pytest.approx(1.0, abs=1e-3)] * 2
    assert lens().similarities(b"", [one]) == [None]
    assert lens().similarities(one, []) == []


def test_no_rows_give_no_views() -> None:
    """A command that starts on an empty table of texts starts."""
    assert lens().views(np.zeros((0, 3), dtype=np.float32)).shape == (0, 2, 2)


@pytest.mark.parametrize(
    "bad",
    [
        {"projections": PROJECTIONS[0], "offsets": np.zeros(1)},
        {"projections": PROJECTIONS, "offsets": np.zeros(3)},
        {"projections": PROJECTIONS * np.nan, "offsets": np.zeros(2)},
        {"projections": PROJECTIONS},
    ],
)
def test_a_file_that_is_no_lens_is_refused(tmp_path: Path, bad: dict[str, object]) -> None:
    """At start, in a sentence; never a similarity made of it."""
    np.savez(tmp_path / "lens.npz", **bad)  # type: ignore[arg-type]
    with pytest.raises(EncoderError, match=r"^lens: "):
        open_lens(tmp_path, 3)
    (tmp_path / "lens.npz").write_bytes(b"no archive")
    with pytest.raises(EncoderError, match="cannot be read"):
        open_lens(tmp_path, 3)


def test_a_lens_fits_the_model_that_it_was_made_for(tmp_path: Path) -> None:
    """Another dimension is another model; no file is no lens; the packaged model has one."""
    assert open_lens(tmp_path, 3) is None
    np.savez(tmp_path / "lens.npz", projections=PROJECTIONS, offsets=np.zeros(2))
    with pytest.raises(EncoderError, match="another model"):
        open_lens(tmp_path, 4)
    assert open_lens(tmp_path, 3) is not None
    assert open_lens(find(PACKAGED, tmp_path).folder, 384) is not None
