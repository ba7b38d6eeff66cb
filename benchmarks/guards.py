"""Measures the guards: what is kept and what slips through at a threshold, with and without them.

    python benchmarks/guards.py DATA [--model NAME] [--threshold 0.92] [--rows 6000]

DATA is a folder of labelled pairs: quora/pairs.jsonl.gz, kmemo/*.json,
cannot/sem_anto_neg.tsv and gsmplus/first_half.jsonl.gz; sets that are not there are left out.
Prints a line a set and, below it, what each guard caught; then the cost of the chain.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache_proxy.gist import gist, unpack
from cache_proxy.guards import GUARDS, Facts, facts, veto
from cache_proxy.score import adjusted
from embeddings import load
from embeddings.vectors import Floats


class Pair(NamedTuple):
    one: str
    other: str
    same: bool


Similarities = Callable[[Sequence[Pair]], list[float]]


def quora(data: Path) -> Iterator[Pair]:
    with gzip.open(data / "quora/pairs.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield Pair(row["a"], row["b"], bool(row["same"]))


def near_misses(data: Path) -> Iterator[Pair]:
    for path in sorted((data / "kmemo").glob("*.json")):
        for row in json.loads(path.read_text(encoding="utf-8"))["pairs"]:
            yield Pair(row["a"], row["b"], bool(row["shouldMatch"]))


def negations(data: Path) -> Iterator[Pair]:
    lines = (data / "cannot/sem_anto_neg.tsv").read_text(encoding="utf-8").splitlines()
    for line in lines[1:]:
        one, other, contradicts = line.split("\t")
        yield Pair(one, other, contradicts != "1")  # 1 marks a contradiction in this file


def sums(data: Path) -> Iterator[Pair]:
    with gzip.open(data / "gsmplus/first_half.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            same = row["seed_answer"] == row["answer"]
            yield Pair(row["seed_question"], row["question"], same)


SETS: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "quora": quora,
    "near misses": near_misses,
    "negations": negations,
    "sums": sums,
}


def encoder(name: str) -> Similarities:
    """The cosine of each pair under the model that would serve; 0 where it cannot see all."""
    with tempfile.TemporaryDirectory() as folder:
        model = load(name, Path(folder))

    def similarities(pairs: Sequence[Pair]) -> list[float]:
        texts = sorted({text for pair in pairs for text in pair[:2]}, key=len)
        rows: dict[str, Floats] = {}
        for start in range(0, len(texts), 64):
            batch = texts[start : start + 64]
            encoded = model.encode(batch)
            seen = zip(batch, encoded.vectors, encoded.truncated, strict=True)
            rows |= {text: vector * (not cut) for text, vector, cut in seen}
        return [float(rows[one] @ rows[other]) for one, other, _ in pairs]

    return similarities


def measure(name: str, pairs: Sequence[Pair], scores: Sequence[float], threshold: float) -> None:
    genuine = max(1, sum(pair.same for pair in pairs))
    traps = max(1, len(pairs) - sum(pair.same for pair in pairs))
    near = [pair for pair, score in zip(pairs, scores, strict=True) if score >= threshold]
    verdicts = [(pair.same, veto(facts(pair.one), facts(pair.other))) for pair in near]
    kept = sum(same for same, guard in verdicts if guard is None)
    wrong = sum(not same for same, guard in verdicts if guard is None)
    before = sum(pair.same for pair in near)
    print(
        f"{name:12} cosine only: kept {before / genuine:6.1%}"
        f" wrong {(len(near) - before) / traps:6.1%}"
        f"   with guards: kept {kept / genuine:6.1%} wrong {wrong / traps:6.2%}"
    )
    caught = Counter((guard, same) for same, guard in verdicts if guard)
    for guard in sorted({guard for guard, _ in caught}):
        print(f"    {guard:13} traps {caught[guard, False]:5}  genuine {caught[guard, True]:5}")


def cost(pairs: Sequence[Pair], shortest: int, longest: int) -> None:
    """CPU time of pairs whose texts have so many characters, the quickest of some rounds."""
    near = [pair for pair in pairs if all(shortest <= len(t) <= longest for t in pair[:2])][-200:]
    texts = [(text,) for pair in near for text in pair[:2]]
    known = [(facts(pair.one), facts(pair.other)) for pair in near]
    kept = [(gist(pair.other),) for pair in near]
    print(f"cost at {shortest} to {longest} characters, {len(near)} pairs:", end=" ")
    print(f"facts {_microseconds(facts, texts):.0f} us a text; a candidate:", end=" ")
    print(f"unpacking {_microseconds(unpack, kept):.0f} us,", end=" ")
    print(f"score {_microseconds(lambda a, b: adjusted(0.9, 0.9, a, b), known):.0f} us,", end=" ")
    print(f"all guards {_microseconds(_ask_all, known):.0f} us")


def _ask_all(one: Facts, other: Facts) -> None:
    # None is allowed to end the chain: the dearest a candidate can be.
    for guard in GUARDS.values():
        guard(one, other)


def _microseconds(work: Callable[..., object], arguments: Sequence[tuple[Any, ...]]) -> float:
    """Of CPU for one; each one's best of 15 rounds, so that a busy machine does not blur it."""
    best = [float("inf")] * len(arguments)
    for _ in range(15):
        for at, given in enumerate(arguments):
            began = time.thread_time_ns()
            work(*given)
            best[at] = min(best[at], time.thread_time_ns() - began)
    return sum(best) / max(1, len(best)) / 1_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path)
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--threshold", type=float, default=0.92)
    parser.add_argument("--rows", type=int, default=6000, help="of each set, at most")
    told = parser.parse_args()
    similarities = encoder(told.model)
    seen: list[Pair] = []
    for name, read in SETS.items():
        try:
            pairs = list(read(told.data))[: told.rows]
        except FileNotFoundError:
            continue
        measure(name, pairs, similarities(pairs), told.threshold)
        seen += pairs
    cost(seen, 50, 70)
    cost(seen, 150, 250)


if __name__ == "__main__":
    main()
