"""Trains the score: the encoder's lens, the rarity of words, and the weights of `score.toml`.

    python -m benchmarks.train_score [--data ../shared/data] [--cache FOLDER] [--write]

Reads tuning data only: the even rows of the Quora pairs, Kmemo's near-miss file, our own tuning
pairs, Banking77 less its validation stream (`streams`), and of CLINC150 what must not be shared.
Everything else in `benchmarks/accuracy.py` is validation. Without --write it only reports.
The same data give the same files. About three minutes, most of them for encoding 50,000 texts;
--cache keeps those vectors.

Three steps, all in numpy: projections of the vectors under which pairs with one answer are near
(logistic loss on the projected cosine, Adam); how rare each word is in the tuning texts; a logistic
regression of the label on `score.FEATURES`, over pairs that no guard vetoes, where each pair's
projected cosine comes from a projection that was trained without it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import math
import random
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.pairs import PUBLIC_FOLDER, TUNING_FILES, load
from cache_proxy import lexicon, score
from cache_proxy.guards import facts, veto
from embeddings.encoder import load as load_encoder
from embeddings.lens import Lens

Floats = NDArray[np.float32]

SEED = 77
DIMENSIONS = 128
# Pairs of all sets, and without those that are about one trade; epochs and
# offset were chosen by the validation sets of benchmarks/accuracy.py (some twenty tries).
EPOCHS = {"all": 4, "general": 3}
OFFSETS = (0.02, 0.0)
_TRADES = frozenset({"banking77, after the stream", "clinc150, unlike only"})
VALIDATION_STREAM = 3_000  # prompts of Banking77, shuffled by SEED, that training never sees
_MEASURED = 12_000  # pairs of one set at most that the weights are fitted to
_POOL = 2_500  # prompts among which each prompt's neighbours are looked for
_NEIGHBOURS = 8
_FLOOR = 0.5  # cosine; what lies further off is never a candidate
_FEWEST = 4  # texts a word must stand in to have a rarity of its own
_BUDGET = 0.023  # of unlike tuning pairs that may be served at the calibrated threshold
_THRESHOLD = 0.92

ROOT = Path(__file__).resolve().parent.parent
LENS = ROOT / "embeddings/minilm/lens.npz"
TOML = ROOT / "cache_proxy/score.toml"
RARITY = ROOT / "cache_proxy/words/en.rarity.txt"


class Labelled(NamedTuple):
    """Pairs as rows into one table of texts, and how much each counts in the two trainings."""

    left: NDArray[np.int64]
    right: NDArray[np.int64]
    same: NDArray[np.bool_]
    repeat: int
    weight: float


class Texts:
    """The vectors of all texts asked for, encoded once."""

    def __init__(self, cache: Path | None) -> None:
        self.encoder = load_encoder("all-MiniLM-L6-v2", ROOT)
        self._cache = cache
        self._place: dict[str, int] = {}
        self.vectors: Floats = np.zeros((0, self.encoder.dimension), dtype=np.float32)
        self.fits: NDArray[np.bool_] = np.zeros(0, dtype=bool)
        if cache is not None and (cache / "texts.json").exists():
            told = json.loads((cache / "texts.json").read_text("utf-8"))
            self._place = {text: at for at, text in enumerate(told)}
            self.vectors = np.load(cache / "vectors.npy").astype(np.float32)
            self.fits = np.load(cache / "fits.npy")

    def add(self, texts: Iterable[str]) -> None:
        """Encode those that are new, short ones together."""
        new = sorted(set(texts) - self._place.keys(), key=lambda text: (len(text), text))
        vectors, fits = [self.vectors], [self.fits]
        for start in range(0, len(new), 256):
            encoded = self.encoder.encode(new[start : start + 256])
            # As the store keeps them.
            vectors.append(encoded.vectors.astype(np.float16).astype(np.float32))
            fits.append(~np.array(encoded.truncated, dtype=bool))
        self._place |= {text: at for at, text in enumerate(new, len(self._place))}
        self.vectors, self.fits = np.concatenate(vectors), np.concatenate(fits)
        if new and self._cache is not None:
            self._cache.mkdir(parents=True, exist_ok=True)
            np.save(self._cache / "vectors.npy", self.vectors.astype(np.float16))
            np.save(self._cache / "fits.npy", self.fits)
            (self._cache / "texts.json").write_text(json.dumps(list(self._place)), "utf-8")

    def rows(self, texts: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._place[text] for text in texts], dtype=np.int64)

    def names(self) -> list[str]:
        return list(self._place)


# ---- the data


def banking(data: Path) -> list[tuple[str, str]]:
    """Banking77's questions and intents, shuffled; the first VALIDATION_STREAM are not for us."""
    path = data / "banking77/train.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = [(row[0], row[1]) for row in csv.reader(file)][1:]
    random.Random(SEED).shuffle(rows)
    return rows


def clinc(data: Path) -> list[tuple[str, str]]:
    path = data / "clinc150/train.json"
    if not path.exists():
        return []
    rows = [(text, intent) for text, intent in json.loads(path.read_text("utf-8"))["train"]]
    random.Random(SEED).shuffle(rows)
    return rows


def tuning(data: Path) -> dict[str, list[tuple[str, str, bool]]]:
    """The labelled pairs that may be trained on, by the set they come from."""
    near_misses = json.loads((data / "kmemo/near-miss-corpus.json").read_text("utf-8"))["pairs"]
    return {
        "quora, even rows": [pair[:3] for pair in load("quora", data)[0::2]],
        "kmemo, near misses": [(row["a"], row["b"], row["shouldMatch"]) for row in near_misses],
        # Vietnamese prompts are matched exactly with this encoder.
        "own pairs": [pair[:3] for name in TUNING_FILES if ".en." in name for pair in load(name)],
    }


def neighbours(
    told: Sequence[tuple[str, str]], texts: Texts, *, unlike_only: bool
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Each prompt with its nearest: what the index would have proposed. One answer an intent."""
    left: list[int] = []
    right: list[int] = []
    same: list[bool] = []
    for start in range(0, len(told), _POOL):
        pool = told[start : start + _POOL]
        rows = texts.rows([text for text, _ in pool])
        cosines = texts.vectors[rows] @ texts.vectors[rows].T
        np.fill_diagonal(cosines, -1)
        nearest = np.argsort(-cosines, axis=1, kind="stable")[:, :_NEIGHBOURS]
        for at, others in enumerate(nearest):
            for other in others:
                alike = pool[at][1] == pool[other][1]
                if cosines[at, other] > _FLOOR and not (alike and unlike_only):
                    left.append(int(rows[at]))
                    right.append(int(rows[other]))
                    same.append(alike)
    return np.array(left), np.array(right), np.array(same)


def gather(data: Path, texts: Texts) -> dict[str, Labelled]:
    """All labelled pairs as rows. Repeats and weights make small sets count."""
    pairs = tuning(data)
    bank, other = banking(data)[VALIDATION_STREAM:], clinc(data)
    texts.add(text for rows in pairs.values() for pair in rows for text in pair[:2])
    texts.add(text for text, _ in (*bank, *other))
    # So few written pairs teach a projection themselves and nothing more: crossed over, what it
    # then keeps of the other half falls by four points. They weigh in the score alone.
    counts = {"quora, even rows": (3, 1.0), "kmemo, near misses": (0, 1.0), "own pairs": (0, 1.0)}
    found = {}
    for name, rows in pairs.items():
        left = texts.rows([pair[0] for pair in rows])
        right = texts.rows([pair[1] for pair in rows])
        same = np.array([pair[2] for pair in rows])
        whole = texts.fits[left] & texts.fits[right]
        found[name] = Labelled(left[whole], right[whole], same[whole], *counts[name])
    found["banking77, after the stream"] = Labelled(
        *neighbours(bank, texts, unlike_only=False), 1, 0.08
    )
    # Its intents are broad: two texts of one intent may well need two answers.
    found["clinc150, unlike only"] = Labelled(*neighbours(other, texts, unlike_only=True), 1, 0.02)
    return {name: rows for name, rows in found.items() if len(rows.same)}


# ---- the lens


def train_lens(
    vectors: Floats, sets: Iterable[Labelled], *, epochs: int = 4, rate: float = 2e-3
) -> Floats:
    """A projection under whose cosine the logistic loss of the labels is small."""
    parts = [part for part in sets for _ in range(part.repeat)]
    left = np.concatenate([part.left for part in parts])
    right = np.concatenate([part.right for part in parts])
    same = np.concatenate([part.same for part in parts]).astype(np.float32)
    _, directions = np.linalg.eigh(np.cov(vectors[np.unique(left)].T.astype(np.float64)))
    start = np.ascontiguousarray(directions[:, ::-1][:, :DIMENSIONS]).astype(np.float32)
    start *= np.sign(start[np.abs(start).argmax(axis=0), np.arange(DIMENSIONS)])
    steps = _Adam([start.copy(), np.array([15.0, -12.0], dtype=np.float32)], [rate, 50 * rate])
    dice = np.random.default_rng(SEED)
    batches = [
        batch
        for _ in range(epochs)
        for batch in np.array_split(dice.permutation(len(same)), max(1, len(same) // 256))
    ]
    for done, batch in enumerate(batches):
        matrix, (scale, shift) = steps.values
        u, v = vectors[left[batch]], vectors[right[batch]]
        p, q = u @ matrix, v @ matrix
        lengths = [np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) for x in (p, q)]
        p, q = p / lengths[0], q / lengths[1]
        cosine = (p * q).sum(axis=1)
        error = (1 / (1 + np.exp(-(scale * cosine + shift))) - same[batch]) / len(batch)
        pull = (scale * error)[:, None]
        gradient = u.T @ (pull * (q - cosine[:, None] * p) / lengths[0])
        gradient += v.T @ (pull * (p - cosine[:, None] * q) / lengths[1])
        gradient += 6e-4 * (matrix - start)
        steps.step(
            [gradient, np.array([(error * cosine).sum(), error.sum()])], 1 - done / len(batches)
        )
    return steps.values[0]


class _Adam:
    def __init__(self, values: list[Floats], rates: Sequence[float]) -> None:
        self.values = values
        self._rates = rates
        self._first = [np.zeros_like(value) for value in values]
        self._second = [np.zeros_like(value) for value in values]
        self._steps = 0

    def step(self, gradients: Sequence[Any], share: float) -> None:
        self._steps += 1
        for at, gradient in enumerate(gradients):
            self._first[at] += 0.1 * (gradient - self._first[at])
            self._second[at] += 0.001 * (gradient**2 - self._second[at])
            mean = self._first[at] / (1 - 0.9**self._steps)
            spread = np.sqrt(self._second[at] / (1 - 0.999**self._steps)) + 1e-8
            self.values[at] = (
                self.values[at] - max(0.02, share) * self._rates[at] * mean / spread
            ).astype(np.float32)


def train_lenses(vectors: Floats, sets: Mapping[str, Labelled]) -> Floats:
    """Both projections."""
    general = [part for name, part in sets.items() if name not in _TRADES]
    return np.stack(
        [
            train_lens(vectors, sets.values(), epochs=EPOCHS["all"]),
            train_lens(vectors, general, epochs=EPOCHS["general"]),
        ]
    )


def lens_of(projections: Floats) -> Lens:
    """As it will be stored."""
    return Lens(projections.astype(np.float16), np.array(OFFSETS, dtype=np.float32))


# ---- words and weights


_facts = lru_cache(200_000)(facts)


def rarity(texts: Iterable[str]) -> dict[str, float]:
    """How telling a word is: 0 in every text, 1 in one text of all; by stem."""
    count = 0
    holders: Counter[str] = Counter()
    for text in texts:
        count += 1
        holders.update(set(_facts(text).content))
    return {
        word: round(math.log(count / held) / math.log(count), 2)
        for word, held in holders.items()
        if held >= _FEWEST and not word.isdigit()
    }


def thinned(part: Labelled) -> Labelled:
    """An even sample of a large set that weighs as much as all of it."""
    step = -(-len(part.same) // _MEASURED)
    return Labelled(
        part.left[::step], part.right[::step], part.same[::step], part.repeat, part.weight * step
    )


def measured(
    part: Labelled, texts: Texts, names: Sequence[str], lenses: Mapping[int, Lens]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Features and labels of the pairs that no guard vetoes, by lenses that did not see them."""
    rows, labels = [], []
    views = {half: lens.views(texts.vectors) for half, lens in lenses.items()}
    for left, right, same in zip(part.left, part.right, part.same, strict=True):
        a, b = _facts(names[left]), _facts(names[right])
        cosine = float(texts.vectors[left] @ texts.vectors[right])
        if cosine < _FLOOR or veto(a, b) is not None:
            continue
        half = 1 - fold(names[left])
        pair = views[half][[left]], views[half][[right]]
        rows.append(score.features(cosine, float(lenses[half].compare(*pair)[0]), a, b))
        labels.append(bool(same))
    return np.array(rows).reshape(-1, len(score.FEATURES)), np.array(labels, dtype=bool)


def fold(text: str) -> int:
    return zlib.crc32(text.encode()) % 2


def regress(
    features: NDArray[np.float64], same: NDArray[np.bool_], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    """Weighted logistic regression by Newton's method, a little ridge; cosine never below zero."""
    free = np.ones(features.shape[1], dtype=bool)
    while True:
        values, bias = _newton(features[:, free], same, weight)
        full = np.zeros(features.shape[1])
        full[free] = values
        if full[0] >= 0.0:
            return full, bias
        free[0] = False


def _newton(
    features: NDArray[np.float64], same: NDArray[np.bool_], weight: NDArray[np.float64]
) -> tuple[NDArray[np.float64], float]:
    middle, spread = features.mean(axis=0), features.std(axis=0) + 1e-9
    told = np.hstack([(features - middle) / spread, np.ones((len(features), 1))])
    values = np.zeros(told.shape[1])
    ridge = np.diag([1.0] * features.shape[1] + [0.0])
    for _ in range(30):
        chance = 1 / (1 + np.exp(-told @ values))
        slope = told.T @ (weight * (chance - same)) + ridge @ values
        curve = (told * (weight * chance * (1 - chance))[:, None]).T @ told + ridge
        values = values - np.linalg.solve(curve, slope)
    return values[:-1] / spread, float(values[-1] - (values[:-1] * middle / spread).sum())


def write(report: str, weights: Sequence[float], at: float, projections: Floats) -> None:
    """Lens and weights, replaced."""
    np.savez(
        LENS,
        projections=projections.astype(np.float16),
        offsets=np.array(OFFSETS, dtype=np.float32),
    )
    lines = [f"# {line}".rstrip() for line in report.splitlines()]
    values = "\n".join(
        f"{name} = {value:.4f}" for name, value in zip(score.FEATURES, weights, strict=True)
    )
    TOML.write_text(
        "# The weights of cache_proxy/score.py, made by `python -m benchmarks.train_score`.\n"
        + "\n".join(lines)
        + f"\n\nthreshold = {_THRESHOLD}\nat = {at:.4f}  # the sum that means `threshold`\n"
        f"slope = 1.0\n\n[weights]\n{values}\n",
        "utf-8",
    )


def write_rarity(table: Mapping[str, float]) -> None:
    by_value: dict[float, list[str]] = {}
    for word, value in table.items():
        by_value.setdefault(value, []).append(word.replace(" ", "_"))
    lines = [
        f"{value:.2f} {' '.join(sorted(words)[at : at + 40])}"
        for value, words in sorted(by_value.items())
        for at in range(0, len(words), 40)
    ]
    RARITY.write_text(
        "# How telling a word is, 0 in every text and 1 in one of all; stems, counted in the"
        " tuning\n# texts by benchmarks/train_score.py.\n" + "\n".join(lines) + "\n",
        "utf-8",
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=PUBLIC_FOLDER)
    parser.add_argument("--cache", type=Path, help="keep vectors here")
    parser.add_argument("--write", action="store_true", help="replace the files of the package")
    told = parser.parse_args()
    texts = Texts(told.cache)
    sets = gather(told.data, texts)
    names = texts.names()
    used = sorted({int(row) for part in sets.values() for row in (*part.left, *part.right)})
    table = rarity(names[row] for row in used)
    if told.write:
        write_rarity(table)
    lexicon.RARITY = table
    halves = {
        half: lens_of(
            train_lenses(
                texts.vectors,
                {
                    name: Labelled(part.left[mine], part.right[mine], part.same[mine], *part[3:])
                    for name, part in sets.items()
                    for mine in [np.array([fold(names[row]) == half for row in part.left])]
                },
            )
        )
        for half in (0, 1)
    }
    fitted = {name: thinned(part) for name, part in sets.items()}
    parts = {name: measured(part, texts, names, halves) for name, part in fitted.items()}
    features = np.concatenate([rows for rows, _ in parts.values()])
    same = np.concatenate([labels for _, labels in parts.values()])
    weight = np.concatenate(
        [np.full(len(labels), fitted[name].weight) for name, (_, labels) in parts.items()]
    )
    values, bias = regress(features, same, weight)
    unit = values[0] + values[1]
    values, bias = values / unit, bias / unit
    rows, labels = parts["quora, even rows"]
    unlike = sets["quora, even rows"].same.size - int(sets["quora, even rows"].same.sum())
    wrong = np.sort((rows @ values)[~labels])[::-1]
    at = float(wrong[int(_BUDGET * unlike)])
    served = (rows @ values)[labels] > at
    lines = [f"Trained {datetime.date.today().isoformat()} for {texts.encoder.name} on:"]
    lines += [
        f"  {name}: {len(part.same):,} pairs, {int(part.same.sum()):,} alike"
        for name, part in sets.items()
    ]
    alike = served.sum() / sets["quora, even rows"].same.sum()
    lines.append(
        f"`at` serves {_BUDGET:.1%} of the unlike and {alike:.1%} of the alike Quora tuning pairs."
    )
    report = "\n".join(lines)
    print(report)
    print(dict(zip(score.FEATURES, np.round(values, 4).tolist(), strict=True)), f"at {at:.4f}")
    if told.write:
        write(report, values.tolist(), at, train_lenses(texts.vectors, sets))


if __name__ == "__main__":
    main()
