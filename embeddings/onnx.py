"""The fast path: an exported folder, run by ONNX Runtime on one thread, without torch.

Belongs to one thread at a time (the Rust tokenizer says "Already borrowed" to a second one).
Never reads more of a text than could fit the window; never answers for a text it saw only in part.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings.lens import Lens, open_lens
from embeddings.models import EncoderError, ModelSpec, fingerprint
from embeddings.vectors import Encoded, Floats, checked

__all__ = ["OnnxEncoder", "groups", "open_onnx"]

# No vocabulary in use spends more characters a token on average, even on the plainest prose. Beyond
# that a text is over the window for sure, and tokenizing 100 kB to learn it costs 50 ms and memory.
_CHARACTERS_PER_TOKEN = 16
# Padded tokens in one run. Short texts together cost half of one by one (the weights are read
# once for all of them); beyond this the gain is gone and the activations leave the CPU's cache.
_RUN_TOKENS = 192


class OnnxEncoder:
    """Texts to unit vectors. The parts come ready-made: see `open_onnx`."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        session: Any,
        tokenizer: Any,
        unknown: int | None,
        lens: Lens | None = None,
    ) -> None:
        self.name = spec.name
        self.fingerprint = fingerprint(spec)
        self.dimension = spec.dimension
        self.window = spec.window
        self.languages = spec.languages
        self.threshold = spec.threshold
        self.lens = lens
        self.note = ""
        self._prefix = spec.prefix
        self._pad = spec.pad_id
        self._session = session
        self._tokenizer = tokenizer
        self._unknown = unknown
        self._inputs = {i.name for i in session.get_inputs()}

    def encode(self, texts: Sequence[str]) -> Encoded:
        """One row a text, in order. The company a text is run in moves its scores by rounding only
        (1e-6). EncoderError when the model fails or its vectors are no unit vectors."""
        ids = [self._tokens(text) for text in texts]
        vectors = np.zeros((len(texts), self.dimension), dtype=np.float32)
        for rows in groups([len(i) if i is not None else 0 for i in ids]):
            vectors[rows] = self._run([ids[row] or [] for row in rows])
        encoded = Encoded(vectors, tuple(i is None for i in ids))
        return checked(encoded, len(texts), self.dimension)

    def _tokens(self, text: str) -> list[int] | None:
        """Token ids with specials, or None when the model could not see all of the text.

        That is so past the window, and also where the vocabulary has no piece for something (an
        emoji, a rare script): two texts that differ only there would be one and the same to the
        model, cosine 1.0.
        """
        text = self._prefix + text
        if len(text) > _CHARACTERS_PER_TOKEN * self.window:
            return None
        ids: list[int] = self._tokenizer.encode(text).ids
        if len(ids) > self.window or self._unknown in ids:
            return None
        return ids

    def _run(self, ids: list[list[int]]) -> Floats:
        tokens, mask = _padded(ids, self._pad)
        feed = {"input_ids": tokens, "attention_mask": mask}
        try:
            (vectors,) = self._session.run(
                None, {k: v for k, v in feed.items() if k in self._inputs}
            )
        except Exception as exc:  # the runtime's own classes are not public
            raise EncoderError("encoder: the model run failed") from exc
        return np.asarray(vectors, dtype=np.float32)


def _padded(ids: list[list[int]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    longest = max(len(i) for i in ids)
    tokens = np.full((len(ids), longest), pad, dtype=np.int64)
    mask = np.zeros((len(ids), longest), dtype=np.int64)
    for row, i in enumerate(ids):
        tokens[row, : len(i)] = i
        mask[row, : len(i)] = 1
    return tokens, mask


def groups(lengths: Sequence[int], limit: int = _RUN_TOKENS) -> Iterator[list[int]]:
    """Rows to run together: of like length, at most `limit` padded tokens. Length 0 is left out.

    Longest first, so that a group's first row sets its width.
    """
    rows = sorted((r for r, n in enumerate(lengths) if n), key=lambda r: -lengths[r])
    group: list[int] = []
    for row in rows:
        # A row half as long as its group would be half padding: better off with its likes.
        if group and (
            (len(group) + 1) * lengths[group[0]] > limit or 2 * lengths[row] < lengths[group[0]]
        ):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def open_onnx(spec: ModelSpec) -> OnnxEncoder:
    """Load the folder's model and tokenizer (about 0.3 s, 150 MB for MiniLM)."""
    # From 1.31 on the library reports its use to its maker, over the network, from its import on.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    # Two threads are slower than one on a text of ten tokens, and steal the event loop's core.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # its warnings go to stderr past any logger
    try:
        session = onnxruntime.InferenceSession(
            str(spec.folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )
        tokenizer = Tokenizer.from_file(str(spec.folder / "tokenizer.json"))
    except Exception as exc:  # both libraries raise bare or unnamed classes
        raise EncoderError("encoder: the exported model cannot be opened") from exc
    tokenizer.no_truncation()  # so that an overflow is seen, not hidden
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "[SEP]" typed by a user is text, not structure
    return OnnxEncoder(
        spec=spec,
        session=session,
        tokenizer=tokenizer,
        unknown=_unknown_id(tokenizer),
        lens=open_lens(spec.folder, spec.dimension),
    )


def _unknown_id(tokenizer: Any) -> int | None:
    """The id that stands for "no piece of mine", None where the vocabulary spells every byte."""
    word = getattr(tokenizer.model, "unk_token", None)
    if isinstance(word, str):
        return _id(tokenizer, word)
    return next((i for w in ("[UNK]", "<unk>") if (i := _id(tokenizer, w)) is not None), None)


def _id(tokenizer: Any, word: str) -> int | None:
    found: int | None = tokenizer.token_to_id(word)
    return found
