"""How often is it right: what is kept and what is wrongly served, by policy and data set.

    python -m benchmarks.accuracy [--data ../shared/data] [--cache FOLDER] [--json]
                                  [--threshold 0.92] [--stream FILE] [--seeds 77 78] [--limit N]

Every verdict comes from `decisions.choose` with the shipped model, lens, guards and weights, over a
store in memory. Pairs: one text is stored, the other asked. Streams: prompts come one after the
other, what misses is stored under its right answer. Only rows that `benchmarks/train_score.py` did
not see are measured, our own held-out pairs among them; `own pairs, tuning` stands beside them to
show how much tuning flatters. No weight was fitted to them, but a few choices were made by looking
at their figures (epochs, offset and budget in `train_score`; window and support in `decisions`; of
our held-out pairs the kinds that leaked), so they flatter a little too. Public sets that are not
there are left out. Intervals are exact (Clopper-Pearson), 95 %. About two minutes with --cache,
where the vectors are kept.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from benchmarks import hit_rate, train_score
from benchmarks.pairs import (
    HELD_OUT_FILES,
    PUBLIC_FOLDER,
    TUNING_FILES,
    Pair,
    load,
    load_held_out,
)
from cache_proxy import decisions, wording
from cache_proxy.certify import interval
from cache_proxy.guards import GUARDS
from cache_proxy.model import Candidate, Directives, Entry, Hit, Miss, Policy
from embeddings.lens import Lens, open_lens
from embeddings.models import PACKAGED
from embeddings.vectors import Floats

THRESHOLDS = (0.80, 0.84, 0.88, 0.90, 0.92, 0.94, 0.96, 0.98)
_NOW = 1_800_000_000
_ASKED = Directives()
_SAMPLE = 6_000  # pairs of one set at most


@dataclass(frozen=True, slots=True)
class Rules:
    """A policy under test. `plain` is what most caches do: the nearest, if near enough."""

    guards: bool
    learned: bool
    agreement: bool
    languages: bool = True


POLICIES: Mapping[str, Rules] = {
    "cosine": Rules(guards=False, learned=False, agreement=False, languages=False),
    "guards": Rules(guards=True, learned=False, agreement=False),
    "guards + score": Rules(guards=True, learned=True, agreement=False),
    "as shipped": Rules(guards=True, learned=True, agreement=True),
}


@dataclass(slots=True)
class Row:
    """One policy on one set of pairs."""

    policy: str
    data: str
    alike: int
    kept: int
    unlike: int
    wrong: int
    kinds: dict[str, tuple[int, int]] = field(default_factory=dict)  # kind -> served, asked


@dataclass(slots=True)
class Replay:
    """One policy on one stream."""

    policy: str
    data: str
    requests: int
    exact: int
    semantic: int
    wrong: int
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def hits(self) -> int:
        return self.exact + self.semantic


class Bench:
    """An encoder, by default the shipped one with its lens, over texts known beforehand; judges as
    the proxy does."""

    def __init__(self, texts: train_score.Texts) -> None:
        self._texts = texts
        self.languages = texts.encoder.languages
        self.lens: Lens | None = None
        if texts.encoder.name == PACKAGED:
            self.lens = open_lens(train_score.LENS.parent, texts.encoder.dimension)
        self._views = self._seen()

    def know(self, texts: Iterable[str]) -> None:
        self._texts.add(texts)
        self._views = self._seen()

    def _seen(self) -> Floats:
        """What the lens makes of the vectors; without one, nothing of use."""
        return self.lens.views(self._texts.vectors) if self.lens else self._texts.vectors

    def rows(self, texts: Sequence[str]) -> tuple[Floats, Floats, Sequence[bool]]:
        """Vectors, what the lens makes of them, and whether the whole text fitted."""
        at = self._texts.rows(texts)
        return self._texts.vectors[at], self._views[at], self._texts.fits[at].tolist()


def verdict(
    rules: Rules,
    text: str,
    candidates: Sequence[Candidate],
    threshold: float,
    languages: frozenset[str] | None,
) -> Hit | Miss:
    """What the proxy would say, less the parts that `rules` leaves out."""
    known = languages is None or wording.language(text) in (*languages, "")
    if rules.languages and not known:
        return Miss("language")
    policy = Policy(
        threshold=threshold,
        guards_off=frozenset() if rules.guards else frozenset(GUARDS),
        agreement=rules.agreement,
    )
    return decisions.choose(text, candidates, _ASKED, policy, _NOW, bytes.decode)


def entry(text: str, answer: str) -> Entry:
    return Entry(
        digest=text.encode(), partition=b"", fingerprint=b"", epoch=0, created=_NOW,
        expires=_NOW + 1, text=text, model="", provider="", tenant="", namespace="", tags=(),
        usage=None, cost=None, body=answer.encode(),
    )  # fmt: skip


# ---- pairs


def pair_sets(data: Path, limit: int = _SAMPLE) -> Iterator[tuple[str, list[Pair]]]:
    """What training has not seen, and our own tuning pairs for comparison; of larger sets a sample,
    the same one every time. Sets that are not there are left out."""
    for name, pairs in _pair_sets(data):
        if pairs:
            dice = random.Random(train_score.SEED)
            yield name, dice.sample(pairs, limit) if len(pairs) > limit else pairs


def _pair_sets(data: Path) -> Iterator[tuple[str, list[Pair]]]:
    yield "quora, odd rows", load("quora", data)[1::2]
    yield "kmemo, held out", _kmemo(data)
    yield "gsmplus", load("gsmplus", data)
    yield "cannot", load("cannot", data)
    yield "xquad vi", load("xquad", data)
    for name in TUNING_FILES:
        yield f"own {name.removesuffix('.jsonl')}, tuning", load(name)
    for name in HELD_OUT_FILES:
        short = name.removeprefix("held_out.").removesuffix(".jsonl")
        yield f"own {short}, held out", load_held_out(name)


def _kmemo(data: Path) -> list[Pair]:
    if not (data / "kmemo").exists():
        return []
    trained = {(pair[0], pair[1]) for pair in train_score.tuning(data)["kmemo, near misses"]}
    return [pair for pair in load("kmemo", data) if (pair.a, pair.b) not in trained]


def measure_pairs(
    bench: Bench,
    name: str,
    pairs: Sequence[Pair],
    thresholds: Sequence[float],
    policies: Mapping[str, Rules] = POLICIES,
) -> Iterator[tuple[float, Row]]:
    """A row for each policy and threshold. Either text may come first; here `a` is stored."""
    bench.know(text for pair in pairs for text in (pair.a, pair.b))
    left, left_seen, left_fits = bench.rows([pair.a for pair in pairs])
    right, right_seen, right_fits = bench.rows([pair.b for pair in pairs])
    cosines = (left * right).sum(axis=1).tolist()
    learned: Sequence[float | None] = [None] * len(pairs)
    if bench.lens:
        learned = bench.lens.compare(left_seen, right_seen).tolist()
    for policy, rules in policies.items():
        scores = [
            _least_threshold(rules, pair, cosine, seen, bench.languages)
            if fits and fitted
            else -1.0
            for pair, cosine, seen, fits, fitted in zip(
                pairs, cosines, learned, left_fits, right_fits, strict=True
            )
        ]
        for threshold in thresholds:
            yield threshold, _row(policy, name, pairs, [s >= threshold for s in scores])


def _least_threshold(
    rules: Rules,
    pair: Pair,
    cosine: float,
    learned: float | None,
    languages: frozenset[str] | None,
) -> float:
    """The highest threshold at which the pair is served; -1 where it never is."""
    seen = None if learned is None or not rules.learned else min(1.0, learned)
    candidate = Candidate(entry(pair.a, "a"), min(1.0, cosine), learned=seen)
    found = verdict(rules, pair.b, [candidate], 0.0, languages)
    return found.similarity if isinstance(found, Hit) else -1.0


def _row(policy: str, name: str, pairs: Sequence[Pair], served: Sequence[bool]) -> Row:
    kinds: defaultdict[str, list[bool]] = defaultdict(list)
    for pair, hit in zip(pairs, served, strict=True):
        kinds[f"{'kept' if pair.same else 'wrong'} {pair.kind}".strip()].append(hit)
    right = [hit for pair, hit in zip(pairs, served, strict=True) if pair.same]
    wrong = [hit for pair, hit in zip(pairs, served, strict=True) if not pair.same]
    return Row(
        policy, name, len(right), sum(right), len(wrong), sum(wrong),
        {kind: (sum(hits), len(hits)) for kind, hits in sorted(kinds.items())},
    )  # fmt: skip


# ---- streams


def streams(
    data: Path, seeds: Sequence[int], given: Path | None, limit: int = _SAMPLE
) -> Iterator[tuple[str, list[hit_rate.Line]]]:
    """Prompts with the answer that is right for each, the first `limit` of each stream."""
    most = min(limit, train_score.VALIDATION_STREAM)
    bank = train_score.banking(data)[:most]
    for seed in seeds if bank else ():
        lines = [hit_rate.Line(text, intent) for text, intent in bank]
        random.Random(seed).shuffle(lines)
        yield f"banking77, first {len(lines):,}, order {seed}", lines
    # Its intents took no part in training but as strangers to each other.
    other = [hit_rate.Line(*row) for row in train_score.clinc(data)[:most]]
    if other:
        yield f"clinc150, {len(other):,}", other
    yield "support", hit_rate.read_stream(hit_rate.OWN_STREAM, limit)
    if given is not None:
        yield given.name, hit_rate.read_stream(given, limit)


def replay(
    bench: Bench, policy: str, name: str, lines: Sequence[hit_rate.Line], threshold: float
) -> Replay:
    """From an empty store; a bypass or a miss is answered rightly, and a miss is stored."""
    rules = POLICIES[policy]
    vectors, seen, fits = bench.rows([line.text for line in lines])
    found = Replay(policy, name, len(lines), 0, 0, 0)
    reasons: Counter[str] = Counter()
    stored: list[int] = []
    exact: dict[str, str] = {}
    for at, line in enumerate(lines):
        if rules.languages and wording.time_bound(line.text):
            reasons["time_bound"] += 1
            continue
        if line.text in exact:
            found.exact += 1
            found.wrong += exact[line.text] != line.answer_id
            continue
        said: Hit | Miss = Miss("anaphoric")
        if fits[at] and not (rules.languages and wording.anaphoric(line.text)):
            lens = bench.lens if rules.learned else None
            candidates = _nearest(lines, vectors, seen, stored, at, lens)
            said = verdict(rules, line.text, candidates, threshold, bench.languages)
        if isinstance(said, Hit):
            found.semantic += 1
            found.wrong += said.entry.body.decode() != line.answer_id
            continue
        reasons[said.reason] += 1
        exact[line.text] = line.answer_id
        if fits[at]:
            stored.append(at)
    found.reasons = dict(reasons.most_common())
    return found


def _nearest(
    lines: Sequence[hit_rate.Line],
    vectors: Floats,
    seen: Floats,
    stored: Sequence[int],
    at: int,
    lens: Lens | None,
) -> list[Candidate]:
    if not stored:
        return []
    cosines = vectors[stored] @ vectors[at]
    best = np.argsort(-cosines, kind="stable")[: Policy().neighbours]
    rows = [stored[near] for near in best.tolist()]
    learned = lens.compare(seen[[at]], seen[rows]).tolist() if lens else [None] * len(rows)
    return [
        Candidate(
            entry(lines[row].text, lines[row].answer_id),
            min(1.0, float(cosines[near])),
            learned=similar,
        )
        for near, row, similar in zip(best.tolist(), rows, learned, strict=True)
    ]


# ---- the table


def share(part: int, whole: int) -> str:
    """ "1.2% (0.5% to 2.9%)": the exact 95 % interval."""
    if not whole:
        return "-"
    found = interval(part, whole)
    return f"{part / whole:.1%} ({found.low:.1%} to {found.high:.1%})"


def run(
    bench: Bench, data: Path, threshold: float, seeds: Sequence[int], given: Path | None,
    limit: int = _SAMPLE, progress: Callable[[str], None] = lambda _: None,
) -> tuple[list[Row], list[Replay]]:  # fmt: skip
    rows: list[Row] = []
    for name, pairs in pair_sets(data, limit):
        progress(name)
        rows += [row for _, row in measure_pairs(bench, name, pairs, [threshold])]
    replays: list[Replay] = []
    for name, lines in streams(data, seeds, given, limit):
        progress(name)
        bench.know(line.text for line in lines)
        replays += [replay(bench, policy, name, lines, threshold) for policy in POLICIES]
    return rows, replays


def table(rows: Sequence[Row], replays: Sequence[Replay]) -> str:
    lines = [f"{'pairs':26}{'policy':16}{'alike, kept':30}unlike, served"]
    for row in rows:
        kept, wrong = share(row.kept, row.alike), share(row.wrong, row.unlike)
        lines.append(f"{row.data:26}{row.policy:16}{kept:30}{wrong}")
    lines += ["", f"{'stream':38}{'policy':16}{'hit rate':30}wrong, of the hits"]
    for told in replays:
        hits, wrong = share(told.hits, told.requests), share(told.wrong, told.hits)
        lines.append(f"{told.data:38}{told.policy:16}{hits:30}{wrong}")
    lines += ["", "as shipped, by kind: served / asked"]
    for row in rows:
        if row.policy == "as shipped" and len(row.kinds) > 2:
            told_kinds = ", ".join(f"{kind} {hit}/{of}" for kind, (hit, of) in row.kinds.items())
            lines.append(f"{row.data}: {told_kinds}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=PUBLIC_FOLDER)
    parser.add_argument("--cache", type=Path, help="keep vectors here")
    parser.add_argument("--threshold", type=float, default=0.92)
    parser.add_argument("--stream", type=Path, help="another stream, as benchmarks.hit_rate reads")
    parser.add_argument("--seeds", type=int, nargs="+", default=[77])
    parser.add_argument("--limit", type=int, default=_SAMPLE, help="of each set, at most")
    parser.add_argument("--json", action="store_true")
    told = parser.parse_args()
    bench = Bench(train_score.Texts(told.cache))
    began = time.perf_counter()
    given = told.threshold, told.seeds, told.stream, told.limit
    rows, replays = run(bench, told.data, *given)
    if told.json:
        said = {
            "threshold": told.threshold,
            "pairs": [asdict(row) for row in rows],
            "streams": [asdict(one) | {"hits": one.hits} for one in replays],
        }
        print(json.dumps(said, indent=2))
    else:
        print(table(rows, replays))
        print(f"\nthreshold {told.threshold}, {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
