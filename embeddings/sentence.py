"""Any sentence-transformers model as it is: slower and larger, for what cannot be exported.

The only file in serving that imports torch, and only once a model is opened with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.models import EncoderError, source_hash
from embeddings.vectors import Encoded, checked

__all__ = ["SentenceEncoder", "open_sentence"]

_CHARACTERS_PER_TOKEN = 16  # as in the fast path


class SentenceEncoder:
    """Texts to unit vectors by way of torch; never calibrated, fit for no known language set."""

    def __init__(self, *, name: str, fingerprint: str, model: Any, note: str) -> None:
        self.name = name
        self.fingerprint = fingerprint
        self.note = note
        self.window = int(model.max_seq_length or 0)
        self.dimension = int(model.encode(["x"], show_progress_bar=False).shape[1])
        self.languages: frozenset[str] | None = None
        self.threshold: float | None = None
        self.lens = None
        self._model = model
        self._prefix = (
            str(model.prompts[model.default_prompt_name]) if model.default_prompt_name else ""
        )

    def encode(self, texts: Sequence[str]) -> Encoded:
        """One row a text, in order; EncoderError when the model fails."""
        try:
            truncated = tuple(self._is_cut(self._prefix + text) for text in texts)
            whole = [row for row, cut in enumerate(truncated) if not cut]
            vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
            if whole:
                vectors[whole] = self._model.encode(
                    [texts[row] for row in whole],
                    normalize_embeddings=True,
                    show_progress_bar=False,
                    convert_to_numpy=True,
                )
        except Exception as exc:  # torch raises RuntimeError for everything
            raise EncoderError("encoder: the model run failed") from exc
        return checked(Encoded(vectors, truncated), len(texts), self.dimension)

    def _is_cut(self, text: str) -> bool:
        if self.window < 1 or len(text) > _CHARACTERS_PER_TOKEN * self.window:
            return True
        ids = self._model.tokenizer(text, truncation=False, verbose=False)["input_ids"]
        unknown = getattr(self._model.tokenizer, "unk_token_id", None)
        return len(ids) > self.window or (unknown is not None and unknown in ids)


def open_sentence(name: str, source: str, *, note: str) -> SentenceEncoder:
    """Load with sentence-transformers (a folder or a hub name); EncoderError when it cannot."""
    try:
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(1)  # as the fast path: the other cores belong to the event loop
        model = SentenceTransformer(source, device="cpu").eval()
    except Exception as exc:  # import, hub, files, versions
        raise EncoderError(f"model: cannot be opened ({type(exc).__name__})") from exc
    return SentenceEncoder(
        name=name, fingerprint=_fingerprint(name, source, model), model=model, note=note
    )


def _fingerprint(name: str, source: str, model: Any) -> str:
    """16 hex characters over the weights in memory and all that shapes the vectors."""
    total = hashlib.sha256(f"torch\0{name}\0{model.max_seq_length}\0".encode())
    total.update(repr(sorted(model.prompts.items())).encode() + str(model).encode())
    if Path(source).is_dir():
        total.update(source_hash(Path(source)).encode())
    for key, tensor in sorted(model.state_dict().items()):
        total.update(key.encode() + tensor.cpu().contiguous().float().numpy().tobytes())
    return total.hexdigest()[:16]
