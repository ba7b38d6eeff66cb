"""Trimming: whole turns go, oldest first; what is left is a conversation, and it fits."""

from __future__ import annotations

import tomllib
from contextlib import suppress
from datetime import date
from importlib.resources import files
from itertools import count
from typing import Any

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy import tokens
from cache_proxy.errors import BadRequest
from cache_proxy.upstream.trim import TooLong, Trimmed, Trimmer, shipped_windows, trim
from tests.conftest import WorldMaker

Json = dict[str, Any]


def weigh(message: Json) -> int:
    return int(message["weight"])


def say(role: str, weight: int = 10, **more: Any) -> Json:
    return {"role": role, "content": "words", "weight": weight, **more}


def called(*ids: str, weight: int = 10) -> Json:
    calls = [{"id": name, "type": "function", "function": {"name": "f"}} for name in ids]
    return say("assistant", weight, tool_calls=calls)


def told(name: str, weight: int = 10) -> Json:
    return say("tool", weight, tool_call_id=name)


WEIGHTS = st.integers(1, 40)


@st.composite
def conversations(draw: st.DrawFn) -> list[Json]:
    """Everybody speaks in any order; calls are answered, sometimes after the user spoke again."""
    ids = (f"call-{n}" for n in count())
    messages: list[Json] = []
    for kind in draw(st.lists(st.sampled_from("suuadtTfF"), max_size=14)):
        match kind:
            case "s":
                messages.append(say(draw(st.sampled_from(["system", "developer"])), draw(WEIGHTS)))
            case "u" | "a":
                messages.append(say("user" if kind == "u" else "assistant", draw(WEIGHTS)))
            case "f" | "F":
                name = next(ids)
                messages.append(say("assistant", draw(WEIGHTS), function_call={"name": name}))
                messages += [say("user", draw(WEIGHTS))] if kind == "F" else []
                messages.append(say("function", draw(WEIGHTS), name=name))
            case "d":
                messages.append(told(next(ids)))  # an orphan from the start
            case "t" | "T":
                names = [next(ids) for _ in range(draw(st.integers(1, 3)))]
                messages.append(called(*names, weight=draw(WEIGHTS)))
                between = [say("user", draw(WEIGHTS))] if kind == "T" else []
                messages += [told(names[0]), *between, *(told(name) for name in names[1:])]
    # Distinct, so that it can be told which of them are left.
    return [message | {"content": f"words {n}"} for n, message in enumerate(messages)]


def pairs(messages: list[Json]) -> set[tuple[str, str]]:
    """(id, what became of it) for each call that somebody makes or answers."""
    made = {call["id"] for m in messages for call in m.get("tool_calls", ())}
    made |= {m["function_call"]["name"] for m in messages if "function_call" in m}
    answered = {m["tool_call_id"] for m in messages if m["role"] == "tool"}
    answered |= {m["name"] for m in messages if m["role"] == "function"}
    return (
        {(name, "whole") for name in made & answered}
        | {(name, "unanswered") for name in made - answered}
        | {(name, "orphan") for name in answered - made}
    )


@given(conversations(), st.integers(0, 300))
def test_what_is_left_fits_and_is_still_a_conversation(messages: list[Json], room: int) -> None:
    """Never over the budget; order, system text, pairs and the newest turn stay; idempotent."""
    verdict = trim(messages, room, weigh, weigh)
    total = sum(map(weigh, messages))
    if isinstance(verdict, TooLong):
        assert total == verdict.tokens
        assert total >= verdict.least > room
        return
    left = verdict.messages
    assert sum(map(weigh, left)) <= room
    assert left == [message for message in messages if message in left]  # in order, unchanged
    assert (verdict.dropped, verdict.tokens) == (
        len(messages) - len(left),
        total - sum(map(weigh, left)),
    )
    system = [message for message in messages if message["role"] in ("system", "developer")]
    assert [message for message in left if message in system] == system
    assert pairs(left) <= pairs(messages)  # no call lost its result, no result its call
    spoken = [n for n, message in enumerate(messages) if message["role"] == "user"]
    if spoken:
        assert all(message in left for message in messages[spoken[-1] :])
    else:
        assert left == messages  # one turn, however long
    assert trim(left, room, weigh, weigh) == Trimmed(left)


@given(conversations())
def test_what_fits_is_not_touched(messages: list[Json]) -> None:
    """Exactly the budget is no more than the budget; the very list is handed back."""
    verdict = trim(messages, sum(map(weigh, messages)), weigh, weigh)
    assert verdict == Trimmed(messages)
    assert isinstance(verdict, Trimmed)
    assert verdict.messages is messages


STORY = [
    say("system"),
    say("user"),
    say("assistant"),
    say("user"),
    called("a", "b"),
    told("a"),
    told("b"),
    say("assistant"),
    say("developer"),
    say("user"),
    say("assistant"),
    say("user"),
]


@pytest.mark.parametrize(
    ("room", "kept"),
    [
        (120, range(12)),
        (119, [0, *range(3, 12)]),
        (100, [0, *range(3, 12)]),
        (99, [0, 8, 9, 10, 11]),
        (50, [0, 8, 9, 10, 11]),
        (49, [0, 8, 11]),
        (30, [0, 8, 11]),
    ],
)
def test_the_oldest_turns_go_first_and_no_more_of_them_than_needed(
    room: int, kept: list[int]
) -> None:
    """A turn is all that was said until the user spoke again."""
    verdict = trim(STORY, room, weigh, weigh)
    assert isinstance(verdict, Trimmed)
    assert verdict.messages == [STORY[n] for n in kept]


def test_what_must_stay_and_does_not_fit_is_told_in_numbers() -> None:
    """Not mangled: the caller learns how much there is and how much of it cannot go."""
    assert trim(STORY, 29, weigh, weigh) == TooLong(tokens=120, least=30)


@pytest.mark.parametrize(
    ("many", "kept"),
    [(["user", "assistant"] * 500, 4), (["user", *["assistant"] * 998, "user"], 1)],
    ids=["many turns", "one long turn"],
)
def test_no_more_is_weighed_than_fits(many: list[str], kept: int) -> None:
    """A conversation of any length costs what its window holds: the rest is guessed at, but for a
    little to tell of."""
    story = [say("system"), *(say(role, 50_000) for role in many)]
    weighed: list[Json] = []

    def counted(message: Json) -> int:
        weighed.append(message)
        return weigh(message)

    verdict = trim(story, 250_000, counted, lambda message: 1)
    assert isinstance(verdict, Trimmed)
    assert verdict.messages == [story[0], *story[-kept:]]
    assert (verdict.dropped, verdict.tokens) == (1_000 - kept, 2 * 50_000 + 998 - kept)
    assert len(weighed) < 10


def test_messages_sent_in_a_row_are_one_turn() -> None:
    """A document and the question about it, sent as two messages, are not parted."""
    story = [say("user"), say("assistant"), say("user", 50), say("system"), say("user")]
    assert trim(story, 70, weigh, weigh) == Trimmed(story[2:], 2, 20)
    assert isinstance(trim(story, 69, weigh, weigh), TooLong)


def test_a_call_and_a_result_that_came_after_the_user_spoke_stay_together() -> None:
    """The two turns go together or stay together, ids used again notwithstanding."""
    story = [
        say("user"),
        called("a"),
        told("a"),
        say("user"),
        called("a"),
        say("user"),
        say("assistant"),
        say("user"),
        told("a"),
        say("assistant"),
        say("user"),
    ]
    assert trim(story, 100, weigh, weigh) == Trimmed(story[3:], 3, 30)
    assert trim(story, 79, weigh, weigh) == Trimmed(story[10:], 10, 100)


def chat(*messages: Json, model: str = "m", **fields: Any) -> Json:
    return {"model": model, "messages": list(messages), **fields}


def user(text: str) -> Json:
    return {"role": "user", "content": text}


def answered(text: str) -> Json:
    return {"role": "assistant", "content": text}


OLD, NEW = [user("old " * 300), answered("so " * 300)], user("new question")


@pytest.mark.parametrize(
    ("fields", "gone"),
    [
        ({}, 2),  # 1,000 less the reserve
        ({"max_tokens": 300}, 0),
        ({"max_completion_tokens": 300}, 0),
        ({"max_tokens": 500}, 2),
        ({"max_tokens": 300, "tools": [{"type": "function", "function": {"name": "f " * 400}}]}, 2),
    ],
)
def test_the_answer_and_the_tools_have_their_share_of_the_window(fields: Json, gone: int) -> None:
    """What the request names for the answer is kept, else the reserve."""
    trimmer = Trimmer([("m", 1_000)], reserve=250)
    document = chat(*OLD, NEW, **fields)
    if not fields:
        document["messages"][0] = user("old " * 600)
    fitted, (dropped, freed) = trimmer.fit(document, "p", "m")
    assert dropped == gone
    assert (fitted is document) == (gone == 0)
    assert {**fitted, "messages": 0} == {**document, "messages": 0}
    assert freed == sum(tokens.of_message(m, "m") for m in document["messages"][:gone])


def test_the_reserve_leaves_a_small_window_its_use() -> None:
    """A reserve larger than the window would refuse everything: a quarter of it is enough."""
    trimmer = Trimmer([("m", 1_000)], reserve=4_096)
    document = chat(*OLD, NEW)
    assert trimmer.fit(document, "p", "m")[1][0] == 0


def test_a_request_that_cannot_fit_is_refused_with_numbers() -> None:
    """400 in words and figures, under the code that SDKs and frameworks look for."""
    trimmer = Trimmer([("m", 1_000)], reserve=4_096)
    document = chat(*OLD, user("new " * 1_500), max_tokens=100)
    with pytest.raises(BadRequest) as caught:
        trimmer.fit(document, "p", "m")
    has = sum(tokens.of_message(m, "m") for m in document["messages"]) + tokens.REPLY_TOKENS
    least = tokens.of_message(document["messages"][-1], "m") + tokens.REPLY_TOKENS
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded")
    for figure in (has, least, 1_000, 900, 100):
        assert f" {figure} " in str(caught.value).replace(",", " ")
    assert "new new" not in str(caught.value)  # I9


@given(
    st.lists(st.tuples(st.sampled_from(["user", "assistant", "system"]), st.integers(0, 60))),
    st.integers(60, 500),
)
def test_a_fitted_request_never_outgrows_its_window(
    said: list[tuple[str, int]], window: int
) -> None:
    """By the same count as any other: messages, what frames them, and the answer."""
    document = chat(*({"role": role, "content": "word " * n} for role, n in said))
    try:
        fitted, _ = Trimmer([("*", window)], reserve=20).fit(document, "p", "m")
    except BadRequest:
        return
    read = sum(tokens.of_message(m, "m") for m in fitted["messages"]) + tokens.REPLY_TOKENS
    answer = min(20, window // 4)
    assert read + answer <= window or len(orjson.dumps(document)) + answer <= window


def test_pictures_are_counted_though_their_address_is_short() -> None:
    """The quick way out, by bytes, is for text alone."""
    picture = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": "https://x"}}],
    }
    document = chat(picture, answered("a cat"), NEW)
    assert Trimmer([("m", 1_000)], reserve=10).fit(document, "p", "m")[1][0] == 2


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from(["", "user", "tool", "text", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "type", "text", "name", "image_url"]), inner)
    ),
    max_leaves=8,
)
FIELDS = st.sampled_from(["role", "content", "name", "tool_calls", "tool_call_id", "function_call"])


@given(st.lists(st.dictionaries(FIELDS, JSON), max_size=6), JSON, st.integers(1, 200))
def test_whatever_stands_in_the_messages_is_counted_or_refused(
    messages: list[Json], limit: Any, window: int
) -> None:
    """Upstream judges what is odd; nothing in here falls over it, whatever its type."""
    document = chat(*messages, max_tokens=limit, tools=limit)
    with suppress(BadRequest):
        fitted, (dropped, _) = Trimmer([("m", window)], reserve=9).fit(document, "p", "m")
        assert len(fitted["messages"]) + dropped == len(messages)


@pytest.mark.parametrize("messages", [None, "hi", [1], {"role": "user"}])
def test_shapes_that_are_not_known_are_left_alone(messages: Any) -> None:
    """Upstream judges them; nothing here guesses."""
    document = {"model": "m", "messages": messages}
    assert Trimmer([("m", 1)], reserve=1).fit(document, "p", "m") == (document, (0, 0))


def test_windows_are_found_by_model_by_provider_and_by_name_within_a_catalogue() -> None:
    """The first glob counts, so one's own go before the packaged ones; unknown is never trimmed."""
    own = [("local/*", 2_048), ("gpt-4o-mini", 9_000)]
    trimmer = Trimmer([*own, *shipped_windows()], reserve=1)
    assert trimmer.window("local", "gpt-4o") == 2_048
    assert trimmer.window("openai", "gpt-4o-mini") == 9_000
    assert trimmer.window("openai", "gpt-4o") == 128_000
    assert trimmer.window("openrouter", "openai/gpt-4o") == 128_000
    assert trimmer.window("openai", "GPT-4o-2024-08-06") == 128_000
    assert trimmer.window("openai", "nobody-knows") is None
    document = chat(*OLD, NEW)
    assert trimmer.fit(document, "local", "any")[1][0] == 0
    assert Trimmer([("local/*", 500)], reserve=1).fit(document, "local", "any")[1][0] == 2


@pytest.mark.parametrize(
    ("model", "window"),
    [
        ("gpt-3.5-turbo-0125", 16_385),
        ("gpt-4", 8_192),
        ("gpt-4-turbo-2024-04-09", 128_000),
        ("gpt-4.1-mini", 1_000_000),
        ("gpt-5-nano", 400_000),
        ("gpt-5.4-mini", 400_000),
        ("gpt-5.4", 1_000_000),
        ("o3-mini", 200_000),
        ("claude-3-5-sonnet-20241022", 200_000),
        ("claude-sonnet-4-20250514", 200_000),
        ("claude-haiku-4-5", 200_000),
        ("claude-opus-4-8", 1_000_000),
        ("claude-sonnet-5-5", 1_000_000),
        ("gemini-2.5-flash", 1_000_000),
        ("deepseek-chat", 128_000),
        ("kimi-k2-thinking", 262_144),
    ],
)
def test_the_packaged_windows(model: str, window: int) -> None:
    """Particular names go before the general ones that would match them too."""
    assert Trimmer(shipped_windows(), reserve=1).window("", model) == window


def test_every_packaged_window_says_where_it_is_from_and_when() -> None:
    """A figure that nobody can look up is a rumour."""
    text = files("cache_proxy.upstream").joinpath("windows.toml").read_text("utf-8")
    for table in tomllib.loads(text)["window"]:
        assert table["models"]
        assert table["tokens"] >= 4_096
        assert len(table["source"]) > 10
        assert date(2025, 1, 1) < table["date"] < date(2100, 1, 1)


def test_no_packaged_window_is_wider_than_published() -> None:
    """The published data of the price package as the judge, for the makers' own models."""
    from genai_prices.data_snapshot import get_snapshot

    trimmer = Trimmer(shipped_windows(), reserve=1)
    makers = {"openai", "anthropic", "google", "x-ai", "moonshotai"}
    checked = 0
    for provider in get_snapshot().providers:
        for model in provider.models if provider.id in makers else ():
            window = trimmer.window("", model.id)
            if window is not None and model.context_window is not None:
                assert window <= model.context_window, model.id
                checked += 1
    assert checked > 100


# Live --------------------------------------------------------------------------------------------

TRIM = {"enabled": True, "reserve": 100, "windows": {"tiny": 1_000}}
RULES = {"role": "system", "content": "Be brief."}


@pytest.mark.live
@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_left_out_is_told_and_the_rest_is_the_question(
    make_world: WorldMaker, stream: bool
) -> None:
    """What is looked up is what would be sent: whatever was left out, the same rest is a hit, and
    the header stands on hits and misses alike."""
    async with make_world(model="none", trim=TRIM) as world:
        story = [RULES, user("one " * 600), answered("ah " * 600), user("What is left?")]
        other = [RULES, user("two " * 700), answered("oh " * 700), user("What is left?")]
        first = await world.ask(story, model="tiny", stream=stream)
        again = await world.ask(other, model="tiny", stream=stream)
        short = await world.ask([RULES, user("What is left?")], model="tiny", stream=stream)
        assert world.kinds == ["miss", "hit", "hit"]
        assert world.upstream.seen[0].json["messages"] == [RULES, user("What is left?")]
        for told, gone in ((first, story[1:3]), (again, other[1:3])):
            freed = sum(tokens.of_message(message, "tiny") for message in gone)
            assert told.headers["x-trimmed"] == f"2 messages, {freed} tokens"
        assert "x-trimmed" not in short.headers


@pytest.mark.live
async def test_an_sdk_is_told_that_a_request_cannot_fit(make_world: WorldMaker) -> None:
    """Asked once, refused at once, under the code that frameworks compact their history on."""
    async with make_world(model="none", trim=TRIM) as world:
        client = openai.AsyncOpenAI(api_key="sk-one", base_url=world.base, max_retries=2)
        messages: Any = [user("old"), answered("so"), user("new " * 1_500)]
        with pytest.raises(openai.BadRequestError, match="At most 900 fit") as caught:
            await client.chat.completions.create(model="tiny", messages=messages)
        assert (caught.value.code, world.upstream.calls) == ("context_length_exceeded", 0)
        assert "x-trimmed" not in caught.value.response.headers


@pytest.mark.live
async def test_nothing_is_trimmed_unless_asked_for(make_world: WorldMaker) -> None:
    """Off, the longest conversation goes upstream as it is, and a bypass is trimmed if on."""
    story = [user("one " * 2_000), answered("ah"), user("hi")]
    async with make_world(model="none", trim=TRIM | {"enabled": False}) as world:
        told = await world.ask(story, model="tiny")
        assert (told.status, "x-trimmed" in told.headers) == (200, False)
        assert world.upstream.seen[0].json["messages"] == story
    async with make_world(model="none", trim=TRIM) as world:
        told = await world.ask(story, model="tiny", headers={"x-cache-mode": "off"})
        assert (told.kind, told.headers["x-trimmed"][:11]) == ("BYPASS", "2 messages,")
        assert world.upstream.seen[0].json["messages"] == story[2:]
