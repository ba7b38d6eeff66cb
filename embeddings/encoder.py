"""What an encoder is, how one is loaded by name, and the test it must pass before it serves.

Loading may take minutes the first time a model is used (its export runs in a process of its own,
so that torch never enters this one). Never logs: what the operator should know is in `note`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from embeddings.lens import Lens
from embeddings.models import EncoderError, Found, find, read
from embeddings.onnx import open_onnx
from embeddings.vectors import Encoded, checked

__all__ = ["Encoder", "load", "self_test"]

_EXPORT_SECONDS = 1800  # a large model on a slow disk; more is a hang


class Encoder(Protocol):
    """Texts in, unit vectors out. Used by one thread at a time."""

    @property
    def name(self) -> str: ...
    @property
    def fingerprint(self) -> str:
        """16 hex characters; vectors of different fingerprints must never meet."""

    @property
    def dimension(self) -> int: ...
    @property
    def window(self) -> int:
        """Tokens, specials included."""

    @property
    def languages(self) -> frozenset[str] | None:
        """Those it is fit for; None is any."""

    @property
    def threshold(self) -> float | None:
        """The calibrated cosine; None: not calibrated, not to serve yet."""

    @property
    def lens(self) -> Lens | None:
        """A second look at its vectors; None where none was trained for it."""

    @property
    def note(self) -> str:
        """Why it is not the fast path; "" when it is."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        """One row a text, in order, or EncoderError for all of them."""


def load(spec: str, data_dir: Path) -> Encoder:
    """The packaged model, an exported folder, a sentence-transformers folder or a hub name.

    The last two need the extra `sentence-transformers`, are exported to `data_dir/models` once and
    served from there; where the export fails, by sentence-transformers itself (slower, with torch).
    """
    found = find(spec, data_dir)
    ready = read(found)
    if ready is not None:
        return open_onnx(ready)
    if found.source is None:
        raise EncoderError("model: its files are missing from the installation")
    if importlib.util.find_spec("sentence_transformers") is None:
        raise EncoderError("model: this one needs the extra [sentence-transformers]")
    note = _export_apart(found, found.source)
    ready = None if note else read(found)
    if ready is not None:
        return open_onnx(ready)
    from embeddings.sentence import open_sentence

    return open_sentence(found.name, found.source, note=note or "the export left nothing")


def _export_apart(found: Found, source: str) -> str:
    """Export in a child process; "" or why it failed, in one line."""
    command = [sys.executable, "-m", "embeddings.export", source, str(found.folder)]
    root = str(Path(__file__).resolve().parents[1])  # found from there, installed or not
    try:
        done = subprocess.run(  # noqa: S603  our own module; the source is one argument, no shell
            [*command, "--name", found.name],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=_EXPORT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as exc:
        return f"export did not run: {type(exc).__name__}"
    if done.returncode == 0:
        return ""
    said = done.stderr.strip().splitlines()
    return said[-1][:300] if said else f"export ended with status {done.returncode}"


# A question, the same question in other words, and one that has nothing to do with it.
_KNOWN = (
    (
        "How do I reset my password?",
        "How can I reset my password?",
        "What is the tallest mountain?",
    ),
    (
        "What is the capital of France?",
        "Which city is the capital of France?",
        "How to boil an egg",
    ),
    ("Cancel my subscription", "I want to cancel my subscription", "Who painted the Mona Lisa?"),
)
_MARGIN = 0.05  # anisotropic models put unrelated texts at 0.75 and paraphrases at 0.9


def self_test(encoder: Encoder) -> None:
    """Raise EncoderError unless known pairs come out the right way round.

    Guards against everything that makes everything hit: a constant vector, a swapped file,
    a distance taken for a similarity. Takes some ten milliseconds.
    """
    texts = [text for triple in _KNOWN for text in triple]
    encoded = checked(encoder.encode(texts), len(texts), encoder.dimension)
    if any(encoded.truncated):
        raise EncoderError("encoder: self-test texts do not fit the window")
    again = encoder.encode(texts[:1]).vectors[0]
    if float(again @ encoded.vectors[0]) < 0.999:
        raise EncoderError("encoder: the same text gives different vectors")
    scores = encoded.vectors @ encoded.vectors.T
    if np.all(scores > 1 - 1e-3):
        raise EncoderError("encoder: every text gives the same vector")
    if encoder.languages is not None and "en" not in encoder.languages:
        return  # the known pairs are English
    for first in range(0, len(texts), 3):
        if not scores[first, first + 1] > scores[first, first + 2] + _MARGIN:
            raise EncoderError("encoder: a paraphrase is no closer than an unrelated text")
