"""`cache-proxy tune`: which threshold keeps the budget of wrong hits, on one's own labelled pairs.

Scores each pair the way serving would: same encoder, same rounding, same guards, and no score at
all for what serving never matches by meaning. Reads one file, prints, stores nothing, and never
shows a text.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
from rich import box
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from embeddings import Encoder, EncoderError, pack, unpack

from . import canonical, certify, decisions, guards
from .certify import Certificate, Count, NotCertifiable, Pair
from .errors import ConfigError
from .model import Directives, Policy, Prompt, Request
from .score import adjusted
from .settings import Settings
from .wiring import open_encoder, policy

__all__ = [
    "CONFIDENCE",
    "Tuned",
    "Unserved",
    "as_json",
    "judge",
    "read",
    "render",
    "run",
    "score",
    "tune",
]

CONFIDENCE = 0.95

_AT_ONCE = 64  # texts between two looks at the progress bar, and at the keyboard
_SHOWN = 2  # every second candidate is a row of the table, 0.01 apart; JSON has all of them


@dataclass(frozen=True, slots=True)
class Unserved:
    """Serving would never let this pair share an answer by meaning."""

    why: str  # "exact", "closed", "window" or the name of the guard that objects


Judged = Mapping[Pair, float | Unserved]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What the pairs say. All but `repeated` and `tuned_on` is of the part that certifies."""

    model: str
    budget: float
    confidence: float
    verdict: Certificate | NotCertifiable
    counts: tuple[Count, ...]  # of every candidate, asked or not
    began: float  # the threshold that the scan began at
    pairs: int
    genuine: int  # of them the same, those that match exactly left out
    unserved: Mapping[str, int]  # reason -> pairs
    tuned_on: int
    repeated: int  # left out of both parts


def run(
    pairs_file: Path, budget: float, settings: Settings, console: Console, json_out: bool = False
) -> bool:
    """Tune and print; whether a threshold was certified. Raises ConfigError."""
    tuned = tune(pairs_file, budget, settings)
    if json_out:
        console.out(orjson.dumps(as_json(tuned), option=orjson.OPT_INDENT_2).decode())
    else:
        console.print(render(tuned))
    return isinstance(tuned.verdict, Certificate)


def tune(
    pairs_file: Path, budget: float, settings: Settings, confidence: float = CONFIDENCE
) -> Tuned:
    """Read, encode, score, split, scan. Raises ConfigError."""
    if not 0 < budget < 1:
        raise ConfigError("budget: is a share of hits above 0 and below 1, such as 0.01.")
    pairs, repeated = read(pairs_file)
    encoder = open_encoder(settings)
    if encoder is None:
        raise ConfigError("model: tuning needs an encoder, and `none` is set.")
    judged = judge(pairs, encoder, policy(settings, encoder))
    tuning, certifying = certify.split(pairs)
    candidates = certify.plan(_scored(tuning, judged), budget, confidence)
    scored = _scored(certifying, judged)
    unserved = {
        pair: found.why for pair in certifying if isinstance(found := judged[pair], Unserved)
    }
    return Tuned(
        model=encoder.name,
        budget=budget,
        confidence=confidence,
        verdict=certify.certify(scored, budget, confidence, candidates),
        counts=certify.count(scored, certify.CANDIDATES),
        began=candidates[0],
        pairs=len(certifying),
        genuine=sum(pair.same for pair in certifying if unserved.get(pair) != "exact"),
        unserved=Counter(unserved.values()),
        tuned_on=len(tuning),
        repeated=repeated,
    )


def _scored(pairs: Iterable[Pair], judged: Judged) -> list[certify.Scored]:
    return [(found, pair.same) for pair in pairs if isinstance(found := judged[pair], float)]


# --- the file -----------------------------------------------------------------------------------


def read(path: Path) -> tuple[list[Pair], int]:
    """The pairs of a JSONL file, each once, and how many more lines told one of them again.

    Two texts told twice are one piece of evidence, not two; where their labels disagree, they are
    not the same. Raises ConfigError, with the line's number and never its text.
    """
    labels: dict[tuple[str, str], bool] = {}
    repeated = 0
    for number, line in _lines(path):
        a, b, same = _pair(line, number)
        texts = (b, a) if (b, a) in labels else (a, b)
        repeated += texts in labels
        labels[texts] = same and labels.get(texts, True)
    if not labels:
        raise ConfigError(f"pairs: there are none in {path}.")
    return [Pair(a, b, same) for (a, b), same in labels.items()], repeated


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that hold something, numbered from 1; a name in `.gz` is unpacked."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                told = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if told.strip():
                    yield number, told
    except FileNotFoundError:
        raise ConfigError(f"pairs: there is no file {path}.") from None
    except (OSError, EOFError, zlib.error) as exc:
        raise ConfigError(f"pairs: {path} cannot be read: {exc}.") from None


def _pair(line: bytes, number: int) -> Pair:
    try:
        told = orjson.loads(line)
    except orjson.JSONDecodeError:
        raise ConfigError(f"pairs: line {number} is not JSON.") from None
    match told:
        case {"a": str(a), "b": str(b), "same": (bool() | 0 | 1) as same}:
            return Pair(canonical.clean(a), canonical.clean(b), bool(same))
    form = '{"a": "...", "b": "...", "same": true}'
    raise ConfigError(f"pairs: line {number} is not of the form {form}.")


# --- the way serving scores ---------------------------------------------------------------------


def score(
    a: str, b: str, cosine: float, chosen: Policy, learned: float | None = None
) -> float | Unserved:
    """What serving would hold against the threshold for two texts that may meet by meaning."""
    asked, stored = guards.facts(a), guards.facts(b)
    objection = guards.veto(asked, stored, chosen.guards_off)
    return adjusted(cosine, learned, asked, stored) if objection is None else Unserved(objection)


def judge(pairs: Collection[Pair], encoder: Encoder, chosen: Policy) -> Judged:
    """Every pair's score, or why it has none. Raises ConfigError."""
    texts = {text for pair in pairs if pair.a != pair.b for text in pair[:2]}
    # In order, so that the same file is encoded in the same company every time.
    vectors = _vectors(sorted(text for text in texts if _open(text, chosen)), encoder)

    def judged(pair: Pair) -> float | Unserved:
        if pair.a == pair.b:
            return Unserved("exact")  # found by its name: no evidence about meaning
        if pair.a not in vectors or pair.b not in vectors:
            return Unserved("closed")
        one, other = vectors[pair.a], vectors[pair.b]
        if not one or not other:
            return Unserved("window")
        learned = encoder.lens.similarities(one, [other])[0] if encoder.lens else None
        return score(pair.a, pair.b, float(unpack(one) @ unpack(other)), chosen, learned)

    return {pair: judged(pair) for pair in pairs}


def _open(text: str, chosen: Policy) -> bool:
    """Whether serving would match this text by meaning, were it all of a plain chat request."""
    request = Request(
        operation="chat",
        model="",
        stream=False,
        include_usage=False,
        text=text,
        rest=b"",
        turns=1,
        declares_tools=False,
        tool_turns=False,
        other_parts=False,
        web_search=False,
        choices=1,
        temperature=None,
        end_user=None,
    )
    admitted = decisions.admit(request, Directives(), chosen)
    return isinstance(admitted, Prompt) and not decisions.closed(request, Directives(), chosen)


def _vectors(texts: list[str], encoder: Encoder) -> dict[str, bytes]:
    """Each text's vector in its stored form, empty when the text is past the window."""
    vectors: dict[str, bytes] = {}
    screen = Console(stderr=True)
    starts = range(0, len(texts), _AT_ONCE)
    for start in track(
        starts, "encoding", console=screen, transient=True, disable=not screen.is_terminal
    ):
        some = texts[start : start + _AT_ONCE]
        try:
            encoded = encoder.encode(some)
        except EncoderError as exc:
            raise ConfigError(f"model: {exc}.") from exc
        for text, vector, cut in zip(some, encoded.vectors, encoded.truncated, strict=True):
            # Rounded as the index and the store round it.
            vectors[text] = b"" if cut else pack(vector)
    return vectors


# --- what is printed ----------------------------------------------------------------------------


def as_json(tuned: Tuned) -> dict[str, Any]:
    """The documented shape of `--json`; shares are fractions of one."""
    verdict = tuned.verdict
    certified = verdict if isinstance(verdict, Certificate) else None
    return {
        "certified": certified is not None,
        "threshold": certified and certified.threshold,
        "upper_bound": certified and _up(certified.bound),
        "served": certified and certified.served,
        "wrong": certified and certified.wrong,
        "needed": _needed(verdict) if isinstance(verdict, NotCertifiable) else None,
        "budget": tuned.budget,
        "confidence": tuned.confidence,
        "model": tuned.model,
        "pairs": {
            "certify": tuned.pairs,
            "genuine": tuned.genuine,
            "tune": tuned.tuned_on,
            "repeated": tuned.repeated,
            "unserved": dict(sorted(tuned.unserved.items())),
        },
        "began": tuned.began,
        "candidates": [
            {
                "threshold": known.threshold,
                "served": known.served,
                "wrong": known.wrong,
                "share": _share(known.wrong, known.served),
                "upper_bound": _up(_bound(known, tuned)),
                "kept": _share(known.served - known.wrong, tuned.genuine),
            }
            for known in tuned.counts
        ],
    }


def render(tuned: Tuned) -> RenderableType:
    """The table, what it rests on, and the verdict."""
    return Group(_table(tuned), *_rests_on(tuned), _verdict(tuned))


def _table(tuned: Tuned) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("threshold", "served", "wrong", "share", "upper bound", "kept"):
        table.add_column(name, justify="right")
    table.add_column("")
    certified = tuned.verdict.threshold if isinstance(tuned.verdict, Certificate) else None
    for row, known in enumerate(tuned.counts):
        marked = known.threshold in (certified, tuned.began)
        if row % _SHOWN and not marked:
            continue
        notes = ["the scan began here"] if known.threshold == tuned.began else []
        notes += ["certified"] if known.threshold == certified else []
        table.add_row(
            f"{known.threshold:.3f}",
            f"{known.served:,}",
            f"{known.wrong:,}",
            _percent(_share(known.wrong, known.served)),
            _percent_up(_bound(known, tuned)),
            _percent(_share(known.served - known.wrong, tuned.genuine)),
            ", ".join(notes),
            style="bold green" if known.threshold == certified else None,
        )
    return table


def _rests_on(tuned: Tuned) -> Iterator[Text]:
    yield Text(
        f"{tuned.pairs:,} pairs certify, {tuned.genuine:,} of them the same;"
        f" {tuned.tuned_on:,} others chose where to begin; {tuned.repeated:,} repeats left out",
        "dim",
    )
    if tuned.unserved:
        most = sorted(tuned.unserved.items(), key=lambda item: (-item[1], item[0]))
        reasons = ", ".join(f"{why} {pairs:,}" for why, pairs in most)
        yield Text(f"never served by meaning under {tuned.model}: {reasons}", "dim")


def _verdict(tuned: Tuned) -> Text:
    match tuned.verdict:
        case Certificate(threshold, served, _, bound):
            sure = f"{tuned.confidence * 100:.4g} %"
            text = (
                f"certified threshold {threshold:.3f} (upper bound {_percent_up(bound)} at {sure},"
                f" {served:,} labelled hits)"
            )
            return Text(text, "bold green")
        case NotCertifiable():
            more = f"about {_needed(tuned.verdict):,} more clean labelled hits are needed"
            return Text(f"cannot be certified on this data: {more}", "bold yellow")


def _needed(verdict: NotCertifiable) -> int:
    """Of new hits only some come to certify; the others go to the part that is tuned on."""
    return math.ceil(verdict.needed / (1 - certify.TUNE_SHARE))


def _bound(known: Count, tuned: Tuned) -> float:
    return certify.upper_bound(known.wrong, known.served, tuned.confidence)


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 6) if whole else None


def _up(bound: float) -> float:
    """Six decimals that never say less than the bound."""
    return math.ceil(bound * 1e6) / 1e6


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share * 100:.1f} %"


def _percent_up(bound: float) -> str:
    return f"{math.ceil(round(bound * 1e3, 6)) / 10:.1f} %"
