"""What storing or computing with fewer bits does to the packaged model's scores. Changes nothing.

    python benchmarks/drift.py SOURCE [--pairs pairs.jsonl.gz] [--limit 1500]

SOURCE is the sentence-transformers folder of the model. Each pair is a line `{"a", "b", "same"}`.
Prints for each form of the weights: file size, resident memory of a process that serves it, CPU
time of one short text alone and in company, and on the pairs: drift of the score against fp32,
area under the ROC curve, and decisions that flip at the threshold. Every form runs in its own
process, on one thread, one text a run (so padding plays no part) unless said otherwise.
"""

from __future__ import annotations

import argparse
import gzip
import json
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from embeddings.export import SAMPLES, _open, _pooled, _read_modules

THRESHOLD = 0.92
FORMS = ("fp32", "fp16-stored", "int8-block", "int8-channel")


def main() -> None:
    """Build the forms, measure each, print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--limit", type=int, default=1500)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    pairs = read_pairs(given.pairs, given.limit)
    if given.measure:
        model, scores = given.measure
        print(json.dumps(measure(given.source, Path(model), pairs, Path(scores))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(given.source, folder)
        rows = [one(given, folder, form) for form in FORMS]
    print_table(rows, np.array([pair["same"] for pair in pairs]))


def read_pairs(path: Path | None, limit: int) -> list[dict[str, Any]]:
    """Labelled pairs, or the export's own samples against each other when there is no file."""
    if path is None:
        return [{"a": a, "b": b, "same": int(a == b)} for a in SAMPLES for b in SAMPLES][:limit]
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(limit), strict=False)]


def one(given: argparse.Namespace, folder: Path, form: str) -> dict[str, Any]:
    """One form, measured in a process of its own."""
    model, scores = folder / f"{form}.onnx", folder / f"{form}.npy"
    command = [sys.executable, __file__, given.source, "--limit", str(given.limit)]
    command += ["--pairs", str(given.pairs)] if given.pairs else []
    command += ["--measure", str(model), str(scores)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    size = model.stat().st_size / 1e6
    return {"form": form, "file": size, "scores": np.load(scores), **row}


def build(source: str, folder: Path) -> None:
    """All forms from one export."""
    import onnx
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    from embeddings.export import halve

    model = _open(source)
    ids = torch.tensor([[1, 5, 6, 7, 8, 2], [1, 5, 6, 2, 0, 0]])
    names = ["input_ids", "attention_mask"]
    plain = folder / "fp32.onnx"
    warnings.simplefilter("ignore")  # the tracer's, about shapes that the drift column judges
    torch.onnx.export(
        _pooled(model, _read_modules(model)[0]),
        (ids, (ids != 0).long()),
        plain,
        input_names=names,
        output_names=["embedding"],
        dynamic_axes={name: {0: "texts", 1: "tokens"} for name in names},
        opset_version=17,
        dynamo=False,
    )
    halved = onnx.load(plain)
    halve(halved)
    onnx.save(halved, folder / "fp16-stored.onnx")
    blocks = onnx.load(plain)
    quantise_blocks(blocks)
    halve(blocks)
    onnx.save(blocks, folder / "int8-block.onnx")
    quantize_dynamic(
        plain, folder / "int8-channel.onnx", per_channel=True, weight_type=QuantType.QInt8
    )


def quantise_blocks(model: Any, block: int = 32) -> None:
    """8-bit weights with a scale for each 32 inputs of a column, activations likewise at run time
    (the runtime's MatMulNBits)."""
    from onnx import helper, numpy_helper

    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for node in graph.node:
        if node.op_type != "MatMul" or node.input[1] not in weights:
            nodes.append(node)
            continue
        name = node.input[1]
        matrix = numpy_helper.to_array(weights.pop(name))
        rows, columns = matrix.shape
        cut = matrix.T.reshape(columns, rows // block, block)
        scale = np.maximum(np.abs(cut).max(2) / 127, 1e-12).astype(np.float32)
        codes = (np.rint(cut / scale[..., None]) + 128).astype(np.uint8)
        weights[f"{name}.q"] = numpy_helper.from_array(codes, f"{name}.q")
        weights[f"{name}.s"] = numpy_helper.from_array(scale.reshape(-1), f"{name}.s")
        shape = {"K": rows, "N": columns, "bits": 8, "block_size": block, "accuracy_level": 4}
        nodes.append(
            helper.make_node(
                "MatMulNBits",
                [node.input[0], f"{name}.q", f"{name}.s"],
                list(node.output),
                domain="com.microsoft",
                **shape,
            )
        )
    kept = list(weights.values())
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def measure(
    source: str, model: Path, pairs: list[dict[str, Any]], scores: Path
) -> dict[str, float]:
    """CPU and memory of one form; its scores go into a file."""
    import onnxruntime
    from tokenizers import Tokenizer

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    tokenizer = Tokenizer.from_file(str(Path(source) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ids = [tokenizer.encode(pair[side]).ids[:256] for side in "ab" for pair in pairs]
    begun = time.process_time()
    vectors = np.concatenate([run(session, [i]) for i in ids])
    alone = (time.process_time() - begun) / len(ids)
    ordered = sorted(ids[:800], key=len)
    begun = time.process_time()
    for first in range(0, len(ordered), 8):
        run(session, ordered[first : first + 8])
    together = (time.process_time() - begun) / len(ordered)
    status = Path("/proc/self/status").read_text()
    np.save(scores, np.sum(vectors[: len(pairs)] * vectors[len(pairs) :], axis=1))
    rss = int(status.split("VmRSS:")[1].split()[0]) / 1024
    return {"alone": alone * 1e3, "together": together * 1e3, "rss": rss}


def run(session: Any, ids: list[list[int]]) -> Any:
    """Vectors of some texts in one run."""
    width = max(len(i) for i in ids)
    tokens = np.array([i + [0] * (width - len(i)) for i in ids])
    mask = np.array([[1] * len(i) + [0] * (width - len(i)) for i in ids])
    return session.run(None, {"input_ids": tokens, "attention_mask": mask})[0]


def area(scores: Any, same: Any) -> float:
    """Area under the ROC curve."""
    ranks = np.argsort(np.argsort(scores)) + 1
    positive = int(same.sum())
    pairs = positive * (len(same) - positive)
    return float((ranks[same == 1].sum() - positive * (positive + 1) / 2) / pairs)


def print_table(rows: list[dict[str, Any]], same: Any) -> None:
    """One line a form; drift and flips against the first."""
    reference = rows[0]["scores"]
    print("form          file MB  RSS MB  ms alone  ms of 8   AUC     drift max / p99    flips")
    for row in rows:
        drift = np.abs(row["scores"] - reference)
        flips = np.sum((row["scores"] >= THRESHOLD) != (reference >= THRESHOLD))
        print(
            f"{row['form']:13} {row['file']:7.1f} {row['rss']:7.0f} {row['alone']:9.2f} "
            f"{row['together']:8.2f}   {area(row['scores'], same):.4f}  "
            f"{drift.max():.5f} / {np.quantile(drift, 0.99):.5f}  {flips} of {len(same)}"
        )


if __name__ == "__main__":
    main()
