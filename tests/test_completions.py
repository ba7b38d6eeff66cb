"""Legacy Completions: one text prompt is fuzzy, everything else is exact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.model import Request, Usage
from cache_proxy.protocols import completions
from cache_proxy.protocols.sse import data

NEW_ID, NOW = "f00", 1_800_000_000


def read(prompt: Any = "Once upon", **changes: Any) -> Request:
    options = {k: changes.pop(k) for k in ("question_marker", "path_model") if k in changes}
    return completions.parse({"model": "m", "prompt": prompt, **changes}, **options)


@pytest.mark.parametrize(
    ("prompt", "text", "choices"),
    [
        ("a", "a", 2),
        (["a"], "a", 2),
        ("e\u0301", "\u00e9", 2),
        (["a", "b"], None, 4),
        ([1, 2, 3], None, 2),
        ([[1, 2], [3]], None, 4),
        ("", None, 2),
        ("  ", None, 2),
        (None, None, 2),
    ],
)
def test_which_prompts_are_fuzzy(prompt: Any, text: str | None, choices: int) -> None:
    """A single text; lists and tokens are compared exactly."""
    request = read(prompt, n=2)
    assert (request.text, request.choices) == (text, choices)


def test_exact_prompts_partition() -> None:
    """I2: what is not fuzzy stands in rest, each value apart."""
    prompts: list[Any] = [["a", "b"], ["b", "a"], [1, 2], [[1, 2]], [[1], [2]], "", " ", None]
    assert len({read(prompt).rest for prompt in prompts}) == len(prompts)
    assert read("a").rest == read("b").rest == read(["a"]).rest


def test_a_raw_prompts_outer_white_space_steers_the_model() -> None:
    """I2: "def f():" and "def f(): " continue differently, so margins are exact."""
    assert len({read(p).rest for p in ("a", "a ", "a\n", " a", " a ")}) == 5
    assert read("a ").text == "a"
    assert read("a ").rest == read("b ").rest


def test_every_other_field_partitions() -> None:
    """I2: echo, suffix, best_of, logprobs and what we do not know."""
    changes: list[dict[str, Any]] = [
        {},
        {"echo": True},
        {"suffix": "x"},
        {"best_of": 2},
        {"logprobs": 1},
        {"max_tokens": 1},
        {"seed": 1},
        {"model": "n"},
        {"brand_new": 1},
    ]
    assert len({read(**change).rest for change in changes}) == len(changes)
    assert read(stream=True, store=True, user="u").rest == read().rest
    assert read(user="u").end_user != read().end_user


def test_a_question_marker_keeps_the_context_exact() -> None:
    """As in chat."""
    first = read("Context. Q: How many?", question_marker="Q:")
    assert first.text == "How many?"
    assert read("Context. Q: How much?", question_marker="Q:").rest == first.rest
    assert read("Other. Q: How many?", question_marker="Q:").rest != first.rest


@pytest.mark.parametrize("prompt", [5, {}, [], ["", 1], [None], [[1], ["a"]], [True], [1.5]])
def test_odd_prompts_are_not_guessed(prompt: Any) -> None:
    """I3: an unknown shape closes the cache."""
    with pytest.raises(completions.Unreadable):
        read(prompt)


def completion(*choices: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "id": "cmpl-old",
        "object": "text_completion",
        "created": 1,
        "model": "m-1",
        "choices": [{"index": n, **choice} for n, choice in enumerate(choices)],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
        **changes,
    }


def said(text: str = " a time", finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {"text": text, "logprobs": None, "finish_reason": finish, **more}


def render(document: dict[str, Any], *, include_usage: bool = False) -> list[bytes]:
    stored = completions.prepare(orjson.dumps(document))
    request = replace(read(), include_usage=include_usage)
    return completions.render_stream(stored, request, NEW_ID, NOW)


CHOICES = st.fixed_dictionaries(
    {"text": st.text(st.characters(exclude_categories=["Cs"]), max_size=9)},
    optional={
        "logprobs": st.just({"tokens": ["a"], "token_logprobs": [None, -1.5], "text_offset": [0]}),
        "stop_reason": st.just("x"),
    },
)


@given(st.lists(CHOICES, min_size=1, max_size=3))
def test_replaying_and_reassembling_gives_the_answer_back(choices: list[dict[str, Any]]) -> None:
    """Nothing of an answer is lost in its stream."""
    document = completion(*[{**choice, "finish_reason": "stop"} for choice in choices])
    reassembler = completions.Reassembler()
    for event in render(document, include_usage=True):
        reassembler.feed(data(event) or b"")
    answer = reassembler.answer()
    assert answer.terminal
    assert orjson.loads(answer.body) == {**document, "id": "cmpl-f00", "created": NOW}
    assert answer.empty == any(not choice["text"].strip() for choice in choices)


def test_facts_of_a_whole_answer() -> None:
    """I4: as in chat."""
    answer = completions.whole(orjson.dumps(completion(said(), said("x", "length"))))
    assert answer.finished == ("stop", "length")
    assert answer.usage == Usage(3, 2)
    assert not any((answer.empty, answer.refused, answer.tool_calls, answer.error))
    assert completions.whole(b'{"error":{"message":"no"}}').error
    assert completions.whole(orjson.dumps(completion(said("")))).empty


@pytest.mark.parametrize("stream", [True, False])
def test_the_openai_sdk_reads_a_hit(stream: bool) -> None:
    """As JSON and as a stream."""
    document = completion(said(), said(" b"))
    stored = completions.prepare(orjson.dumps(document))
    body = completions.render_json(stored, read(), NEW_ID, NOW)
    kind = "application/json"
    if stream:
        body, kind = b"".join(render(document, include_usage=True)), "text/event-stream"
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, content=body, headers={"content-type": kind})
    )
    client = openai.OpenAI(
        api_key="k", base_url="http://up/v1", http_client=httpx.Client(transport=transport)
    )
    got = client.completions.create(model="m", prompt="Once upon", stream=stream)
    texts = {0: "", 1: ""}
    for chunk in got if isinstance(got, openai.Stream) else [got]:
        assert (chunk.id, chunk.created) == ("cmpl-f00", NOW)
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert texts == {0: " a time", 1: " b"}
