# ruff: noqa: E501  (tables: one row a line)
"""What must be equal for a hit, asked through the front door: real sockets, model and store.

The first table is what real traffic looks like, with the rule for each; a row asks two questions
and says what becomes of the second. Every row has a key, and so a tenant, of its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import pytest_asyncio

from tests.conftest import Answered, World, WorldMaker, world_maker
from tests.scripted import Reply, Seen, echo, whole

pytestmark = [pytest.mark.live, pytest.mark.asyncio(loop_scope="module")]

Ask = dict[str, Any]
_keys = (f"sk-row-{number}" for number in itertools.count(1))

CAPITAL = "What is the capital of France?"
REWORDED = "What's the capital city of France?"
FORGOTTEN = "How do I reset my forgotten account password?"
FORGOT = "How can I reset my forgotten account password?"
HANOI = "Làm thế nào để đặt lại mật khẩu của tôi?"
HANOI_REWORDED = "Làm sao để đặt lại mật khẩu của tôi?"
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}}}
SHELVES = " ".join(f"Item {number} is kept on shelf {number % 7}." for number in range(130))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def plain(valkey: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One sidecar with the default settings for all rows."""
    async with world_maker(valkey, tmp_path_factory.mktemp("plain"))() as made:
        yield made


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def loose(valkey: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[World]:
    """One with everything opted in that the table calls opt-in."""
    maker = world_maker(valkey, tmp_path_factory.mktemp("loose"))
    async with maker(
        end_user="ignore",
        masks=[r"request [0-9a-f]{8}"],
        question_marker="Question:",
        semantic_with_tools=True,
        store_tool_calls=True,
        time_bound="cache",
    ) as made:
        yield made


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def said(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def part(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": text, **more}


def ask(text: str = CAPITAL, *earlier: dict[str, Any], **fields: Any) -> Ask:
    """A chat body: the text as the last turn, after the earlier ones."""
    return {"messages": [*earlier, user(text)], **fields}


async def put(
    world: World,
    body: Ask,
    key: str | None,
    headers: dict[str, str] | None = None,
    query: str = "",
    path: str = "/v1/chat/completions",
) -> Answered:
    named = {"content-type": "application/json"} | (headers or {})
    if key is not None:
        named["authorization"] = f"Bearer {key}"
    payload = orjson.dumps({"model": "gpt-4o-mini"} | body)
    return await world.send("POST", path + (f"?{query}" if query else ""), payload, named)


async def outcome(
    world: World, first: Ask, second: Ask, one: dict[str, Any], other: dict[str, Any]
) -> str:
    """What became of the second: its tier when it hit, else the kind and the reason.

    A hit must be the first one's very answer, and anything else a fresh one: upstream's answers
    carry a serial number.
    """
    key = next(_keys)
    stored = await put(world, first, key, **one)
    answer = await put(world, second, key, **other)
    assert stored.status == answer.status == 200
    assert stored.kind != "HIT"
    assert (answer.text == stored.text) == (answer.kind == "HIT")
    return answer.tier or f"{answer.kind.lower()} {answer.reason}"


REFUND = "Where's my refund?"
REFUND_REWORDED = "Where is my refund?"
HISTORY = [user("I sent my shoes back."), said("Thank you.")]
SUMMARY = [system("Answer briefly."), *HISTORY]

# What real traffic looks like (DESIGN 6): (line, first, second, what becomes of the second).
TRAFFIC: list[tuple[str, Ask, Ask, str]] = [
    ("stream", ask(), ask(stream=True), "exact"),
    ("no stream", ask(stream=True), ask(), "exact"),
    ("stream_options", ask(stream=True), ask(stream=True, stream_options={"include_usage": True}), "exact"),
    ("metadata", ask(metadata={"trace": "1"}), ask(metadata={"trace": "2"}), "exact"),
    ("store", ask(), ask(store=True), "exact"),
    ("prompt_cache_key", ask(prompt_cache_key="a"), ask(prompt_cache_key="b"), "exact"),
    ("prompt_cache_retention", ask(), ask(prompt_cache_retention="24h"), "exact"),
    ("service_tier", ask(service_tier="auto"), ask(service_tier="flex"), "exact"),
    ("cache_control", ask(), ask(cache_control={"type": "ephemeral"}), "exact"),
    (
        "cache_control in a message",
        {"messages": [user([part(CAPITAL)])]},
        {"messages": [user([part(CAPITAL, cache_control={"type": "ephemeral"})])]},
        "exact",
    ),
    ("harmless fields and other words", ask(stream=True, metadata={"a": "1"}), ask(REWORDED, store=True), "semantic"),
    ("seed", ask(seed=1), ask(seed=2), "miss no_entry"),
    ("seed or none", ask(), ask(seed=0), "miss no_entry"),
    ("user", ask(user="ann"), ask(user="bob"), "miss no_entry"),
    ("user or none", ask(), ask(user="bob"), "miss no_entry"),
    ("safety_identifier", ask(safety_identifier="a"), ask(safety_identifier="b"), "miss no_entry"),
    ("metadata.user_id", ask(metadata={"user_id": "a"}), ask(metadata={"user_id": "b"}), "miss no_entry"),
    ("the same user", ask(user="ann"), ask(REWORDED, user="ann"), "semantic"),
    ("string or one text part", ask(), {"messages": [user([part(CAPITAL)])]}, "exact"),
    ("null or absent", ask(), ask(stop=None, tools=None, seed=None, user=None), "exact"),
    ("empty list or absent", ask(), ask(tools=[], stop=[]), "exact"),
    ("1 or 1.0", ask(temperature=1, top_p=1), ask(temperature=1.0, top_p=1.0), "exact"),
    ("white space outside", ask(), ask(f"  {CAPITAL}\n"), "exact"),
    ("white space inside is no exact match", ask("Name  a\n\nfruit."), ask("Name a fruit."), "semantic"),
    ("indentation", ask("What is shown?\nif x:\n    a()\n    b()"), ask("What is shown?\nif x:\n    a()\nb()"), "miss guard"),
    (
        "several parts: the last is fuzzy",
        {"messages": [user([part("Answer in verse."), part(CAPITAL)])]},
        {"messages": [user([part("Answer in verse."), part(REWORDED)])]},
        "semantic",
    ),
    (
        "several parts: the others are exact",
        {"messages": [user([part("Answer in verse."), part(CAPITAL)])]},
        {"messages": [user([part("Answer in prose."), part(CAPITAL)])]},
        "miss no_entry",
    ),
    (
        "a nonce in the system text",
        ask(CAPITAL, system("x-anthropic-billing-header: cc_version=2; cch=0a1b2;")),
        ask(CAPITAL, system("x-anthropic-billing-header: cc_version=2; cch=f9e8d;")),
        "exact",
    ),
    (
        "a nonce, and other words",
        ask(CAPITAL, system("cch=0a1b2; Be brief.")),
        ask(REWORDED, system("cch=f9e8d; Be brief.")),
        "semantic",
    ),
    (
        "no nonce of a known kind",
        ask(CAPITAL, system("request 0a1b2c3d")),
        ask(CAPITAL, system("request f9e8d7c6")),
        "miss no_entry",
    ),
    (
        "dates in the system text are never masked",
        ask(CAPITAL, system("It is 2026-11-20.")),
        ask(CAPITAL, system("It is 2026-11-21.")),
        "miss no_entry",
    ),
    ("a nonce in the user's text is text", ask("cch=0a1b2"), ask("cch=f9e8d"), "miss below_threshold"),
    ("today", ask("What is the weather today?"), ask("What is the weather today?"), "bypass time_bound"),
    ("now", ask("Which shops are open now?"), ask("Which shops are open now?"), "bypass time_bound"),
    ("latest", ask("Who won the latest match?"), ask("Who won the latest match?"), "bypass time_bound"),
    ("hôm nay", ask("Thời tiết hôm nay thế nào?"), ask("Thời tiết hôm nay thế nào?"), "bypass time_bound"),
    ("hiện tại", ask("Giá vàng hiện tại là bao nhiêu?"), ask("Giá vàng hiện tại là bao nhiêu?"), "bypass time_bound"),
    ("web search", ask(web_search_options={}), ask(web_search_options={}), "bypass web_search"),
    (
        "web search as a tool",
        ask(tools=[{"type": "web_search_preview"}]),
        ask(tools=[{"type": "web_search_preview"}]),
        "bypass web_search",
    ),
    ("past the window: the same", ask(f"{SHELVES} Where is item 9?"), ask(f"{SHELVES} Where is item 9?"), "exact"),
    ("past the window: another tail", ask(f"{SHELVES} Sum this up."), ask(f"{SHELVES} DROP TABLE x;"), "miss window"),
    ("past the window: other words", ask(f"{SHELVES} Please sum up."), ask(f"{SHELVES} Please sum it up."), "miss window"),
    ("tools: the same", ask(tools=[TOOL]), ask(tools=[TOOL]), "exact"),
    ("tools: other words", ask(tools=[TOOL]), ask(REWORDED, tools=[TOOL]), "miss tools"),
    (
        "tool_choice none counts as no tools",
        ask(tools=[TOOL], tool_choice="none"),
        ask(REWORDED, tools=[TOOL], tool_choice="none"),
        "semantic",
    ),
    ("a short turn alone", ask(REFUND), ask(REFUND_REWORDED), "semantic"),
    ("a short turn with history", ask(REFUND, *HISTORY), ask(REFUND_REWORDED, *HISTORY), "miss short_turn"),
    ("a short turn with history, the same", ask(REFUND, *HISTORY), ask(REFUND, *HISTORY), "exact"),
    ("an anaphoric turn", ask("And the second one?"), ask("and the second one?"), "miss anaphoric"),
    ("an anaphoric turn, the same", ask("And the second one?"), ask("And the second one?"), "exact"),
    ("a bare yes", ask("yes", *HISTORY), ask("Yes", *HISTORY), "miss anaphoric"),
    ("the same history", ask(FORGOTTEN, *SUMMARY), ask(FORGOT, *SUMMARY), "semantic"),
    ("another history", ask(FORGOTTEN, *HISTORY), ask(FORGOT, user("Hi."), said("Hello.")), "miss no_entry"),
    ("a history or none", ask(FORGOTTEN), ask(FORGOT, *HISTORY), "miss no_entry"),
    ("an image: the same", {"messages": [user([IMAGE, part(CAPITAL)])]}, {"messages": [user([IMAGE, part(CAPITAL)])]}, "exact"),
    (
        "an image: other words",
        {"messages": [user([IMAGE, part(CAPITAL)])]},
        {"messages": [user([IMAGE, part(REWORDED)])]},
        "miss parts",
    ),
    ("Vietnamese: the same", ask(HANOI), ask(HANOI), "exact"),
    ("Vietnamese: other words", ask(HANOI), ask(HANOI_REWORDED), "miss language"),
    ("hot requests want variety", ask(temperature=1.5), ask(temperature=1.5), "bypass temperature"),
    ("several choices: the same", ask(n=2), ask(n=2), "miss choices"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [pytest.param(*row[1:], id=row[0]) for row in TRAFFIC],
)
async def test_what_real_traffic_looks_like(
    plain: World, first: Ask, second: Ask, expected: str
) -> None:
    """I2: fields that vary by call do not partition; whatever may change the answer does."""
    assert await outcome(plain, first, second, {}, {}) == expected


def sent(**headers: str) -> dict[str, Any]:
    return {"headers": {name.replace("_", "-"): value for name, value in headers.items()}}


HEADERS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("anthropic-version", sent(anthropic_version="1"), sent(anthropic_version="2"), "miss no_entry"),
    ("anthropic-beta", {}, sent(anthropic_beta="x"), "miss no_entry"),
    ("OpenAI-Beta", {}, sent(openai_beta="x"), "miss no_entry"),
    ("OpenAI-Organization", sent(openai_organization="a"), sent(openai_organization="b"), "miss no_entry"),
    ("OpenAI-Project", sent(openai_project="a"), sent(openai_project="b"), "miss no_entry"),
    ("x-goog-user-project", {}, sent(x_goog_user_project="p"), "miss no_entry"),
    ("X-Cache-Namespace", {}, sent(x_cache_namespace="n"), "miss no_entry"),
    ("the same in all of them", sent(openai_beta="x", x_cache_namespace="n"), sent(openai_beta="x", x_cache_namespace="n"), "exact"),
    ("a query", {}, {"query": "api-version=1"}, "miss no_entry"),
    ("another query", {"query": "api-version=1"}, {"query": "api-version=2"}, "miss no_entry"),
    ("a query in another order", {"query": "a=1&b=2"}, {"query": "b=2&a=1"}, "exact"),
    ("alt", {}, {"query": "alt=sse"}, "exact"),
    ("user agent, request id, trace", {}, sent(user_agent="x", x_request_id="1", traceparent="y"), "exact"),
    ("the SDK's own", sent(x_stainless_retry_count="0"), sent(x_stainless_retry_count="1"), "exact"),
    ("cookies and languages", {}, sent(cookie="a=b", accept_language="vi"), "exact"),
    ("tags and ttl", sent(x_cache_tags="a", x_cache_ttl="60"), sent(x_cache_tags="b"), "exact"),
    ("the path of another deployment", {"path": "/v1/openai/deployments/a/chat/completions"}, {"path": "/v1/openai/deployments/b/chat/completions"}, "miss no_entry"),
    ("the base path left out", {}, {"path": "/chat/completions"}, "exact"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("one", "other", "expected"), [pytest.param(*row[1:], id=row[0]) for row in HEADERS]
)
async def test_headers_and_queries_that_partition_and_those_that_do_not(
    plain: World, one: dict[str, Any], other: dict[str, Any], expected: str
) -> None:
    """I2: a short named list of headers, the query less keys, and the path."""
    assert await outcome(plain, ask(), ask(), one, other) == expected


CHANGED: list[tuple[str, Ask, Ask]] = [
    *(
        (name, {}, {name: value})
        for name, value in {
            "temperature": 0.2,
            "top_p": 0.5,
            "seed": 7,
            "max_tokens": 50,
            "max_completion_tokens": 50,
            "presence_penalty": 0.5,
            "frequency_penalty": 0.5,
            "logit_bias": {"50256": -100},
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["END"],
            "reasoning_effort": "low",
            "verbosity": "low",
            "modalities": ["text"],
            "parallel_tool_calls": False,
            "top_k": 5,
            "brand_new_field": 0,
            "another_one": {"deep": [1, {"er": None}]},
            "response_format": {"type": "json_object"},
            "model": "gpt-4o",
        }.items()
    ),
    ("value of a field", {"temperature": 0.2}, {"temperature": 0.3}),
    ("model's case", {"model": "gpt-4o"}, {"model": "GPT-4o"}),
    (
        "json_schema",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "a", "schema": {"enum": []}},
            }
        },
    ),
    ("tool_choice", {"tools": [TOOL], "tool_choice": "none"}, {"tool_choice": "none"}),
    (
        "tools",
        {"tools": [TOOL], "tool_choice": "none"},
        {"tools": [OTHER_TOOL], "tool_choice": "none"},
    ),
    ("system text", ask(CAPITAL, system("Be brief.")), ask(CAPITAL, system("Be long."))),
    ("system text or none", {}, ask(CAPITAL, system("Be brief."))),
    (
        "system or developer",
        ask(CAPITAL, system("Be brief.")),
        ask(CAPITAL, {"role": "developer", "content": "Be brief."}),
    ),
    ("order of system texts", ask(CAPITAL, system("a"), system("b")), ask(CAPITAL, system("b"), system("a"))),
    ("one system text or two", ask(CAPITAL, system("ab")), ask(CAPITAL, system("a"), system("b"))),
    ("a turn's name", {}, {"messages": [user(CAPITAL) | {"name": "ann"}]}),
    ("assistant prefill", {}, {"messages": [user(CAPITAL), said("It is")]}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), [pytest.param(*row[1:], id=row[0]) for row in CHANGED])
async def test_one_change_and_neither_wording_hits(plain: World, one: Ask, other: Ask) -> None:
    """I2: the same words and like words miss; what is stored then is the second's own."""
    key = next(_keys)
    stored = await put(plain, ask() | one, key)
    changed = await put(plain, ask() | other, key)
    again = await put(plain, ask() | other, key)
    first_again = await put(plain, ask() | one, key)

    kinds = [answer.kind for answer in (stored, changed, again, first_again)]
    assert kinds == ["MISS", "MISS", "HIT", "HIT"]
    assert again.text == changed.text != stored.text == first_again.text

    reworded = orjson.loads(
        orjson.dumps(ask() | other).replace(orjson.dumps(CAPITAL), orjson.dumps(REWORDED))
    )
    near = await put(plain, reworded, key)
    assert near.text != stored.text


TURNS: list[tuple[str, list[dict[str, Any]], list[dict[str, Any]]]] = [
    ("earlier turn", [user("I use Linux."), said("Good.")], [user("I use Windows."), said("Good.")]),
    ("assistant turn", [user("Hello."), said("I am A.")], [user("Hello."), said("I am B.")]),
    (
        "tool result",
        [
            user("Look."),
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "Linux"},
        ],
        [
            user("Look."),
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "Windows"},
        ],
    ),
    ("one turn more", [user("Hi."), said("Hi.")], [user("Hi."), said("Hi."), user("So."), said("Yes?")]),
    ("who said it", [user("Hi."), said("I am new.")], [user("Hi."), user("I am new.")]),
    ("where a turn ends", [user("a b"), said("c")], [user("a"), said("b c")]),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), [pytest.param(*row[1:], id=row[0]) for row in TURNS])
async def test_another_history_never_hits(
    plain: World, one: list[dict[str, Any]], other: list[dict[str, Any]]
) -> None:
    """I2: every turn but the last user text is compared whole."""
    key = next(_keys)
    stored = await put(plain, ask(FORGOTTEN, *one), key)
    answers = [await put(plain, ask(text, *other), key) for text in (FORGOTTEN, FORGOT)]
    assert all(answer.text != stored.text for answer in answers)
    assert (await put(plain, ask(FORGOTTEN, *one), key)).text == stored.text


# ---- what an operator may opt in to

OPTED: list[tuple[str, Ask, Ask, str]] = [
    ("end users ignored", ask(user="ann"), ask(REWORDED, safety_identifier="b", metadata={"user_id": "c"}), "semantic"),
    (
        "a mask of one's own",
        ask(CAPITAL, system("request 0a1b2c3d")),
        ask(REWORDED, system("request f9e8d7c6")),
        "semantic",
    ),
    (
        "a mask is for system text",
        ask("Explain request 0a1b2c3d to me, please."),
        ask("Explain request f9e8d7c6 to me, please."),
        "miss below_threshold",
    ),
    (
        "the question behind the context",
        ask(f"Context: Paris is in France.\nQuestion: {CAPITAL}"),
        ask(f"Context: Paris is in France.\nQuestion: {REWORDED}"),
        "semantic",
    ),
    (
        "a long context, an equal one",
        ask(f"{SHELVES}\nQuestion: {CAPITAL}"),
        ask(f"{SHELVES}\nQuestion: {REWORDED}"),
        "semantic",
    ),
    (
        "another context",
        ask(f"Context: Paris is in France.\nQuestion: {CAPITAL}"),
        ask(f"Context: Lyon is in France.\nQuestion: {CAPITAL}"),
        "miss no_entry",
    ),
    ("tools by meaning", ask(tools=[TOOL]), ask(REWORDED, tools=[TOOL]), "semantic"),
    ("other tools never", ask(tools=[TOOL]), ask(REWORDED, tools=[OTHER_TOOL]), "miss no_entry"),
    ("time-bound prompts", ask("What is the weather today?"), ask("What is the weather today?"), "exact"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("first", "second", "expected"), [pytest.param(*row[1:], id=row[0]) for row in OPTED]
)
async def test_what_the_operator_opted_in_to(
    loose: World, first: Ask, second: Ask, expected: str
) -> None:
    """Each widening does what its setting says and nothing beside."""
    assert await outcome(loose, first, second, {}, {}) == expected


# ---- the lines of the table that two requests do not show


async def test_who_asks_for_a_fresh_answer_shares_no_call(plain: World) -> None:
    """`no-cache` and `no-store` never collapse: best-of-N wants N answers."""
    release = asyncio.Event()

    async def held(seen: Seen) -> Reply:
        await release.wait()
        return echo(seen)

    plain.upstream.script = held
    before = plain.upstream.calls
    try:
        for directive in ("no-cache", "no-store"):
            key, release = next(_keys), asyncio.Event()
            asked = [
                asyncio.create_task(
                    put(plain, ask(), key, sent(cache_control=directive)["headers"])
                )
                for _ in range(5)
            ]
            await plain.until(lambda wanted=before + 5: plain.upstream.calls == wanted)  # type: ignore[misc]
            release.set()
            answers = await asyncio.gather(*asked)
            assert len({answer.text for answer in answers}) == 5
            assert all("x-cache-collapsed" not in answer.headers for answer in answers)
            before += 5
    finally:
        plain.upstream.script = echo


async def test_an_agent_goes_on(plain: World) -> None:
    """I2: ten turns with the same question and one more tool result each; none is served an old
    answer, so no loop is endless. Asked again, word for word, each is found."""
    key = next(_keys)
    turns: list[dict[str, Any]] = [user("Book me a flight to Hue, please, and a hotel there.")]
    bodies, answers = [], []
    for step in range(10):
        bodies.append({"messages": list(turns), "tools": [TOOL]})
        answers.append(await put(plain, bodies[-1], key))
        function = {"name": "f", "arguments": f'{{"step":{step}}}'}
        call = {"id": f"call_{step}", "type": "function", "function": function}
        turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
        turns.append({"role": "tool", "tool_call_id": call["id"], "content": f"done {step}"})

    assert [answer.kind for answer in answers] == ["MISS"] * 10
    assert len({answer.text for answer in answers}) == 10
    again = [await put(plain, body, key) for body in bodies]
    assert [answer.tier for answer in again] == ["exact"] * 10
    assert [answer.text for answer in again] == [answer.text for answer in answers]


async def test_long_texts_with_one_beginning_never_share(plain: World) -> None:
    """Past the encoder's window, equal first 400 words say nothing: 12 tails, 12 answers."""
    key = next(_keys)
    words = SHELVES.split()
    beginning = " ".join((words * 2)[:400])
    tails = [f"Please describe shelf {tail}." for tail in "abcdefghijkl"]
    answers = [await put(plain, ask(f"{beginning} {tail}"), key) for tail in tails]
    assert len({answer.text for answer in answers}) == len(tails)
    assert {answer.reason for answer in answers[1:]} == {"window"}
    again = [await put(plain, ask(f"{beginning} {tail}"), key) for tail in tails]
    assert [answer.text for answer in again] == [answer.text for answer in answers]


async def test_a_provider_that_refuses_usage_is_asked_once_more_and_remembered(
    make_world: WorldMaker,
) -> None:
    """`include_usage` is a flag by provider: a 422 costs one call, the first time only."""

    def strict(seen: Seen) -> Reply:
        if "stream_options" in seen.json:
            return Reply(422, (b'{"detail":"stream_options: extra fields not permitted"}',))
        return echo(seen)

    async with make_world() as world:
        world.upstream.script = strict
        answers = [await world.ask(f"Question {word}?", stream=True) for word in ("one", "two")]
        assert [answer.status for answer in answers] == [200, 200]
        assert ["stream_options" in seen.json for seen in world.upstream.seen] == [
            True,
            False,
            False,
        ]


async def test_other_protocols_pass_through_untouched(plain: World) -> None:
    """Ids, signatures and encrypted reasoning are upstream's: not a byte is changed or kept."""
    body = b'{ "input":"Hi", "previous_response_id" : "resp_1","signature":"+/=" }'
    for path in ("/v1/responses", "/v1/messages", "/v1/models/m:generateContent"):
        for _ in range(2):
            answer = await plain.send("POST", path, body, {"authorization": "Bearer k"})
            assert (answer.kind, answer.reason) == ("BYPASS", "passthrough")
            assert plain.upstream.seen[-1].body == body
            assert plain.upstream.seen[-1].headers["authorization"] == "Bearer k"


async def test_the_field_that_churns_is_named(make_world: WorldMaker) -> None:
    """When nothing ever repeats, `cache-stats` says which field never rests."""
    async with make_world() as world:
        for number in range(24):
            await world.ask(CAPITAL, trace_number=number)
        assert set(world.kinds) == {"miss"}
        churn = (await world.stats())["churn"]
        assert (churn["field"], churn["share"], churn["model"]) == (
            "trace_number",
            1.0,
            "gpt-4o-mini",
        )


async def test_tool_calls_are_kept_only_when_opted_in(plain: World, loose: World) -> None:
    """I4: a replayed tool call is an action that nobody decided on."""

    def calling(seen: Seen) -> Reply:
        function = {"name": "f", "arguments": "{}"}
        call = {"id": f"call_{seen.number}", "type": "function", "function": function}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
        return whole("", seen, choices=[choice])

    for world, kinds in ((plain, ["MISS", "MISS"]), (loose, ["MISS", "HIT"])):
        world.upstream.script = calling
        key = next(_keys)
        try:
            answers = [await put(world, ask(tools=[TOOL]), key) for _ in kinds]
        finally:
            world.upstream.script = echo
        assert [answer.kind for answer in answers] == kinds


async def test_legacy_completions_partition_as_well(plain: World) -> None:
    """I2: the same text as a chat turn or as a raw prompt is not the same question."""
    key, path = next(_keys), "/v1/completions"
    chat = await put(plain, ask(), key)
    raw = await put(plain, {"prompt": CAPITAL}, key, path=path)
    near = await put(plain, {"prompt": REWORDED}, key, path=path)
    changed = await put(plain, {"prompt": CAPITAL, "suffix": "!"}, key, path=path)
    texts = [answer.json["choices"][0]["text"] for answer in (raw, near, changed)]
    assert [answer.kind for answer in (chat, raw, near, changed)] == ["MISS", "MISS", "HIT", "MISS"]
    assert texts[0] == texts[1] != texts[2]
