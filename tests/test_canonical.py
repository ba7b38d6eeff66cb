"""Names of requests: equal by meaning means equal, distinct by meaning means distinct."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.canonical import canonical, churn, clean, digest, dump, load, mac, mask, partition
from cache_proxy.errors import BadRequest
from cache_proxy.protocols import chat, completions

KEY = b"k" * 32
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(2**62, 2**70),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 0.0, -0.0, 1, 1.0, "", "1", "null"]),
    TEXT,
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXT, VALUES, max_size=4)


def meaning(value: Any) -> Any:
    """A hashable twin that is equal exactly when two JSON values mean the same."""
    match value:
        case bool() | None | str():
            return (type(value).__name__, value)
        case int() | float():
            return ("number", value)
        case list():
            return ("list", tuple(meaning(member) for member in value))
        case _:
            return ("object", frozenset((name, meaning(member)) for name, member in value.items()))


@given(VALUES, VALUES)
def test_canonical_bytes_agree_exactly_when_the_meaning_does(one: Any, other: Any) -> None:
    """I2: one spelling for each value, and never one for two."""
    assert (canonical(one) == canonical(other)) == (meaning(one) == meaning(other))


@given(OBJECTS, st.randoms(use_true_random=False), st.booleans())
def test_spelling_does_not_matter(document: dict[str, Any], dice: Any, ascii_only: bool) -> None:
    """I2: key order, white space and escapes change nothing."""
    names = list(document)
    dice.shuffle(names)
    respelt = json.dumps({n: document[n] for n in names}, ensure_ascii=ascii_only, indent=1)
    assert canonical(load(respelt.encode())) == canonical(load(dump(document)))


@given(OBJECTS)
def test_load_returns_what_the_body_says(document: dict[str, Any]) -> None:
    """Both the fast and the careful way read every value exactly, long integers included."""
    assert meaning(load(dump(document))) == meaning(document)
    assert meaning(load(json.dumps(document).encode())) == meaning(document)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"text"',
        b"\xef\xbb\xbf{}",
        '{"a":1}'.encode("utf-16"),
        b'{"a":"\xff"}',
        b'{"a":"\\ud800"}',
        b'{"a":NaN}',
        b'{"a":Infinity}',
        b'{"a":1e999}',
        b'{"a":-1e999 }',
        b'{"a":1,"a":1}',
        b'{"a":1,"\\u0061":2}',
        b'{"b":[{"a":1,"a":2}]}',
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":' + b"[" * 300 + b"]" * 300 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":1}{"b":2}',
        b"{'a':1}",
        b'{"a":1,}',
        b'{"a":01}',
        b'{"a":"\t"}',
    ],
    ids=range(25),
)
def test_bad_bodies_are_the_clients_mistake(body: bytes) -> None:
    """Whatever the bytes, the verdict is a 400 that quotes none of them."""
    with pytest.raises(BadRequest) as caught:
        load(body)
    assert caught.value.status == 400
    assert re.fullmatch(r"The request body [a-zA-Z ]+\.", str(caught.value))


@given(st.binary(max_size=40))
def test_no_bytes_make_load_fail_in_another_way(body: bytes) -> None:
    """Noise is a `BadRequest` too."""
    with contextlib.suppress(BadRequest):
        load(body)


def test_deep_bodies_within_the_limit_have_a_canonical_form() -> None:
    """What `load` lets pass, every later step can walk."""
    body = b'{"a":' + b'{"b":[' * 120 + b"1.0" + b"]}" * 120 + b"}"
    assert canonical(load(body)) == body.replace(b"1.0", b"1")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (b"9007199254740993", b"9007199254740992"),
        (b"18446744073709551616", b"18446744073709551617"),
        (b"-9223372036854775809", b"-9223372036854775810"),
        (b"100000000000000000000000", b"100000000000000000000001"),
    ],
)
def test_long_integers_stay_apart(one: bytes, other: bytes) -> None:
    """I2: no rounding makes two seeds one."""
    assert canonical(load(b'{"seed":%b}' % one)) != canonical(load(b'{"seed":%b}' % other))


@given(
    st.lists(st.tuples(TEXT, st.binary(max_size=5)), max_size=4),
    st.lists(st.tuples(TEXT, st.binary(max_size=5)), max_size=4),
)
def test_partitions_are_equal_only_for_equal_parts(
    one: list[tuple[str, bytes]], other: list[tuple[str, bytes]]
) -> None:
    """I2: moving bytes from one part into its neighbour changes the name."""
    assert (partition(KEY, one) == partition(KEY, other)) == (one == other)


def test_names_need_the_key_and_have_separate_uses() -> None:
    """I3, I9: without the secret nothing can be named or guessed; uses never share a name."""
    assert len(partition(KEY, [])) == len(digest(KEY, b"p", "")) == len(mac(KEY, "x", b"")) == 20
    assert partition(KEY, [("a", b"b")]) != partition(b"l" * 32, [("a", b"b")])
    assert mac(KEY, "a", b"b") != partition(KEY, [("a", b"b")])
    assert mac(KEY, "token", b"b") != mac(KEY, "tenant", b"b")
    with pytest.raises(ValueError, match="16 bytes"):
        partition(b"", [("a", b"b")])


def test_no_text_is_not_empty_text() -> None:
    """A request without user text has a name of its own."""
    assert len({digest(KEY, b"p", text) for text in (None, "", "None", "null")}) == 4


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  hi\n", "hi"),
        ("e\u0301", "\u00e9"),
        ("\u00a0tr\u01b0\u0301\u3000", "tr\u1ee9"),
        ("A b", "A b"),
        ("ﬁ", "ﬁ"),
    ],
)
def test_clean_forgives_composition_and_margins_only(raw: str, expected: str) -> None:
    """Case, inner spaces and compatibility forms stay as they are."""
    assert clean(raw) == expected


def test_known_nonces_are_masked_and_dates_are_not() -> None:
    """A checksum made anew for each call does not split the cache; a date does."""
    first = mask("x-anthropic-billing-header: cc_version=2.1; cch=0a1b2; Today is 2026-01-01.")
    second = mask("x-anthropic-billing-header: cc_version=2.1; cch=fffff; Today is 2026-01-01.")
    assert first == second
    assert "2026-01-01" in first
    for text in ("branch=main", "cch=not hex", "xcch=00ff1", "cch=00ff1-b"):
        assert mask(text) == text
    assert mask("run 17 of 20", [re.compile(r"run \d+")]) == "* of 20"


def body(**changes: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    return {"model": "m", "messages": messages, **changes}


def test_churn_names_the_field_that_changed() -> None:
    """Statistics can say which field keeps the cache from ever hitting."""
    before = churn(KEY, chat.parse(body(seed=1, top_p=0.5)).rest)
    after = churn(KEY, chat.parse(body(seed=2, top_p=0.5)).rest)
    assert {name for name in before if before[name] != after[name]} == {"seed"}
    system = [{"role": "system", "content": "now 12:01"}, {"role": "user", "content": "q"}]
    other = churn(KEY, chat.parse(body(seed=1, top_p=0.5, messages=system)).rest)
    assert {name for name in before if before[name] != other[name]} == {"system"}
    assert "prompt" in churn(KEY, completions.parse({"model": "m", "prompt": [1, 2]}).rest)


def name_of(request: Any) -> bytes:
    parts = [("rest", request.rest), ("end_user", (request.end_user or "").encode())]
    return digest(KEY, partition(KEY, parts), request.text)


MEMBERS = st.fixed_dictionaries(
    {"model": st.sampled_from(["m", "n"])},
    optional={
        "temperature": st.sampled_from([None, 0, 0.0, 1, 1.0, 0.5]),
        "seed": st.sampled_from([None, 0, 2**64, 2**64 + 1]),
        "stop": st.sampled_from([None, [], "", ["a"], "a"]),
        "user": st.sampled_from([None, "u", ""]),
        "safety_identifier": st.sampled_from([None, "u"]),
        "logit_bias": st.sampled_from([{}, {"1": 1}, {"1": 1.0}, {"1": None}]),
        "brand_new": st.sampled_from([None, True, 1, "1"]),
    },
)
TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool"])},
    optional={
        "content": st.sampled_from(
            [
                None,
                "",
                "q",
                " q ",
                "e\u0301",
                "\u00e9",
                [{"type": "text", "text": "q"}],
                [{"type": "text", "text": "q"}, {"type": "text", "text": "\u00e9"}],
                [{"type": "image_url", "image_url": {"url": "a"}}],
            ]
        ),
        "tool_call_id": st.sampled_from(["a", "b"]),
    },
)


def chat_meaning(document: dict[str, Any]) -> Any:
    """The test's own idea of what a chat body asks, written without the code under test."""
    present = {k: v for k, v in document.items() if v is not None and v != []}
    turns = []
    for message in document["messages"]:
        turn = {k: v for k, v in message.items() if v is not None and v != []}
        if isinstance(turn.get("content"), str):
            turn["content"] = [{"type": "text", "text": turn["content"]}]
        turns.append(turn)
    places = [
        (t, p)
        for t, turn in enumerate(turns)
        for p, part in enumerate(turn.get("content", []))
        if turn["role"] == "user" and part.get("text", "").strip()
    ]
    if places:
        t, p = places[-1]
        part = turns[t]["content"][p]
        content = list(turns[t]["content"])
        content[p] = {**part, "text": clean(part["text"])}
        turns[t] = {**turns[t], "content": content}
    return meaning({**present, "messages": turns})


DOCUMENTS = st.builds(
    lambda members, turns: {**members, "messages": turns},
    MEMBERS,
    st.lists(TURN, min_size=1, max_size=3),
)


@given(DOCUMENTS, DOCUMENTS)
def test_chat_names_agree_exactly_when_the_requests_do(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """I2: equal by meaning, equal name; distinct by meaning, distinct name."""
    same = name_of(chat.parse(one)) == name_of(chat.parse(other))
    assert same == (chat_meaning(one) == chat_meaning(other))


@given(DOCUMENTS, st.data())
def test_one_change_moves_the_name(document: dict[str, Any], draw: st.DataObject) -> None:
    """I2: near neighbours too, which random pairs seldom are."""
    changed = {**document, **draw.draw(MEMBERS)}
    same = name_of(chat.parse(document)) == name_of(chat.parse(changed))
    assert same == (chat_meaning(document) == chat_meaning(changed))


def test_delivery_fields_do_not_partition() -> None:
    """What only steers delivery, billing or filing shares one entry."""
    plain = name_of(chat.parse(body()))
    for changes in (
        {"stream": True},
        {"stream_options": {"include_usage": True}},
        {"metadata": {"run": "7"}},
        {"store": True},
        {"prompt_cache_key": "k"},
        {"prompt_cache_retention": "24h"},
        {"service_tier": "flex"},
    ):
        assert name_of(chat.parse(body(**changes))) == plain
    assert orjson.loads(chat.parse(body()).rest)["fields"] == {"model": "m"}
