"""Chat Completions: what is fuzzy, what is exact, and answers that real clients can read."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.canonical import dump
from cache_proxy.model import Request, Usage
from cache_proxy.protocols import chat
from cache_proxy.protocols.sse import Splitter, data

NEW_ID, NOW = "f00", 1_800_000_000
USER = {"role": "user", "content": "Where is my refund?"}


def read(messages: list[Any] | None = None, **changes: Any) -> Request:
    options = {
        k: changes.pop(k) for k in ("masks", "question_marker", "path_model") if k in changes
    }
    document = {"model": "m", "messages": [USER] if messages is None else messages, **changes}
    return chat.parse(document, **options)


def text_part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}


# ---- requests


def test_only_the_last_user_text_is_left_out_of_rest() -> None:
    """I2: another last text, same rest; another anything else, another rest."""
    plain = read()
    assert plain.text == "Where is my refund?"
    assert b"refund" not in plain.rest
    assert read([{"role": "user", "content": "Hi"}]).rest == plain.rest
    for messages in (
        [{"role": "system", "content": "s"}, USER],
        [{"role": "developer", "content": "s"}, USER],
        [USER, USER],
        [USER, {"role": "assistant", "content": "a"}],
        [USER, {"role": "tool", "tool_call_id": "1", "content": "a"}],
        [{**USER, "name": "ann"}],
        [{"role": "user", "content": [text_part("context"), text_part("Where is my refund?")]}],
        [{"role": "user", "content": [text_part("Where is my refund?"), IMAGE]}],
        [{"role": "user", "content": [text_part("Where is my refund?", brand_new=1)]}],
    ):
        assert read(messages).rest != plain.rest
        assert read(messages).text == plain.text


FIELDS = {
    "model": ("n",),
    "temperature": (0, 0.5),
    "top_p": (0.5,),
    "seed": (0, 1),
    "n": (1, 2),
    "stop": ("a", ["a"]),
    "max_tokens": (5,),
    "max_completion_tokens": (5,),
    "logprobs": (True, False),
    "top_logprobs": (2,),
    "logit_bias": ({}, {"1": 1}),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"}, {"type": "json_object"}),
    "tools": ([{"type": "function", "function": {"name": "f"}}],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False,),
    "functions": ([{"name": "f"}],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "reasoning_effort": ("low",),
    "verbosity": ("low",),
    "brand_new": (0, False, "", {}, [None]),
}


def test_every_other_field_partitions() -> None:
    """I2: known or unknown, each value of each field has a rest of its own."""
    rests = [read(**{name: value}).rest for name, values in FIELDS.items() for value in values]
    rests.append(read().rest)
    assert len(set(rests)) == len(rests)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"temperature": 1}, {"temperature": 1.0}),
        ({"stop": None}, {}),
        ({"tools": []}, {}),
        ({"messages": [{"role": "user", "content": [text_part("Where is my refund?")]}]}, {}),
        ({"messages": [{**USER, "tool_calls": None, "audio": []}]}, {}),
        ({"messages": [{**USER, "content": "  Where is my refund?\n"}]}, {}),
        ({"messages": [{**USER, "cache_control": {"type": "ephemeral"}}]}, {}),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [text_part("Where is my refund?", cache_control={})],
                    }
                ]
            },
            {},
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}, "cache_control": {}}]},
            {"tools": [{"type": "function", "function": {"name": "f", "cache_control": {}}}]},
        ),
        ({"cache_control": {"type": "ephemeral"}}, {}),
    ],
)
def test_equal_by_meaning_is_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Spellings of one request share an entry."""
    base = {"model": "m", "messages": [USER]}
    first, second = chat.parse(base | one), chat.parse(base | other)
    assert (first.rest, first.text) == (second.rest, second.text)


def test_a_schema_is_exact_down_to_its_nulls() -> None:
    """I2: inside a schema null is a value and cache_control may be a parameter."""

    def tool(schema: dict[str, Any]) -> bytes:
        return read(tools=[{"type": "function", "function": {"parameters": schema}}]).rest

    schemas: list[dict[str, Any]] = [{}, {"const": None}, {"enum": []}, {"cache_control": {}}]
    assert len({tool(schema) for schema in schemas}) == len(schemas)


def test_the_last_user_turn_with_text_counts() -> None:
    """I2: turns after it, tool results and images among them, are exact."""
    loop = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]},
        {"role": "tool", "tool_call_id": "1", "content": "sent"},
    ]
    request = read(loop)
    assert request.text == USER["content"]
    assert b"sent" in request.rest
    assert request.tool_turns
    assert request.turns == 2
    assert read([USER, {"role": "user", "content": [IMAGE]}]).other_parts
    assert read([USER, {"role": "user", "content": "  "}]).text == USER["content"]


@pytest.mark.parametrize(
    ("messages", "text", "turns", "other_parts"),
    [
        ([USER], "Where is my refund?", 1, False),
        ([{"role": "system", "content": "s"}, USER], "Where is my refund?", 1, False),
        ([{"role": "assistant", "content": "Which?"}, USER], "Where is my refund?", 2, False),
        ([USER, {"role": "assistant", "content": "a"}, USER], "Where is my refund?", 2, False),
        ([USER] * 3, "Where is my refund?", 3, False),
        ([{"role": "user", "content": [IMAGE, text_part("q")]}], "q", 1, True),
        ([{"role": "user", "content": [text_part("q"), text_part(" ")]}], "q", 1, False),
        ([{"role": "user", "content": [IMAGE]}], None, 1, True),
        ([{"role": "user", "content": [IMAGE]}, {"role": "assistant"}], None, 1, True),
        ([{"role": "user", "content": ""}], None, 1, False),
        ([{"role": "user"}], None, 1, False),
        ([{"role": "system", "content": "s"}], None, 0, False),
    ],
)
def test_what_is_seen_in_a_conversation(
    messages: list[Any], text: str | None, turns: int, other_parts: bool
) -> None:
    """Text, history and other media are told apart."""
    request = read(messages)
    assert (request.text, request.turns, request.other_parts) == (text, turns, other_parts)


TOOL = {"type": "function", "function": {"name": "f"}}


@pytest.mark.parametrize(
    ("changes", "declared"),
    [
        ({}, False),
        ({"tools": []}, False),
        ({"tools": [TOOL]}, True),
        ({"tools": [TOOL], "tool_choice": "none"}, False),
        ({"tools": [TOOL], "tool_choice": "auto"}, True),
        ({"functions": [{"name": "f"}]}, True),
        ({"functions": [{"name": "f"}], "function_call": "none"}, False),
        ({"tools": [TOOL], "function_call": "none"}, True),
    ],
)
def test_declared_tools(changes: dict[str, Any], declared: bool) -> None:
    """`tool_choice: none` counts as no tools, old names as the new ones."""
    assert read(**changes).declares_tools is declared


@pytest.mark.parametrize(
    ("changes", "searches"),
    [
        ({}, False),
        ({"tools": [TOOL]}, False),
        ({"web_search_options": {}}, True),
        ({"tools": [{"type": "web_search_preview"}]}, True),
        ({"tools": [{"type": "web_search_20250305"}], "tool_choice": "none"}, True),
        ({"model": "gpt-4o-search-preview"}, True),
        ({"model": "sonar-pro"}, True),
        ({"model": "x/y:online"}, True),
        ({"plugins": [{"id": "web"}]}, True),
        ({"plugins": [{"id": "file-parser"}]}, False),
        ({"enable_search": True}, True),
        ({"enable_search": False}, False),
    ],
)
def test_web_search_is_seen(changes: dict[str, Any], searches: bool) -> None:
    """An answer that depends on today's web is told apart."""
    assert read(**changes).web_search is searches


def test_identity_stands_apart_from_wording() -> None:
    """I2: each naming of the end user is its own identity, and none of them is in rest."""
    users: list[dict[str, Any]] = [
        {},
        {"user": "a"},
        {"safety_identifier": "a"},
        {"metadata": {"user_id": "a"}},
        {"user": "a", "safety_identifier": "a"},
        {"user": 1},
        {"user": ""},
    ]
    requests = [read(**user) for user in users]
    assert len({request.end_user for request in requests}) == len(users)
    assert len({request.rest for request in requests}) == 1
    assert read(metadata={"run": "1"}).end_user is None


def test_nonces_in_system_text_are_masked_in_the_key() -> None:
    """Known ones always, the operator's own on request, and in system text only."""

    def rest(role: str, text: str, **options: Any) -> bytes:
        return read([{"role": role, "content": text}, USER], **options).rest

    assert rest("system", "v=1; cch=00aa1;") == rest("system", "v=1; cch=00bb2;")
    assert rest("assistant", "cch=00aa1;") != rest("assistant", "cch=00bb2;")
    assert rest("system", "session 1") != rest("system", "session 2")
    masks = [re.compile(r"session \d+")]
    assert rest("system", "session 1", masks=masks) == rest("system", "session 2", masks=masks)
    assert rest("system", "2026-01-01") != rest("system", "2026-01-02")


def test_a_question_marker_keeps_the_context_exact() -> None:
    """What stands before the marker's last place is compared byte for byte."""

    def ask(text: str) -> Request:
        return read([{"role": "user", "content": text}], question_marker="Question:")

    first = ask("Context: a. Question: who? Question:  How many? ")
    assert first.text == "How many?"
    assert ask("Context: a. Question: who? Question: How much?").rest == first.rest
    assert ask("Context: b. Question: who? Question:  How many? ").rest != first.rest
    assert ask("How many?").rest != first.rest
    assert ask("How many?").rest != ask("Question: How many?").rest
    assert ask("Context. Question: ").text == "Context. Question:"
    assert (
        first.rest
        != read([{"role": "user", "content": [text_part("Context: a."), text_part("x")]}]).rest
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"messages": None},
        {"messages": []},
        {"messages": "hi"},
        {"messages": ["hi"]},
        {"messages": [{"content": "hi"}]},
        {"messages": [{"role": 1, "content": "hi"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": "user", "content": {"type": "text"}}]},
        {"messages": [{"role": "user", "content": ["hi"]}]},
        {"messages": [{"role": "user", "content": [{"text": "hi"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
        {"model": 4},
        {"model": ["m"]},
        {"stream": "true"},
        {"stream": 1},
        {"stream_options": []},
        {"stream_options": {"include_usage": "yes"}},
        {"metadata": "x"},
        {"n": "2"},
        {"n": 1.5},
        {"n": True},
        {"temperature": "0.5"},
        {"temperature": True},
        {"temperature": 10**400},
        {"tools": {}},
        {"tools": ["f"]},
        {"functions": "f"},
    ],
)
def test_what_cannot_be_read_is_not_guessed(changes: dict[str, Any]) -> None:
    """I3: an odd shape closes the cache with a reason from a closed set, and nothing else."""
    with pytest.raises(chat.Unreadable) as caught:
        chat.parse({"model": "m", "messages": [USER], **changes})
    assert caught.value.reason in {"field", "messages", "metadata", "model", "tools"}


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "user", "text", "none"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "user_id", "function"]), inner
        )
    ),
    max_leaves=5,
)
NAMES = ["messages", "model", "stream", "stream_options", "metadata", "tools", "functions"]
NAMES += ["n", "temperature", "user", "plugins", "tool_choice", "web_search_options", "other"]


@given(st.dictionaries(st.sampled_from(NAMES), JUNK | st.lists(JUNK, max_size=2)))
def test_no_document_makes_parse_fail_in_another_way(document: dict[str, Any]) -> None:
    """I3: a request or `Unreadable`, whatever the client sends."""
    document.setdefault("messages", [USER])
    try:
        request = chat.parse(document)
    except chat.Unreadable:
        return
    assert orjson.loads(request.rest)["fields"]["model"] == (document.get("model") or "")
    chat.ask_usage(dump(document), document)


def test_the_url_may_name_the_model() -> None:
    """Azure does so; the body wins when it names one too."""
    document: dict[str, Any] = {"messages": [USER]}
    assert chat.parse(document, path_model="dep").model == "dep"
    assert chat.parse(document, path_model="dep").rest == read(model="dep").rest
    assert read(path_model="dep").model == "m"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"model":"m"}', b'{"model":"m"}'),
        (b'{"stream":false}', b'{"stream":false}'),
        (
            b' { "stream": true, "x": 1.0}',
            b' {"stream_options":{"include_usage":true}, "stream": true, "x": 1.0}',
        ),
        (
            b'{"stream":true,"stream_options":{"include_usage":true}}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
        ),
        (
            b'{"stream":true,"stream_options":null}',
            b'{"stream":true,"stream_options":{"include_usage":true}}',
        ),
        (
            b'{"stream":true,"stream_options":{"a":1,"include_usage":false},"seed":18446744073709551617}',
            b'{"stream":true,"stream_options":{"a":1,"include_usage":true},"seed":18446744073709551617}',
        ),
    ],
)
def test_usage_is_asked_for_without_touching_the_rest(body: bytes, expected: bytes) -> None:
    """A stream that would not tell its tokens is asked to; all else keeps its bytes."""
    assert chat.ask_usage(body, json.loads(body)) == expected


# ---- answers


def completion(*choices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-old",
        "object": "chat.completion",
        "created": 1,
        "model": "m-2026",
        "system_fingerprint": "fp",
        "choices": [{"index": n, **choice} for n, choice in enumerate(choices)],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
        **changes,
    }


def said(text: str | None = "Hello", finish: str | None = "stop", **message: Any) -> dict[str, Any]:
    return {
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": finish,
    }


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}


@pytest.mark.parametrize(
    ("document", "facts"),
    [
        (completion(said()), {}),
        (completion(said(), said("b", "eos")), {"finished": ("stop", "eos")}),
        (completion(said(finish="length")), {"finished": ("length",)}),
        (completion(said(finish=None)), {"finished": ("",)}),
        (completion(said("")), {"empty": True}),
        (completion(said(" \n")), {"empty": True}),
        (completion(said(None)), {"empty": True}),
        (completion(said(), said("")), {"empty": True, "finished": ("stop", "stop")}),
        (completion(said(None, reasoning_content="hm")), {"empty": True}),
        (completion(), {"empty": True, "finished": ()}),
        (completion(said(None, refusal="No.")), {"refused": True}),
        (
            completion(said("x", "content_filter")),
            {"refused": True, "finished": ("content_filter",)},
        ),
        (
            completion(said(None, "tool_calls", tool_calls=[CALL])),
            {"tool_calls": True, "finished": ("tool_calls",)},
        ),
        (
            completion(said(None, "function_call", function_call=CALL["function"])),
            {"tool_calls": True, "finished": ("function_call",)},
        ),
        (completion(said(), usage=None), {"usage": None}),
        (completion(said(), usage={"prompt_tokens": "9"}), {"usage": None}),
        (
            completion(
                said(),
                usage={
                    "prompt_tokens": 9,
                    "completion_tokens": 4,
                    "prompt_tokens_details": {"cached_tokens": 8},
                    "completion_tokens_details": {"reasoning_tokens": 3},
                },
            ),
            {"usage": Usage(9, 4, 8, 3)},
        ),
        (completion(said(finish="error")), {"error": True, "finished": ("error",)}),
        (completion({**said(), "error": {"code": 502}}), {"error": True}),
    ],
)
def test_the_facts_of_an_answer(document: dict[str, Any], facts: dict[str, Any]) -> None:
    """I4: what decides about keeping is read off whole and streamed answers alike."""
    expected: dict[str, Any] = {
        "usage": Usage(9, 4),
        "finished": ("stop",),
        "empty": False,
        "refused": False,
        "tool_calls": False,
        "error": False,
    } | facts
    answer = chat.whole(orjson.dumps(document))
    assert answer.terminal
    assert {name: getattr(answer, name) for name in expected} == expected
    if not document["choices"]:
        return
    streamed = reassemble(render(document, include_usage=True))
    assert {name: getattr(streamed, name) for name in expected} == expected
    assert streamed.terminal == all(expected["finished"])


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"{}",
        b'{"choices":{}}',
        b'{"choices":[1]}',
        b'{"error":{"message":"no"}}',
        b'{"error":"no","choices":[]}',
        b'{"choices":[{"message":{"content":"\\ud800"}}]}',
    ],
)
def test_what_is_no_answer_is_an_error(body: bytes) -> None:
    """I4: an error object under status 200, or what cannot be parsed, is never kept."""
    answer = chat.whole(body)
    assert answer.error
    assert not answer.terminal


def request(**changes: Any) -> Request:
    return replace(read(), **changes)


def render(document: dict[str, Any], *, include_usage: bool = False) -> list[bytes]:
    stored = chat.prepare(orjson.dumps(document))
    return chat.render_stream(stored, request(include_usage=include_usage), NEW_ID, NOW)


def reassemble(events: list[bytes]) -> Any:
    reassembler = chat.Reassembler()
    for event in events:
        piece = data(event)
        assert piece is not None
        reassembler.feed(piece)
    return reassembler.answer()


def test_a_hit_in_json_is_the_stored_answer_under_a_fresh_name() -> None:
    """Only id and date change; ids of the old call are gone."""
    document = completion(said(annotations=[]), x_groq={"id": "req_1"}, provider="P")
    rendered = chat.render_json(chat.prepare(orjson.dumps(document)), request(), NEW_ID, NOW)
    del document["x_groq"]
    expected = {**document, "id": "chatcmpl-f00", "created": NOW}
    assert orjson.loads(rendered) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("chatcmpl-abc-1", "chatcmpl-f00"),
        ("gen-123-abc", "gen-f00"),
        ("0123", "chatcmpl-f00"),
        (None, "chatcmpl-f00"),
        ("7b-\"'", "chatcmpl-f00"),
    ],
)
def test_ids_keep_their_providers_style(old: str | None, new: str) -> None:
    """A client that looks at the prefix sees the one it knows."""
    stored = chat.prepare(orjson.dumps(completion(said(), id=old)))
    assert orjson.loads(chat.render_json(stored, request(), NEW_ID, NOW))["id"] == new


def test_numbers_that_cannot_be_kept_exactly_are_not_kept() -> None:
    """Better no entry than a rounded one."""
    body = orjson.dumps(completion(said())).replace(b'"created":1', b'"token":18446744073709551617')
    with pytest.raises(ValueError, match="64 bits"):
        chat.prepare(body)
    assert b"1e+20" in chat.prepare(orjson.dumps(completion(said("about 1e+20"))))


WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
MESSAGES = st.fixed_dictionaries(
    {"role": st.just("assistant"), "content": st.none() | WORDS},
    optional={
        "refusal": WORDS,
        "reasoning_content": WORDS,
        "reasoning": WORDS,
        "reasoning_details": st.just([{"type": "reasoning.text", "index": 0, "text": "t"}]),
        "tool_calls": st.lists(st.just(CALL), min_size=1, max_size=3),
        "function_call": st.just(CALL["function"]),
        "annotations": st.just([{"type": "url_citation", "url_citation": {"start_index": 1}}]),
        "audio": st.just({"id": "a", "data": "AA==", "transcript": "t", "expires_at": 5}),
        "brand_new": st.just({"x": "y", "n": [1, 2]}) | WORDS | st.just(7),
    },
)
CHOICES = st.fixed_dictionaries(
    {"message": MESSAGES, "finish_reason": st.sampled_from(["stop", "length", "tool_calls"])},
    optional={
        "logprobs": st.just({"content": [{"token": "a", "logprob": -0.5, "top_logprobs": []}]}),
        "stop_reason": st.just("###"),
        "content_filter_results": st.just({"hate": {"filtered": False, "severity": "safe"}}),
    },
)


@given(st.lists(CHOICES, min_size=1, max_size=3))
def test_replaying_and_reassembling_gives_the_answer_back(choices: list[dict[str, Any]]) -> None:
    """Nothing of an answer is lost in its stream: reasoning, tools, unknown fields."""
    document = completion(*choices, service_tier="default", citations=["u"])
    answer = reassemble(render(document, include_usage=True))
    got = orjson.loads(answer.body)
    assert answer.terminal
    assert got == {**document, "id": "chatcmpl-f00", "created": NOW}


def pieces_of(text: str) -> Iterator[dict[str, Any]]:
    yield {"index": 0, "delta": {"role": "assistant", "content": "", "refusal": None}}
    for letter in text:
        yield {"index": 0, "delta": {"content": letter}, "logprobs": None, "finish_reason": None}
    yield {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}


def feed(chunks: list[Any], *, done: bool = True) -> Any:
    reassembler = chat.Reassembler()
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    for chunk in chunks:
        reassembler.feed(orjson.dumps(head | chunk if isinstance(chunk, dict) else chunk))
    if done:
        reassembler.feed(b"[DONE]")
    return reassembler.answer()


def test_a_stream_in_small_pieces_becomes_one_answer() -> None:
    """Content letter by letter, tool arguments in parts and interleaved, usage at the end."""
    chunks: list[Any] = [{"choices": [piece], "usage": None} for piece in pieces_of("Hé 漢🙂")]
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    answer = feed([*chunks, {"choices": [], "usage": usage}])
    document = orjson.loads(answer.body)
    assert document["object"] == "chat.completion"
    assert document["usage"] == usage
    assert document["choices"] == [
        {
            "finish_reason": "stop",
            "index": 0,
            "message": {"role": "assistant", "content": "Hé 漢🙂"},
        }
    ]
    assert answer.terminal
    assert answer.usage == Usage(1, 2)


def test_tool_calls_in_parts_are_put_together_by_index() -> None:
    """Arguments join, names and ids do not double when a provider repeats them."""

    def call(index: int, arguments: str, **more: Any) -> dict[str, Any]:
        function = {"arguments": arguments, **({"name": "f"} if more else {})}
        return {
            "choices": [
                {
                    "index": 0,
                    "delta": {"tool_calls": [{"index": index, "function": function, **more}]},
                }
            ]
        }

    chunks = [
        call(0, "", id="a", type="function"),
        call(1, '{"x"', id="b", type="function"),
        call(0, '{"a":', id="a", type="function"),
        call(1, ":2}"),
        call(0, "1}", id="", type=""),
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]},
    ]
    answer = feed(chunks)
    assert orjson.loads(answer.body)["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"arguments": '{"a":1}', "name": "f"}},
        {"id": "b", "type": "function", "function": {"arguments": '{"x":2}', "name": "f"}},
    ]
    assert answer.tool_calls


FINISH = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": "stop"}]}
OPEN = {"choices": [{"index": 1, "delta": {"content": "x"}}]}


@pytest.mark.parametrize(
    ("chunks", "done", "terminal", "error"),
    [
        ([FINISH], True, True, False),
        ([FINISH], False, False, False),
        ([FINISH, OPEN], True, False, False),
        ([OPEN], True, False, False),
        ([], True, False, False),
        ([{"choices": [], "prompt_filter_results": []}, FINISH], True, True, False),
        ([FINISH, {"error": {"message": "overloaded"}}], True, False, True),
        ([{"choices": "x"}], True, False, True),
        ([{"choices": [1]}], True, False, True),
        ([{"choices": [{"index": "0", "delta": {}}]}], True, False, True),
        ([{"choices": [{"index": 0, "delta": "x"}]}], True, False, True),
        ([7], True, False, True),
        ([None], True, False, True),
    ],
)
def test_only_a_stream_with_its_end_is_terminal(
    chunks: list[Any], done: bool, terminal: bool, error: bool
) -> None:
    """I4: no `[DONE]`, a choice without finish, an error event: never a whole answer."""
    answer = feed(chunks, done=done)
    assert (answer.terminal, answer.error) == (terminal, error)


JSON = st.recursive(
    st.none() | st.integers(-1, 3) | st.sampled_from(["", "x", "stop"]),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(["index", "delta", "tool_calls", "content", "function", "logprobs"]),
            inner,
        )
    ),
    max_leaves=8,
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {}, optional={"choices": st.lists(JSON, max_size=2), "usage": JSON, "error": JSON}
        )
        | JSON,
        max_size=4,
    )
)
def test_no_event_makes_the_reassembler_fail(events: list[Any]) -> None:
    """Whatever upstream sends passes on; here it is at worst an answer nobody keeps."""
    answer = feed(events)
    assert answer.error or orjson.loads(answer.body)["object"] == "chat.completion"


def test_nonsense_bytes_and_deep_nesting_are_errors() -> None:
    """I4: no event data takes the process down or into the store."""
    deep = b'{"choices":[{"delta":{"x":' + b"[" * 900 + b"]" * 900 + b"}}]}"
    objects = b'{"choices":[{"delta":{"x":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}]}"
    for nonsense in (b"", b"{", b"\xff", deep, objects):
        reassembler = chat.Reassembler()
        reassembler.feed(nonsense)
        reassembler.feed(b"[DONE]")
        assert not reassembler.answer().terminal


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b'{"choices":[],"usage":{"prompt_tokens":1}}', True),
        (b'{ "choices" : [ ], "usage" : {} }', True),
        (b'{"choices":[],"usage":null}', False),
        (b'{"choices":[{"delta":{}}],"usage":{"prompt_tokens":1}}', False),
        (b'{"choices":[{"text":""}],"usage":{"prompt_tokens":1}}', False),
        (b'{"choices":[],"prompt_filter_results":[]}', False),
        (b"[DONE]", False),
        (b'["usage"]', False),
        (b'"usage"x', False),
    ],
)
def test_the_usage_chunk_is_told_apart(event: bytes, expected: bool) -> None:
    """Only the chunk that carries nothing else may be held back from a client."""
    assert chat.usage_chunk(event) is expected


def test_usage_is_told_only_to_those_who_asked() -> None:
    """With `include_usage` a last chunk carries it and all others say null; else none names it."""
    document = completion(said())
    chunks = [orjson.loads(data(e) or b"") for e in render(document, include_usage=True)[:-1]]
    assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [document["usage"]]
    assert chunks[-1]["choices"] == []
    assert not any(b'"usage"' in event for event in render(document))
    assert render(document)[-1] == b"data: [DONE]\n\n"


def test_a_replayed_stream_has_the_usual_order() -> None:
    """Role first, then reasoning, content, the finish; each chunk under the fresh name."""
    events = render(completion({**said(reasoning_content="hm"), "logprobs": {"content": []}}))
    chunks = [orjson.loads(data(event) or b"") for event in events[:-1]]
    assert {(c["id"], c["created"], c["object"]) for c in chunks} == {
        ("chatcmpl-f00", NOW, "chat.completion.chunk")
    }
    assert [c["choices"][0]["delta"] for c in chunks] == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "Hello"},
        {},
    ]
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert "logprobs" in chunks[2]["choices"][0]


# ---- the real SDK


def client(content: bytes, kind: str, status: int = 200) -> openai.OpenAI:
    reply = httpx.Response(status, content=content, headers={"content-type": kind})
    transport = httpx.MockTransport(lambda _: reply)
    return openai.OpenAI(
        api_key="k",
        base_url="http://up/v1",
        max_retries=0,
        http_client=httpx.Client(transport=transport),
    )


CITATION = {"start_index": 0, "end_index": 5, "url": "u", "title": "t"}
ASK: dict[str, Any] = {"model": "m", "messages": [USER]}


def test_the_openai_sdk_reads_a_hit_in_json() -> None:
    """one JSON with a fresh id."""
    stored = chat.prepare(orjson.dumps(completion(said(), said("b"))))
    body = chat.render_json(stored, request(), NEW_ID, NOW)
    got = client(body, "application/json").chat.completions.create(**ASK)
    assert (got.id, got.created) == ("chatcmpl-f00", NOW)
    assert [choice.message.content for choice in got.choices] == ["Hello", "b"]
    assert got.usage is not None
    assert got.usage.total_tokens == 13


@pytest.mark.parametrize("include_usage", [True, False])
def test_the_openai_sdk_reads_a_hit_as_a_stream(include_usage: bool) -> None:
    """plain iteration sees the text, the finish and the usage that was asked for."""
    body = b"".join(render(completion(said(), said("b")), include_usage=include_usage))
    stream = client(body, "text/event-stream").chat.completions.create(stream=True, **ASK)
    texts, finishes, usages = {0: "", 1: ""}, [], []
    for chunk in stream:
        usages.append(chunk.usage)
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            finishes.append(choice.finish_reason)
    assert texts == {0: "Hello", 1: "b"}
    assert finishes.count("stop") == 2
    assert [u.total_tokens for u in usages if u] == ([13] if include_usage else [])


@pytest.mark.parametrize(
    "choice",
    [
        said(),
        said("x" * 5000, reasoning_content="hm"),
        said(None, refusal="I cannot."),
        said(None, "tool_calls", tool_calls=[CALL, {**CALL, "id": "c2"}]),
        {
            **said(),
            "logprobs": {
                "content": [{"token": "Hello", "bytes": None, "logprob": -0.1, "top_logprobs": []}],
                "refusal": None,
            },
        },
        said(annotations=[{"type": "url_citation", "url_citation": CITATION}]),
    ],
)
def test_the_openai_stream_helper_puts_a_hit_together(choice: dict[str, Any]) -> None:
    """the SDK's own accumulator arrives at the stored message."""
    body = b"".join(render(completion(choice), include_usage=True))
    with client(body, "text/event-stream").chat.completions.stream(**ASK) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    message = final.choices[0].message.model_dump()
    for name, value in choice["message"].items():
        if name == "tool_calls":
            calls = message[name]
            assert [c["id"] for c in calls] == ["c1", "c2"]
            assert [c["function"]["arguments"] for c in calls] == ['{"a":1}'] * 2
        else:
            assert message[name] == value
    assert final.choices[0].finish_reason == choice["finish_reason"]
    assert (final.choices[0].logprobs is not None) == ("logprobs" in choice)
    assert final.usage is not None


def test_the_openai_sdk_shows_our_errors() -> None:
    """The message and the code arrive in the exception, the status in its class."""
    body = chat.error("The request body is not valid JSON.", 400, "bad_request")
    with pytest.raises(openai.BadRequestError) as caught:
        client(body, "application/json", 400).chat.completions.create(**ASK)
    assert caught.value.code == "bad_request"
    assert "not valid JSON" in str(caught.value)
    assert orjson.loads(body)["error"] == {
        "message": "The request body is not valid JSON.",
        "type": "invalid_request_error",
        "param": None,
        "code": "bad_request",
    }


def test_a_replayed_stream_survives_any_cutting() -> None:
    """The events are what the splitter finds, whatever the chunk size."""
    events = render(completion(said("Xin chào 🙂")))
    for size in (1, 2, 3, 7):
        splitter, whole = Splitter(), b"".join(events)
        found = [
            e for at in range(0, len(whole), size) for e in splitter.feed(whole[at : at + size])
        ]
        assert found == events
