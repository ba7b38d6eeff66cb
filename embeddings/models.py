"""Which model a name means, where its files lie, and what its vectors may be compared with.

Reads small files and their hashes. Loads no model, imports no machine-learning library and
never touches the network.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

__all__ = [
    "PACKAGED",
    "EncoderError",
    "Found",
    "ModelSpec",
    "Pooling",
    "file_hash",
    "find",
    "fingerprint",
    "read",
    "source_hash",
    "write",
]

Pooling = Literal["mean", "cls"]

PACKAGED = "all-MiniLM-L6-v2"
_ALIASES = {PACKAGED, f"sentence-transformers/{PACKAGED}"}
_PACKAGED_FOLDER = Path(__file__).with_name("minilm")
# Calibrated on labelled question pairs; a model that is not in this table has no threshold and
# is not to serve semantic hits before it got one.
_LANGUAGES = frozenset({"en"})
_THRESHOLD = 0.92

_SPEC_FILE = "encoder.json"
_WEIGHTS = (".safetensors", ".bin", ".onnx", ".json", ".txt", ".model")


class EncoderError(Exception):
    """The encoder or the index cannot do what was asked. The message never quotes a text."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Everything that decides what vectors a model gives. `window` counts special tokens too."""

    name: str
    revision: str
    folder: Path
    languages: frozenset[str] | None  # None: any
    threshold: float | None  # cosine; None: never calibrated
    pooling: Pooling
    prefix: str  # put before every text
    window: int
    dimension: int
    quantisation: str
    pad_id: int
    weights_sha256: str  # of model.onnx
    tokenizer_sha256: str
    source_sha256: str  # of what it was exported from


@dataclass(frozen=True, slots=True)
class Found:
    """Where a model is, or would be once exported. `source` is None when there is nothing to export
    from: the folder is then complete as it came."""

    name: str
    folder: Path
    source: str | None


def find(spec: str, data_dir: Path) -> Found:
    """A model by the packaged name, by folder (exported, or sentence-transformers') or hub name."""
    if spec in _ALIASES:
        return Found(PACKAGED, _PACKAGED_FOLDER, None)
    path = Path(spec).expanduser()
    if (path / _SPEC_FILE).is_file():
        return Found(path.resolve().name, path.resolve(), None)
    models = data_dir.resolve() / "models"  # the export runs in another working folder
    if path.is_dir():
        if not (path / "modules.json").is_file():
            raise EncoderError("model: the folder holds neither encoder.json nor modules.json")
        where = str(path.resolve())
        return Found(path.resolve().name, models / _folder_name(where), where)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", spec) or spec[0] in ".-":
        raise EncoderError("model: neither a folder nor a name that a model hub could know")
    return Found(spec, models / _folder_name(spec), spec)


def _folder_name(spec: str) -> str:
    """One flat, safe folder name; the hash keeps `a/b` and `a-b` apart."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", spec).strip(".-")[-60:]
    return f"{plain}-{hashlib.sha256(spec.encode()).hexdigest()[:8]}"


def read(found: Found) -> ModelSpec | None:
    """The spec of an exported folder, or None when nothing is exported there yet.

    The files are hashed again and must be those that were exported: a file swapped or cut short
    would otherwise serve vectors under another model's fingerprint. A folder whose source has
    changed since counts as not exported.
    """
    try:
        raw = json.loads((found.folder / _SPEC_FILE).read_text("utf-8"))
        spec = _parse(raw, found)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as exc:
        raise EncoderError("model: encoder.json cannot be read") from exc
    for file, expected in (
        ("model.onnx", spec.weights_sha256),
        ("tokenizer.json", spec.tokenizer_sha256),
    ):
        if file_hash(found.folder / file) != expected:
            raise EncoderError(f"model: {file} is not the file that was exported")
    if found.source and Path(found.source).is_dir():
        return spec if source_hash(Path(found.source)) == spec.source_sha256 else None
    return spec


def _parse(raw: dict[str, object], found: Found) -> ModelSpec:
    known = {f.name for f in fields(ModelSpec)} - {"folder", "languages", "threshold"}
    values = {name: raw[name] for name in known}
    spec = ModelSpec(folder=found.folder, languages=None, threshold=None, **values)  # type: ignore[arg-type]
    if spec.pooling not in {"mean", "cls"} or min(spec.window, spec.dimension) < 1:
        raise ValueError("out of range")
    if found.folder == _PACKAGED_FOLDER:
        return replace(spec, languages=_LANGUAGES, threshold=_THRESHOLD)
    return spec


def write(spec: ModelSpec, made_with: dict[str, str]) -> None:
    """Put `encoder.json` into the spec's folder, last of its files: it vouches for the others."""
    values = asdict(spec)
    for name in ("folder", "languages", "threshold"):
        del values[name]  # where it lies and how it was calibrated are not facts about the files
    text = json.dumps({**values, "made_with": made_with}, indent=2, sort_keys=True) + "\n"
    (spec.folder / _SPEC_FILE).write_text(text, "utf-8")


def fingerprint(spec: ModelSpec) -> str:
    """16 hex characters. Two specs with equal fingerprints give the same vectors."""
    facts = [
        *(spec.name, spec.revision, spec.weights_sha256, spec.tokenizer_sha256),
        *(spec.pooling, spec.prefix, spec.quantisation, spec.window),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    """SHA-256 in hex; EncoderError when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise EncoderError(f"model: {path.name} cannot be read") from exc


def source_hash(folder: Path) -> str:
    """One hash over the files of a source folder that can change its vectors."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in _WEIGHTS and p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\0{file_hash(path)}\n".encode())
    return total.hexdigest()
