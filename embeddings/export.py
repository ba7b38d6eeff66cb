"""`python -m embeddings.export SOURCE TARGET`: a sentence-transformers model as one ONNX folder.

Writes model.onnx (pooling and normalisation inside; weights stored as fp16, arithmetic in fp32),
tokenizer.json and encoder.json, and refuses where the result does not agree with its source.
The same source and the same libraries give byte-identical files. Needs the extra
`sentence-transformers`; nothing in serving imports this module.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.models import (
    EncoderError,
    ModelSpec,
    Pooling,
    file_hash,
    source_hash,
    write,
)
from embeddings.onnx import open_onnx

__all__ = ["SAMPLES", "ExportError", "export", "halve"]

_OPSET = 17
_MAX_DRIFT = 1e-3  # 1 - cosine to the source's own vector
_LARGE = 1024  # values; smaller tensors (biases, norms) stay fp32, they weigh nothing
_MADE_WITH = ("onnx", "sentence-transformers", "torch", "transformers")

# Short, long, odd: what the export is compared with its source on. All within any usual window.
SAMPLES = (
    "hi",
    "?",
    "2 + 2",
    "How do I reset my password?",
    "How can I change my password",
    "What is the capital of France?",
    "what's the capital of france",
    "WHERE IS MY ORDER 48213",
    "Where is my order 48231?",
    "turn on dark mode",
    "turn off dark mode",
    "Cancel my subscription, please.",
    "Explain the difference between TCP and UDP to a beginner.",
    "Write a haiku about the sea",
    "def add(a, b):\n    return a + b",
    "SELECT name FROM users WHERE id = 7;",
    '{"status": "ok", "items": [1, 2, 3]}',
    "Mein Paket ist nicht angekommen.",
    "Ou est la bibliotheque ?",
    "naïve café, coöperate",
    "tabs\tand\nnew lines   and   spaces",
    "a-very-long-hyphenated-word-that-nobody-would-ever-write-down",
    "https://example.com/a/b?c=d#e",
    "3.14159265358979323846",
    "The quick brown fox jumps over the lazy dog. " * 4,
    "What should I cook tonight if I have rice, two eggs and some spring onions left over?",
    "Summarise the causes of the First World War in three sentences.",
    "Is it safe to take ibuprofen together with paracetamol?",
    "Translate 'good morning' into Spanish",
    "one two three four five six seven eight nine ten " * 8,
)


class ExportError(EncoderError):
    """This model cannot be exported, or its export does not agree with it."""


def export(
    source: str, target: Path, *, name: str = "", revision: str = "", prefix: str | None = None
) -> ModelSpec:
    """Export `source` (a folder or a hub name) into `target`, which is created if need be.

    `prefix` overrides the source's own default prompt. The old files stay untouched until the
    new ones have passed their comparison.
    """
    model = _open(source)
    pooling, window = _read_modules(model)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as temporary:
        folder = Path(temporary)
        _write_graph(model, pooling, folder / "model.onnx")
        pad_id = _write_tokenizer(model, folder / "tokenizer.json")
        spec = ModelSpec(
            name=name or Path(source).name,
            revision=revision or _revision(model),
            folder=folder,
            languages=None,
            threshold=None,
            pooling=pooling,
            prefix=_prefix(model) if prefix is None else prefix,
            window=window,
            dimension=_dimension(model),
            quantisation="fp16-stored",
            pad_id=pad_id,
            weights_sha256=file_hash(folder / "model.onnx"),
            tokenizer_sha256=file_hash(folder / "tokenizer.json"),
            source_sha256=source_hash(Path(source)) if Path(source).is_dir() else "",
        )
        _compare(model, spec)
        for file in ("model.onnx", "tokenizer.json"):
            (folder / file).replace(target / file)
    spec = replace(spec, folder=target)
    write(spec, {package: version(package) for package in _MADE_WITH})
    return spec


def _open(source: str) -> Any:
    from sentence_transformers import SentenceTransformer

    try:
        # Plain attention: the fused kernels have no counterpart in the exporter.
        arguments = {"attn_implementation": "eager"}
        return SentenceTransformer(source, device="cpu", model_kwargs=arguments).eval()
    except Exception as exc:  # hub, files, versions: anything may be wrong with it
        raise ExportError(f"the source cannot be opened: {type(exc).__name__}") from exc


def _read_modules(model: Any) -> tuple[Pooling, int]:
    """Pooling and window, or ExportError for a chain of modules that we do not rebuild."""
    kinds = [type(module).__name__ for module in model]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ExportError(f"cannot rebuild the modules {kinds}")
    if getattr(model[0], "do_lower_case", False):
        raise ExportError("lower-casing outside of the tokenizer is not rebuilt")
    settings = model[1].get_config_dict()
    modes = {k.removeprefix("pooling_mode_") for k, v in settings.items() if v is True}
    mode = settings.get("pooling_mode") or next(
        (m for m in ("mean_tokens", "cls_token") if m in modes), "unknown"
    )
    # Two writings of the same: "mean" since sentence-transformers 5.2, "mean_tokens" before.
    names: dict[object, Pooling] = {"mean": "mean", "mean_tokens": "mean"}
    names |= {"cls": "cls", "cls_token": "cls"}
    others = modes - {"mean_tokens", "cls_token", "include_prompt"}
    if mode not in names or others or ("mean_tokens" in modes and "cls_token" in modes):
        raise ExportError("only mean and cls pooling are rebuilt")
    if not model.max_seq_length:
        raise ExportError("the source does not name its window")
    return names[mode], int(model.max_seq_length)


def _prefix(model: Any) -> str:
    name = model.default_prompt_name
    return str(model.prompts[name]) if name else ""


def _revision(model: Any) -> str:
    commit = getattr(model[0].auto_model.config, "_commit_hash", None)
    return str(commit or "local")


def _dimension(model: Any) -> int:
    return int(model.encode(["x"], show_progress_bar=False).shape[1])


def _write_tokenizer(model: Any, path: Path) -> int:
    """The fast tokenizer's own file; returns the id to pad with."""
    backend = getattr(model.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError("the source has no fast tokenizer")
    backend.no_truncation()
    backend.no_padding()
    path.write_text(backend.to_str(), "utf-8")
    return int(model.tokenizer.pad_token_id or 0)


def _write_graph(model: Any, pooling: Pooling, path: Path) -> None:
    import onnx
    import torch

    ids = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 5, 6, 2, 0, 0]])
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Tracer warnings about shapes that `_compare` proves harmless or refuses.
            warnings.simplefilter("ignore")
            torch.onnx.export(
                _pooled(model, pooling),
                (ids, (ids != 0).long()),
                path,
                input_names=["input_ids", "attention_mask"],
                output_names=["embedding"],
                dynamic_axes={
                    "input_ids": {0: "texts", 1: "tokens"},
                    "attention_mask": {0: "texts", 1: "tokens"},
                    "embedding": {0: "texts"},
                },
                opset_version=_OPSET,
                dynamo=False,
            )
        graph = onnx.load(path)
        halve(graph)
        onnx.checker.check_model(graph)
        path.write_bytes(graph.SerializeToString(deterministic=True))
    except ExportError:
        raise
    except Exception as exc:  # the exporter's own errors are many and unnamed
        raise ExportError(f"the exporter failed: {type(exc).__name__}") from exc


def _pooled(model: Any, pooling: Pooling) -> Any:
    """The transformer with pooling and normalisation behind it, as one torch module."""
    import torch

    class Pooled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model[0].auto_model

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.model(input_ids=input_ids, attention_mask=attention_mask)[0]
            if pooling == "cls":
                vectors = states[:, 0]
            else:
                weight = attention_mask.unsqueeze(-1).to(states.dtype)
                vectors = (states * weight).sum(1) / weight.sum(1)
            return torch.nn.functional.normalize(vectors, dim=1)

    return Pooled().eval()


def halve(graph: Any) -> None:
    """Store the large fp32 weights of an ONNX model as fp16, each behind a Cast back to fp32.

    The runtime folds those casts once at load, so only the file shrinks: arithmetic stays fp32.
    Look-up tables are cast row by row after the look-up instead, which keeps the vocabulary's
    table (half of a small model) at half its size in memory too. The values are the same.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes = list(graph.graph.node)
    other_uses = {i for n in nodes for i in n.input[1 if n.op_type == "Gather" else 0 :]}
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _LARGE:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ExportError("a weight is too large for fp16")
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.fp16"))
        if name in other_uses:
            casts.append(helper.make_node("Cast", [f"{name}.fp16"], [name], to=TensorProto.FLOAT))
        else:
            nodes = [part for node in nodes for part in _cast_after(node, name)]
    del graph.graph.node[:]
    graph.graph.node.extend([*casts, *nodes])


def _cast_after(node: Any, table: str) -> list[Any]:
    """The node itself, or a look-up in the halved table and the cast of what it found."""
    from onnx import TensorProto, helper

    if not node.input or node.input[0] != table:
        return [node]
    found = node.output[0]
    node.input[0], node.output[0] = f"{table}.fp16", f"{found}.fp16"
    return [node, helper.make_node("Cast", [f"{found}.fp16"], [found], to=TensorProto.FLOAT)]


def _compare(model: Any, spec: ModelSpec) -> None:
    """ExportError unless alone and together each sample gets its source's vector."""
    encoder = open_onnx(spec)
    together = encoder.encode(SAMPLES)
    kept = [row for row, cut in enumerate(together.truncated) if not cut]
    if len(kept) < len(SAMPLES) // 2:
        raise ExportError("most samples do not fit the window")
    expected = model.encode(
        [spec.prefix + SAMPLES[row] for row in kept],
        prompt="",
        normalize_embeddings=True,
        show_progress_bar=False,
    )
    alone = np.concatenate([encoder.encode([SAMPLES[row]]).vectors for row in kept])
    for got in (together.vectors[kept], alone):
        drift = float(np.max(1.0 - np.sum(got * expected, axis=1)))
        if not drift < _MAX_DRIFT:
            raise ExportError(f"the exported model drifts from its source by {drift:.2g}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the last line on stderr says why it failed."""
    parser = argparse.ArgumentParser(prog="python -m embeddings.export", description=__doc__)
    parser.add_argument("source", help="a sentence-transformers folder or a hub name")
    parser.add_argument("target", type=Path, help="the folder to write")
    parser.add_argument("--name", default="", help="the model's name (default: the source's)")
    parser.add_argument("--revision", default="", help="its revision (default: the hub's commit)")
    parser.add_argument("--prefix", help="put before every text, e.g. 'query: '")
    given = parser.parse_args(arguments)
    try:
        spec = export(
            given.source,
            given.target,
            name=given.name,
            revision=given.revision,
            prefix=given.prefix,
        )
    except EncoderError as exc:
        sys.stderr.write(f"export failed: {exc}\n")
        return 1
    except ImportError as exc:
        sys.stderr.write(f"export failed: {exc.name} is missing, install the extra\n")
        return 1
    sys.stdout.write(f"{spec.folder}: {spec.dimension} dimensions, {spec.weights_sha256}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
