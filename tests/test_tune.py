"""The promise of `cache-proxy tune`: it scores as serving does, and says what can be said."""

from __future__ import annotations

import gzip
import io
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cache_proxy import certify
from cache_proxy import settings as configuration
from cache_proxy.certify import Certificate, Count, NotCertifiable, Pair
from cache_proxy.errors import ConfigError
from cache_proxy.model import Policy
from cache_proxy.settings import Settings
from cache_proxy.tune import Tuned, Unserved, as_json, judge, read, render, run, score, tune
from cache_proxy.wiring import open_encoder, policy
from embeddings import Encoder
from tests.conftest import World

VERBS = ("reset", "change", "find", "print", "share", "export", "delete", "rename", "archive")
THINGS = ("password", "invoice", "calendar", "address", "playlist", "signature", "photo", "report")
REWORDED = [
    Pair(f"How do I {verb} my {thing}?", f"How can I {verb} my {thing}?", True)
    for verb in VERBS
    for thing in THINGS
]
TRAPS = [
    Pair(f"How do I {verb} my {thing}?", f"How do I {verb} my {other}?", False)
    for verb in VERBS
    for thing, other in pairwise(THINGS)
]


def written(path: Path, pairs: list[Pair]) -> Path:
    lines = [json.dumps({"a": a, "b": b, "same": same}) for a, b, same in pairs]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def settings(tmp_path: Path, **flags: Any) -> Settings:
    return configuration.load(data_dir=tmp_path / "data", **flags)


def printed(
    path: Path, budget: float, chosen: Settings, json_out: bool = False
) -> tuple[bool, str]:
    """Whether it was certified, and what came out."""
    out = io.StringIO()
    certified = run(path, budget, chosen, Console(file=out, width=110), json_out)
    return certified, out.getvalue()


# --- reading ------------------------------------------------------------------------------------


def test_pairs_are_read_from_lines_plain_or_packed(tmp_path: Path) -> None:
    """Labels as true or 1, blank lines, a byte order mark and further fields do no harm."""
    lines = '\ufeff{"a": " x ", "b": "y", "same": true, "id": 7}\n\n{"a":"u","b":"v","same":0}'
    plain, packed = tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl.gz"
    plain.write_text(lines, "utf-8")
    packed.write_bytes(gzip.compress(lines.encode()))
    assert read(plain) == read(packed) == ([Pair("x", "y", True), Pair("u", "v", False)], 0)


def test_a_pair_told_twice_counts_once(tmp_path: Path) -> None:
    """The same evidence again is no evidence; where labels disagree the pair is not the same."""
    twice = [Pair("a", "b", True), Pair("b", "a", True)]
    disagree = [Pair("c", "d", True), Pair("d", "c", False), Pair("d", "c", True)]
    found, repeated = read(written(tmp_path / "pairs.jsonl", twice + disagree))
    assert found == [Pair("a", "b", True), Pair("c", "d", False)]
    assert repeated == 3


@pytest.mark.parametrize(
    "bad",
    [
        "not json at all: hunter2",
        '{"a": "hunter2", "b": "x"}',
        '{"a": "hunter2", "b": "x", "same": "yes"}',
        '{"a": "hunter2", "b": "x", "same": 2}',
        '{"a": "hunter2", "b": null, "same": true}',
        '["hunter2", "x", true]',
        '{"a": "hunter2\\ud800", "b": "x", "same": true}',
        '{"a": "hunter2\udcff", "b": "x", "same": true}',
    ],
)
def test_a_bad_line_is_named_by_its_number_and_never_quoted(tmp_path: Path, bad: str) -> None:
    """I9: what pairs say is what users asked."""
    path = tmp_path / "pairs.jsonl"
    lines = '{"a": "x", "b": "y", "same": true}\n\n' + bad
    path.write_bytes(lines.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=r"^pairs: line 3 [^\n]*\.$") as caught:
        read(path)
    assert "hunter2" not in str(caught.value)


def test_a_file_that_holds_no_pairs_is_said_to(tmp_path: Path) -> None:
    """Missing, empty, or not what its name says: a sentence, no traceback."""
    with pytest.raises(ConfigError, match="there is no file"):
        read(tmp_path / "none.jsonl")
    empty, torn = tmp_path / "empty.jsonl", tmp_path / "torn.jsonl.gz"
    empty.write_text("\n \n")
    torn.write_bytes(gzip.compress(b'{"a": "x", "b": "y", "same": true}\n' * 99)[:-9])
    with pytest.raises(ConfigError, match="there are none"):
        read(empty)
    with pytest.raises(ConfigError, match="cannot be read"):
        read(torn)
    torn.write_bytes(b"no gzip")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(torn)


@pytest.mark.parametrize("budget", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_a_budget_is_a_share(tmp_path: Path, budget: float) -> None:
    """ "5" for five percent is refused before any work is done."""
    with pytest.raises(ConfigError, match=r"^budget: "):
        printed(tmp_path / "never read", budget, settings(tmp_path))


def test_without_an_encoder_there_is_nothing_to_tune(tmp_path: Path) -> None:
    """`model = none` serves exact hits only, and those need no threshold."""
    pairs = written(tmp_path / "pairs.jsonl", REWORDED)
    with pytest.raises(ConfigError, match=r"^model: "):
        printed(pairs, 0.01, settings(tmp_path, model="none"))


# --- scoring ------------------------------------------------------------------------------------


def test_a_vetoed_pair_has_no_score() -> None:
    """However near: the guard's name stands instead; switched off, the cosine counts again."""
    on, off = "How do I turn on dark mode?", "How do I turn off dark mode?"
    assert score(on, off, 0.97, Policy()) == Unserved("antonyms")
    assert score(on, "How can I turn on dark mode?", 0.97, Policy()) == 0.97
    every = frozenset({"antonyms", "substitution", "direction"})
    assert score(on, off, 0.97, Policy(guards_off=every)) == 0.97


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    found = open_encoder(settings(tmp_path_factory.mktemp("encoder")))
    assert found is not None
    return found


@pytest.mark.live
def test_what_serving_never_matches_by_meaning_has_no_score(
    tmp_path: Path, encoder: Encoder
) -> None:
    """I2: neither evidence for a threshold nor against it."""
    pairs = {
        Pair("What is love?", "What is love?", True): "exact",
        Pair("What is the weather today?", "How is the weather today?", True): "closed",
        Pair("Thủ đô của Pháp là gì?", "Đâu là thủ đô của Pháp?", True): "closed",
        Pair("And what about it?", "What is the capital of France?", False): "closed",
        Pair("", "What is love?", False): "closed",
        Pair("a word " * 400, "What is love?", False): "window",
        Pair("Where is order 48213?", "Where is order 48231?", False): "numbers",
    }
    judged = judge(list(pairs), encoder, policy(settings(tmp_path), encoder))
    assert judged == {pair: Unserved(why) for pair, why in pairs.items()}


@pytest.mark.live
async def test_a_pair_scores_what_serving_scores(
    world: World, tmp_path: Path, encoder: Encoder
) -> None:
    """The similarity in the header of a hit or a miss is the one that tuning goes by."""
    pairs = [
        Pair("What is the capital of France?", "What's the capital city of France?", True),
        Pair("How do I boil an egg?", "How long must an egg be boiled?", False),
        Pair("Turn on dark mode", "Turn off dark mode", False),
    ]
    judged = judge(pairs, encoder, policy(settings(tmp_path), encoder))
    for number, pair in enumerate(pairs):
        await world.ask(pair.a, key=f"sk-{number}")
        await world.ask(pair.a, key=f"sk-{number}")
        answered = await world.ask(pair.b, key=f"sk-{number}")
        match judged[pair]:
            case Unserved(why):
                assert answered.kind == "MISS"
                # Far off, it is not worth telling which guard objects.
                near = answered.reason == "guard"
                assert answered.headers.get("x-cache-veto") == (why if near else None)
                assert near or float(answered.headers["x-cache-similarity"]) < 0.92
            case found:
                assert float(answered.headers["x-cache-similarity"]) == pytest.approx(
                    found, abs=6e-4
                )
                assert (answered.kind == "HIT") == (found >= 0.92)


# --- the whole command --------------------------------------------------------------------------


@pytest.mark.live
def test_clean_pairs_are_certified_and_the_numbers_add_up(tmp_path: Path) -> None:
    """Plain, as JSON, and run again: one threshold, whose figures can be counted in the table."""
    exact = [Pair(text, f" {text}\n", True) for text in ("one", "two", "three", "four", "five")]
    pairs = written(tmp_path / "pairs.jsonl", REWORDED + TRAPS + exact)
    certified, text = printed(pairs, 0.1, settings(tmp_path))
    assert certified
    for column in ("threshold", "served", "wrong", "share", "upper bound", "kept"):
        assert column in text
    json_certified, out = printed(pairs, 0.1, settings(tmp_path), json_out=True)
    said = json.loads(out)
    assert json_certified
    assert said["certified"] is True
    assert said["needed"] is None
    row = next(row for row in said["candidates"] if row["threshold"] == said["threshold"])
    assert (row["served"], row["wrong"]) == (said["served"], said["wrong"])
    assert row["upper_bound"] == said["upper_bound"] <= 0.1
    assert row["kept"] == pytest.approx((row["served"] - row["wrong"]) / said["pairs"]["genuine"])
    assert [row["threshold"] for row in said["candidates"]] == list(certify.CANDIDATES)
    _, certifying = certify.split(REWORDED + TRAPS + exact)
    assert said["pairs"]["certify"] == len(certifying)
    assert said["pairs"]["tune"] == len(REWORDED + TRAPS + exact) - len(certifying)
    # What is found by its name is neither kept nor lost by a threshold.
    assert said["pairs"]["genuine"] == len(set(certifying) & set(REWORDED))
    assert said["pairs"]["unserved"]["exact"] == len(set(certifying) & set(exact)) > 0
    assert f"certified threshold {said['threshold']:.3f} (upper bound " in text
    assert f" at 95 %, {said['served']} labelled hits)" in text
    assert printed(pairs, 0.1, settings(tmp_path), json_out=True)[1] == out


@pytest.mark.live
def test_what_cannot_be_certified_says_how_many_labels_are_missing(tmp_path: Path) -> None:
    """Wrong labels among the nearest, and too few of them for the budget: no threshold at all."""
    wrong = [Pair(a, b, False) for a, b, _ in REWORDED[::6]]
    pairs = written(tmp_path / "pairs.jsonl", wrong + REWORDED)
    certified, text = printed(pairs, 0.01, settings(tmp_path))
    _, out = printed(pairs, 0.01, settings(tmp_path), json_out=True)
    said = json.loads(out)
    assert not certified
    assert (said["certified"], said["threshold"], said["upper_bound"]) == (False, None, None)
    assert said["pairs"]["repeated"] == len(wrong)
    assert said["needed"] > 299
    more = f"about {said['needed']:,} more clean labelled hits are needed"
    assert f"cannot be certified on this data: {more}" in " ".join(text.split())
    assert REWORDED[0].a not in text + out


@pytest.mark.live
def test_where_the_scan_begins_is_learnt_from_other_pairs_only(tmp_path: Path) -> None:
    """With every other label of the certifying part made wrong, it begins at the same place."""
    tuning, certifying = certify.split(REWORDED + TRAPS)
    turned = [Pair(a, b, same and at % 2 == 0) for at, (a, b, same) in enumerate(certifying)]
    clean, spoilt = (
        tune(written(tmp_path / "pairs.jsonl", tuning + pairs), 0.1, settings(tmp_path))
        for pairs in (certifying, turned)
    )
    assert clean.began == spoilt.began
    assert isinstance(clean.verdict, Certificate)
    assert isinstance(spoilt.verdict, NotCertifiable)


def tuned(verdict: Certificate | NotCertifiable, *counts: Count) -> Tuned:
    return Tuned(
        model="a-model",
        budget=0.01,
        confidence=0.95,
        verdict=verdict,
        counts=counts,
        began=0.99,
        pairs=900,
        genuine=800,
        unserved={"numbers": 40},
        tuned_on=300,
        repeated=2,
    )


def test_the_printed_bound_is_never_smaller_than_the_true_one() -> None:
    """Rounded up, in the table, the verdict and the JSON alike."""
    bound = certify.upper_bound(0, 412, 0.95)
    out = io.StringIO()
    found = tuned(Certificate(0.905, 412, 0, bound), Count(0.905, 412, 0))
    Console(file=out, width=110).print(render(found))
    assert bound == pytest.approx(0.00724, abs=1e-5)
    assert (
        "certified threshold 0.905 (upper bound 0.8 % at 95 %, 412 labelled hits)" in out.getvalue()
    )
    assert as_json(found)["upper_bound"] >= bound


def test_nothing_served_is_a_dash_and_not_a_division() -> None:
    """A threshold that serves nothing has no share, and a file without paraphrases keeps none."""
    said = as_json(tuned(NotCertifiable(299), Count(0.99, 0, 0)))
    assert said["candidates"] == [
        {
            "threshold": 0.99,
            "served": 0,
            "wrong": 0,
            "share": None,
            "upper_bound": 1.0,
            "kept": 0.0,
        }
    ]
    assert said["needed"] == 399  # a quarter of new labels goes to the part that is tuned on
