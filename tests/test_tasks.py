"""Tasks: a name that stands for a model and how to ask it; what the caller says itself wins."""

from __future__ import annotations

import string
from importlib.resources import as_file, files
from typing import Any

import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.errors import BadRequest, ConfigError
from cache_proxy.settings import load
from cache_proxy.upstream.providers import Provider, Router
from cache_proxy.upstream.tasks import Task, Tasks, written
from tests.conftest import World, WorldMaker
from tests.scripted import scripted_upstream

Json = dict[str, Any]

CHAT = b"/v1/chat/completions"

SUMMARY = Task("gemini-2.5-flash", max_tokens=256, temperature=0.3, priority="critical")
TEMPLATE = Task("m", template="Field: {domain}.\nIn {language}, please.\nSo far: {user_history}")


def ask(model: str = "task/summary", **fields: Any) -> Json:
    return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


def context(values: Any, task: Task = TEMPLATE) -> str | None:
    """The system text that a template becomes."""
    messages = written(task, ask(metadata={"task": values}), CHAT)["messages"]
    return str(messages[0]["content"]) if messages[0]["role"] == "system" else None


def test_a_task_is_a_model_and_how_to_ask_it() -> None:
    """All that it says, written into the request; nothing else is changed."""
    assert written(SUMMARY, ask(top_p=0.5), CHAT) == {
        "model": "gemini-2.5-flash",
        "messages": [{"role": "user", "content": "hi"}],
        "top_p": 0.5,
        "max_tokens": 256,
        "temperature": 0.3,
    }
    assert written(Task("m"), ask(), CHAT) == ask("m")


@pytest.mark.parametrize(
    "own",
    [
        {"max_tokens": 7},
        {"max_completion_tokens": 7},
        {"temperature": 0},
        {"temperature": 1.5, "max_tokens": 0},
    ],
)
def test_what_the_caller_says_itself_wins(own: Json) -> None:
    """Under either name of the limit, and though it be zero; one null says nothing."""
    asked = written(SUMMARY, ask(**own), CHAT)
    assert {name: asked[name] for name in own} == own
    assert sum(name in asked for name in ("max_tokens", "max_completion_tokens")) == 1
    assert written(SUMMARY, ask(temperature=None), CHAT)["temperature"] == 0.3


@pytest.mark.parametrize(
    ("model", "field"),
    [
        ("gpt-4.1", "max_tokens"),
        ("gemini-2.5-flash", "max_tokens"),
        ("openai-compatible", "max_tokens"),
        ("o3-mini", "max_completion_tokens"),
        ("openai/o4-mini", "max_completion_tokens"),
        ("gpt-5.1", "max_completion_tokens"),
        ("GPT-6-sol", "max_completion_tokens"),
    ],
)
def test_the_limit_is_named_as_the_model_wants_it(model: str, field: str) -> None:
    """OpenAI's reasoning models refuse `max_tokens`; nobody else knows another name."""
    asked = written(Task(model, max_tokens=9), ask(), CHAT)
    assert {k: v for k, v in asked.items() if k.startswith("max_")} == {field: 9}


@pytest.mark.parametrize(
    ("path", "own", "asked"),
    [
        (
            b"/v1/completions",
            {"prompt": "Once"},
            {"prompt": "In French.\n\nOnce", "max_tokens": 9, "temperature": 0.1},
        ),
        (
            b"/v1/responses",
            {"input": "hi", "instructions": "Be brief."},
            {
                "input": "hi",
                "instructions": "In French.\n\nBe brief.",
                "max_output_tokens": 9,
                "temperature": 0.1,
            },
        ),
        (
            b"/v1/responses",
            {"input": "hi", "max_output_tokens": 5, "temperature": 1},
            {"input": "hi", "max_output_tokens": 5, "temperature": 1, "instructions": "In French."},
        ),
        (
            b"/v1/messages",
            {"max_tokens": 5, "system": [{"type": "text", "text": "Be brief."}]},
            {
                "max_tokens": 5,
                "system": [
                    {"type": "text", "text": "In French."},
                    {"type": "text", "text": "Be brief."},
                ],
                "temperature": 0.1,
            },
        ),
        (b"/v1/embeddings", {"input": "a"}, {"input": "a"}),
        (b"/v1/images/generations", {"prompt": "a"}, {"prompt": "a"}),
    ],
)
def test_each_protocol_is_asked_in_its_own_words(path: bytes, own: Json, asked: Json) -> None:
    """The same task by other names; where a task has no meaning it is a model and no more."""
    task = Task("gpt-5", max_tokens=9, temperature=0.1, template="In {language}.")
    body = {**own, "metadata": {"task": {"language": "French"}}}
    assert written(task, body, path) == asked | {"model": "gpt-5"}


def test_a_template_becomes_system_text_before_the_callers_own() -> None:
    """What the caller lays down comes later, and so has the last word."""
    body = ask(metadata={"task": {"domain": "law", "language": "Dutch", "user_history": "none"}})
    body["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert written(TEMPLATE, body, CHAT)["messages"] == [
        {"role": "system", "content": "Field: law.\nIn Dutch, please.\nSo far: none"},
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"domain": "law"}, "Field: law."),
        ({"domain": "law", "language": None, "user_history": "  "}, "Field: law."),
        ({"user_history": "one\ntwo"}, "So far: one\ntwo"),
        (
            {"domain": "{language}", "language": "{0.__class__}"},
            "Field: {language}.\nIn {0.__class__}, please.",
        ),
        ({"domain": r"\1 \g<0>"}, r"Field: \1 \g<0>."),
        ({}, None),
    ],
)
def test_a_missing_value_leaves_its_line_out(values: Json, text: str | None) -> None:
    """And a value is text: braces and backslashes in it mean nothing."""
    assert context(values) == text


def test_lines_without_a_value_always_stand() -> None:
    """A template may be no more than a sentence."""
    assert context({}, Task("m", template="Be kind.\n{domain}")) == "Be kind."
    assert written(Task("m", template="Be kind."), ask(), CHAT)["messages"][0]["role"] == "system"


def test_what_fills_the_template_stays_here() -> None:
    """`metadata.task` is ours alone, template or not; the rest of the metadata goes on."""
    told = {"task": {"domain": "law"}}
    assert "metadata" not in written(SUMMARY, ask(metadata=told), CHAT)
    both = written(SUMMARY, ask(metadata={**told, "run": "7"}), CHAT)
    assert both["metadata"] == {"run": "7"}


@pytest.mark.parametrize(
    "told", ["law", ["law"], {"domian": "law"}, {"domain": 7}, {"domain": []}, None]
)
def test_values_that_cannot_be_meant_are_refused(told: Any) -> None:
    """A misspelt name would leave its line out for ever, so it is told; the text is not (I9)."""
    with pytest.raises(BadRequest, match=r"metadata\.task") as caught:
        written(TEMPLATE, ask(metadata={"task": told}), CHAT)
    assert caught.value.status == 400
    assert "law" not in str(caught.value)


@given(
    st.dictionaries(
        st.sampled_from(["user_history", "domain", "language"]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    )
)
def test_values_go_in_as_they_are(values: dict[str, str]) -> None:
    """Whatever is in them; and what the caller sent is not changed under its hands."""
    body = ask(metadata={"task": values})
    said = written(TEMPLATE, body, CHAT)["messages"][0]
    for value in values.values():
        assert not value.strip() or value.strip() in said["content"]
    assert body == ask(metadata={"task": values})


def test_a_name_that_is_no_task_is_a_model() -> None:
    """Only what begins with `task/` means one."""
    tasks = Tasks({"summary": SUMMARY})
    assert tasks.named("task/summary") is SUMMARY
    assert [tasks.named(model) for model in ("summary", "gpt-4o", "", "mytask/summary")] == [
        None
    ] * 4


@pytest.mark.parametrize("name", ["", "Summary", "summary ", "x", "summary/x"])
def test_an_unknown_task_is_told_with_the_known_ones(name: str) -> None:
    """404 under the code for a model that does not exist; the name itself is not repeated."""
    with pytest.raises(BadRequest) as caught:
        Tasks({"summary": SUMMARY, "code": Task("m")}).named("task/" + name)
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert str(caught.value) == "There is no such task; there are task/summary, task/code."


def test_a_task_has_its_class_and_the_caller_may_give_another() -> None:
    """`X-Priority` is a word of the caller's own, and so goes before the task's."""
    router = Router([Provider("", "http://up/v1")], tasks=Tasks({"summary": SUMMARY}))

    def priority(model: str, *headers: tuple[bytes, bytes]) -> str:
        return router.route(CHAT, list(headers), ask(model))[0].priority

    assert priority("task/summary") == "critical"
    assert priority("task/summary", (b"x-priority", b"best_effort")) == "best_effort"
    assert priority("gpt-4o") == ""


def test_a_template_with_an_unknown_value_stops_at_start() -> None:
    """It would never be filled; other braces are text."""
    with pytest.raises(ConfigError, match=r"tasks: the template of code knows no \{langauge\}"):
        Tasks({"code": Task("m", template="In {langauge}.")})
    Tasks({"code": Task("m", template='Answer as {"a": 1} or { }.')})


def test_the_example_file_is_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    """The five tasks as shipped: read by the settings, each with a model, none too hot to keep."""
    monkeypatch.delenv("CACHE_PROXY_CONFIG", raising=False)
    with as_file(files("cache_proxy").joinpath("examples/tasks.toml")) as path:
        settings = load(path)
    assert list(settings.tasks) == [
        "fast_summary",
        "detailed_analysis",
        "code_generation",
        "creative_writing",
        "reasoning",
    ]
    Tasks({name: Task(**dict(table)) for name, table in settings.tasks.items()})
    for task in settings.tasks.values():
        assert task.max_tokens
        assert (task.temperature or 0.0) <= settings.max_temperature
    values = {
        field
        for _, field, *_ in string.Formatter().parse(settings.tasks["detailed_analysis"].template)
    }
    assert values - {None} == {"user_history", "domain", "language"}


# Live --------------------------------------------------------------------------------------------

TASKS = {
    "summary": {"model": "gemini-2.5-flash", "max_tokens": 256, "temperature": 0.3},
    "expert": {"model": "gpt-4.1", "template": "Field: {domain}.\nSo far: {user_history}"},
}


def client(world: World) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key="sk-one", base_url=world.base, max_retries=2)


@pytest.mark.live
async def test_what_is_looked_up_is_what_would_be_sent(make_world: WorldMaker) -> None:
    """A task and the same request spelt out are one question; other parameters are another."""
    async with make_world(model="none", tasks=TASKS) as world:
        plain = {"model": "gemini-2.5-flash", "max_tokens": 256, "temperature": 0.3}
        await world.ask("hi", model="task/summary")
        await world.ask("hi", **plain)
        await world.ask("hi", model="task/summary", stream=True)
        await world.ask("hi", model="task/summary", temperature=0.5)
        await world.ask("hi", model="gemini-2.5-flash")
        assert world.kinds == ["miss", "hit", "hit", "miss", "miss"]
        told = [{k: v for k, v in s.json.items() if k != "messages"} for s in world.upstream.seen]
        assert told == [plain, plain | {"temperature": 0.5}, {"model": "gemini-2.5-flash"}]


@pytest.mark.live
async def test_what_a_user_told_a_task_is_that_users(make_world: WorldMaker) -> None:
    """I2: two histories are two questions; upstream reads the text and never the field."""
    async with make_world(tasks=TASKS) as world:
        for history in ("asked about tax", "asked about rent", "asked about tax"):
            metadata = {"task": {"domain": "law", "user_history": history}, "run": "7"}
            await world.ask("Does that apply to me?", model="task/expert", metadata=metadata)
        assert world.kinds == ["miss", "miss", "hit"]
        sent = world.upstream.seen[0].json
        assert sent["messages"][0]["content"] == "Field: law.\nSo far: asked about tax"
        assert (sent["model"], sent["metadata"]) == ("gpt-4.1", {"run": "7"})


@pytest.mark.live
async def test_an_sdk_asks_for_a_task_by_name(make_world: WorldMaker) -> None:
    """Whole and as a stream, whose usage is measured as ever; an unknown task is told, once."""
    async with make_world(model="none", tasks=TASKS) as world:
        chat = client(world).chat.completions
        messages: Any = [{"role": "user", "content": "hi"}]
        said = await chat.create(model="task/summary", messages=messages)
        stream = await chat.create(model="task/expert", messages=messages, stream=True)
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert said.choices[0].message.content == world.upstream.seen[0].answered
        assert text == world.upstream.seen[1].answered
        assert world.upstream.seen[1].json["model"] == "gpt-4.1"
        assert world.upstream.seen[1].json["stream_options"] == {"include_usage": True}
        with pytest.raises(openai.NotFoundError, match="there are task/summary, task/expert") as no:
            await chat.create(model="task/sumary", messages=messages)
        assert no.value.code == "model_not_found"
        assert world.upstream.calls == 2
        stats = await world.stats()
        assert (stats["requests"], stats["misses"], stats["errors"]) == (3, 2, 1)


@pytest.mark.live
async def test_a_task_goes_to_the_provider_of_its_model(make_world: WorldMaker) -> None:
    """By pattern or by name, as if the caller had asked for that model itself."""
    async with scripted_upstream() as other:
        providers = {"other": {"base_url": other.base_url, "protocol": "openai", "models": ["x-*"]}}
        tasks = {"pattern": {"model": "x-large"}, "name": {"model": "other/small"}, **TASKS}
        async with make_world(model="none", providers=providers, tasks=tasks) as world:
            for task in ("pattern", "name", "summary"):
                assert (await world.ask("hi", model=f"task/{task}")).status == 200
            assert [seen.json["model"] for seen in other.seen] == ["x-large", "small"]
            assert [seen.json["model"] for seen in world.upstream.seen] == ["gemini-2.5-flash"]


@pytest.mark.live
async def test_paths_that_are_not_cached_know_tasks_too(make_world: WorldMaker) -> None:
    """Asked in their own words; an unknown task is told in the shape of their own errors."""
    async with make_world(model="none", tasks=TASKS) as world:
        headers = {"content-type": "application/json", "authorization": "Bearer sk-one"}
        body = {"model": "task/summary", "input": "hi"}
        await world.send("POST", "/v1/responses", orjson.dumps(body), headers)
        assert world.upstream.seen[0].json == {
            "model": "gemini-2.5-flash",
            "input": "hi",
            "max_output_tokens": 256,
            "temperature": 0.3,
        }
        body = {"model": "task/none", "max_tokens": 5, "messages": []}
        told = await world.send("POST", "/v1/messages", orjson.dumps(body), headers)
        assert (told.status, told.json["error"]["type"]) == (404, "not_found_error")
        assert world.upstream.calls == 1


@pytest.mark.live
async def test_with_no_task_configured_the_name_is_a_model(make_world: WorldMaker) -> None:
    """Neutral until configured: upstream may know a model of that name."""
    async with make_world(model="none") as world:
        assert (await world.ask("hi", model="task/summary")).status == 200
        assert world.upstream.seen[0].json["model"] == "task/summary"


@pytest.mark.live
async def test_a_request_without_a_task_stays_byte_for_byte(make_world: WorldMaker) -> None:
    """Tasks and trimming configured or not: only what they change is written anew."""
    odd = (
        b'{"model": "gpt-4o",\n "messages":[{"role":"user","content":"caf\\u00e9"}],'
        b' "metadata": {"task": {"domain": "law"}},"z":1.50}'
    )
    trim = {"enabled": True}
    async with make_world(model="none", tasks=TASKS, trim=trim) as world:
        headers = {"content-type": "application/json"}
        for path in ("/v1/chat/completions", "/v1/responses"):
            await world.send("POST", path, odd, headers)
            assert world.upstream.seen[-1].body == odd
