"""Text in, unit vectors out, and the nearest of those seen before.

Knows nothing of prompts, answers, HTTP or stores, and never imports the proxy. Importing this
package loads no model, no torch, no FAISS and no ONNX Runtime: `load` and the first large shelf do.
"""

from __future__ import annotations

from embeddings.batching import Recall, Worker, WorkerBusy
from embeddings.encoder import Encoder, load, self_test
from embeddings.index import Index
from embeddings.lens import Lens
from embeddings.models import EncoderError
from embeddings.vectors import Encoded, pack, unpack

__all__ = [
    "Encoded",
    "Encoder",
    "EncoderError",
    "Index",
    "Lens",
    "Recall",
    "Worker",
    "WorkerBusy",
    "load",
    "pack",
    "self_test",
    "unpack",
]
