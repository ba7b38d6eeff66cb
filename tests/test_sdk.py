"""The clients that people use, as they are, with nothing changed but the base URL.

The real `openai` and `langchain-openai` packages, sync and async, before a real sidecar.
"""

from __future__ import annotations

import asyncio
import base64
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import openai
import orjson
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from tests.conftest import World, WorldMaker
from tests.scripted import Reply, Seen, echo, scripted_upstream, vectors

pytestmark = pytest.mark.live

T = TypeVar("T")

MODEL = "gpt-4o-mini"
FRANCE = "What is the capital of France?"
FRANCE_REWORDED = "What's the capital city of France?"
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "station",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
USAGE = {
    "prompt_tokens": 21,
    "completion_tokens": 8,
    "total_tokens": 29,
    "prompt_tokens_details": {"cached_tokens": 4},
    "completion_tokens_details": {"reasoning_tokens": 3},
}


def asks(text: str) -> Any:
    return [{"role": "user", "content": text}]


async def in_thread(work: Callable[[], T]) -> T:
    """The sync client blocks; the sidecar lives on this test's loop."""
    return await asyncio.to_thread(work)


@asynccontextmanager
async def client(world: World, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=world.base, api_key="sk-one", **options) as made:
        yield made


def sync_client(world: World, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=world.base, api_key="sk-one", **options)


# A richer upstream -------------------------------------------------------------------------------


def rich(seen: Seen) -> Reply:
    """Answers with all that was asked for: reasoning, log-probabilities, choices, tool calls."""
    if not seen.path.endswith("/chat/completions"):
        return echo(seen)
    asked = seen.json
    seen.usage = USAGE
    base = {"id": f"chatcmpl-up{seen.number}", "created": 1_700_000_000, "model": asked["model"]}
    choices = [_choice(n, asked, seen) for n in range(asked.get("n") or 1)]
    if not asked.get("stream"):
        body = base | {"object": "chat.completion", "choices": choices, "usage": USAGE}
        return Reply(parts=(orjson.dumps(body),))
    events = [
        base | {"object": "chat.completion.chunk", "choices": [piece]}
        for choice in choices
        for piece in _pieces(choice)
    ]
    if (asked.get("stream_options") or {}).get("include_usage"):
        events.append(base | {"object": "chat.completion.chunk", "choices": [], "usage": USAGE})
    parts = [b"data: " + orjson.dumps(event) + b"\n\n" for event in events]
    return Reply(
        parts=(*parts, b"data: [DONE]\n\n"), headers=(("content-type", "text/event-stream"),)
    )


def _choice(index: int, asked: dict[str, Any], seen: Seen) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    if asked.get("tools"):
        call = {"name": "station", "arguments": '{"city": "Hà Nội"}'}
        message["tool_calls"] = [
            {"id": f"call_{seen.number}", "type": "function", "function": call},
            {"id": f"call_{seen.number}b", "type": "function", "function": call},
        ]
        return {"index": index, "message": message, "logprobs": None, "finish_reason": "tool_calls"}
    message["content"] = f"Paris, says call {seen.number}, choice {index}."
    if asked["model"] == "deepseek-reasoner":
        message["reasoning_content"] = f"France... call {seen.number}"
    logprobs = None
    if asked.get("logprobs"):
        token = {"token": "Paris", "bytes": [80], "logprob": -0.25, "top_logprobs": []}
        logprobs = {"content": [token, token | {"logprob": -0.5}], "refusal": None}
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": "stop"}


def _pieces(choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One choice as OpenAI streams it: a few letters a piece, arguments too."""
    index, message = choice["index"], choice["message"]

    def piece(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None} | more

    yield piece({"role": "assistant", "content": "" if message["content"] else None})
    for name in ("reasoning_content", "content"):
        text = message.get(name) or ""
        told = (choice["logprobs"] or {}).get("content") if name == "content" else None
        for at in range(0, len(text), 9):
            bearer = {"logprobs": {"content": [told.pop(0)]}} if told else {}
            yield piece({name: text[at : at + 9]}, **bearer)
    for n, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        head = {"index": n, "id": call["id"], "type": "function"}
        yield piece({"tool_calls": [head | {"function": {"name": "station", "arguments": ""}}]})
        for at in range(0, len(function["arguments"]), 5):
            part = {"arguments": function["arguments"][at : at + 5]}
            yield piece({"tool_calls": [{"index": n, "function": part}]})
    yield piece({}, finish_reason=choice["finish_reason"])


def gathered(chunks: list[ChatCompletionChunk]) -> dict[str, Any]:
    """What a client makes of a stream: the text, the reasoning, the calls, the end of choice 0."""
    told: dict[str, Any] = {
        "content": "",
        "reasoning": "",
        "calls": {},
        "finish": None,
        "usage": None,
    }
    for chunk in chunks:
        if chunk.usage is not None:
            told["usage"] = chunk.usage.model_dump(exclude_none=True)
        for choice in chunk.choices:
            if choice.index != 0:
                continue
            told["content"] += choice.delta.content or ""
            told["reasoning"] += getattr(choice.delta, "reasoning_content", None) or ""
            assert getattr(choice.delta, "refusal", None) is None
            for call in choice.delta.tool_calls or ():
                known = told["calls"].setdefault(call.index, {"id": None, "arguments": ""})
                known["id"] = call.id or known["id"]
                known["arguments"] += (call.function and call.function.arguments) or ""
            told["finish"] = choice.finish_reason or told["finish"]
    return told


def summed(completion: ChatCompletion) -> dict[str, Any]:
    """The same of a whole answer."""
    choice = completion.choices[0]
    assert choice.message.refusal is None
    calls = enumerate(choice.message.tool_calls or ())
    return {
        "content": choice.message.content or "",
        "reasoning": getattr(choice.message, "reasoning_content", None) or "",
        "calls": {n: {"id": c.id, "arguments": c.function.arguments} for n, c in calls},  # type: ignore[union-attr]
        "finish": choice.finish_reason,
        "usage": completion.usage.model_dump(exclude_none=True) if completion.usage else None,
    }


# openai ------------------------------------------------------------------------------------------


async def test_openai_async_asks_twice_and_in_other_words(world: World) -> None:
    """A miss, an exact hit, a hit by meaning: to the SDK all are completions like any other."""
    async with client(world) as sdk:
        answers = [
            await sdk.chat.completions.with_raw_response.create(model=MODEL, messages=asks(text))
            for text in (FRANCE, FRANCE, FRANCE_REWORDED)
        ]
    assert [a.headers["x-cache"] for a in answers] == ["MISS", "HIT", "HIT"]
    assert [a.headers.get("x-cache-tier") for a in answers] == [None, "exact", "semantic"]
    completions = [a.parse() for a in answers]
    assert len({c.choices[0].message.content for c in completions}) == 1
    assert len({c.id for c in completions}) == 3
    assert completions[0].usage == completions[1].usage == completions[2].usage
    assert world.upstream.calls == 1


async def test_openai_sync_asks_twice_and_in_other_words(world: World) -> None:
    """The same with the sync client, whole and streamed, with its own default headers."""

    def work() -> list[str]:
        with sync_client(world) as sdk:
            texts = [
                sdk.chat.completions.create(model=MODEL, messages=asks(text))
                .choices[0]
                .message.content
                for text in (FRANCE, FRANCE, FRANCE_REWORDED)
            ]
            with sdk.chat.completions.create(
                model=MODEL, messages=asks(FRANCE), stream=True
            ) as stream:
                texts.append("".join(c.choices[0].delta.content or "" for c in stream))
        return [text or "" for text in texts]

    texts = await in_thread(work)
    assert len(texts) == 4
    assert len(set(texts)) == 1
    assert world.upstream.calls == 1


@pytest.mark.parametrize("first_streams", [False, True], ids=["whole first", "streamed first"])
@pytest.mark.parametrize("model", [MODEL, "deepseek-reasoner"])
async def test_one_entry_serves_whole_and_streamed_callers(
    world: World, model: str, first_streams: bool
) -> None:
    """Whoever asked first, text, reasoning, finish and usage are the same in both forms, exactly
    and by meaning; and usage is streamed to those who ask for it and nobody else."""
    world.upstream.script = rich
    tell = {"include_usage": True}
    async with client(world) as sdk:
        create = sdk.chat.completions.create

        async def whole(text: str) -> dict[str, Any]:
            return summed(await create(model=model, messages=asks(text)))

        async def streamed(text: str, **more: Any) -> dict[str, Any]:
            stream = await create(model=model, messages=asks(text), stream=True, **more)
            return gathered([chunk async for chunk in stream])

        forms = [whole, streamed]
        first = await (streamed if first_streams else whole)(FRANCE)
        assert first["content"] == "Paris, says call 1, choice 0."
        assert first["reasoning"] == ("France... call 1" if model == "deepseek-reasoner" else "")
        for text in (FRANCE, FRANCE_REWORDED):
            for form in forms:
                again = await form(text)
                assert again | {"usage": None} == first | {"usage": None}
                assert (again["usage"] is None) is (form is streamed)
            assert (await whole(text))["usage"] == USAGE
            assert (await streamed(text, stream_options=tell))["usage"] == USAGE
    assert world.upstream.calls == 1


async def test_usage_in_a_missed_stream_is_the_clients_choice(make_world: WorldMaker) -> None:
    """The proxy asks upstream for usage in any case; only a client that asked sees the chunk."""
    async with make_world(model="none") as world, client(world) as sdk:
        world.upstream.script = rich
        for text, options, seen in (("one", None, False), ("two", {"include_usage": True}, True)):
            more: Any = {"stream_options": options} if options else {}
            stream = await sdk.chat.completions.create(
                model=MODEL, messages=asks(text), stream=True, **more
            )
            chunks = [chunk async for chunk in stream]
            assert (gathered(chunks)["usage"] is not None) is seen
            assert all(chunk.choices for chunk in chunks) is not seen
            assert world.upstream.seen[-1].json["stream_options"] == {"include_usage": True}
        assert (await world.stats())["tokens_spent"] == {"input": 42, "output": 16}


async def test_several_choices_are_matched_exactly_and_come_back_all(world: World) -> None:
    """n=2: both choices from an exact hit, in both forms; never by meaning."""
    world.upstream.script = rich
    async with client(world) as sdk:
        first = await sdk.chat.completions.create(model=MODEL, messages=asks(FRANCE), n=2)
        again = await sdk.chat.completions.create(model=MODEL, messages=asks(FRANCE), n=2)
        assert [c.message.content for c in again.choices] == [
            "Paris, says call 1, choice 0.",
            "Paris, says call 1, choice 1.",
        ]
        assert again.choices == first.choices
        texts = {0: "", 1: ""}
        async for chunk in await sdk.chat.completions.create(
            model=MODEL, messages=asks(FRANCE), n=2, stream=True
        ):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert list(texts.values()) == [c.message.content for c in first.choices]
        assert world.upstream.calls == 1
        other = await sdk.chat.completions.with_raw_response.create(
            model=MODEL, messages=asks(FRANCE_REWORDED), n=2
        )
        assert (other.headers["x-cache"], other.headers["x-cache-reason"]) == ("MISS", "choices")


@pytest.mark.parametrize("first_streams", [False, True], ids=["whole first", "streamed first"])
async def test_log_probabilities_survive(make_world: WorldMaker, first_streams: bool) -> None:
    """`logprobs` are part of the answer, token by token, in both forms and both directions."""
    async with make_world(model="none") as world, client(world) as sdk:
        world.upstream.script = rich
        create = sdk.chat.completions.create

        async def probabilities(stream: bool) -> list[float]:
            if not stream:
                answer = await create(model=MODEL, messages=asks(FRANCE), logprobs=True)
                told = answer.choices[0].logprobs
                assert told
                return [token.logprob for token in told.content or ()]
            found: list[float] = []
            async for chunk in await create(
                model=MODEL, messages=asks(FRANCE), logprobs=True, stream=True
            ):
                for choice in chunk.choices:
                    if choice.logprobs:
                        found += [token.logprob for token in choice.logprobs.content or ()]
            return found

        for stream in (first_streams, False, True):
            assert await probabilities(stream) == [-0.25, -0.5]
        assert world.upstream.calls == 1
        assert (await create(model=MODEL, messages=asks(FRANCE))).choices[0].logprobs is None
        assert world.upstream.calls == 2


async def test_the_stream_helper_reads_a_miss_and_a_hit(world: World) -> None:
    """`client.chat.completions.stream()` checks every event against what it has gathered."""
    world.upstream.script = rich
    async with client(world) as sdk:
        for text in (FRANCE, FRANCE, FRANCE_REWORDED):
            async with sdk.chat.completions.stream(
                model=MODEL, messages=asks(text), stream_options={"include_usage": True}
            ) as stream:
                kinds = {event.type async for event in stream}
                final = await stream.get_final_completion()
            assert {"chunk", "content.delta", "content.done"} <= kinds
            assert final.choices[0].message.content == "Paris, says call 1, choice 0."
            assert final.usage
            assert final.usage.total_tokens == 29
    assert world.upstream.calls == 1


async def test_legacy_completions_work_the_same(world: World) -> None:
    """`client.completions`, whole and streamed, exactly and by meaning."""
    async with client(world) as sdk:
        texts = [
            (await sdk.completions.create(model="gpt-3.5-turbo-instruct", prompt=prompt))
            .choices[0]
            .text
            for prompt in (FRANCE, FRANCE, FRANCE_REWORDED)
        ]
        stream = await sdk.completions.create(
            model="gpt-3.5-turbo-instruct", prompt=FRANCE, stream=True
        )
        texts.append("".join([c.choices[0].text async for c in stream if c.choices]))
    assert texts[0].startswith("answer 1 to")
    assert len(set(texts)) == 1
    assert world.upstream.calls == 1


@pytest.mark.parametrize("kept", [False, True], ids=["not kept", "kept"])
async def test_tool_calls_are_kept_only_on_request(make_world: WorldMaker, kept: bool) -> None:
    """I4: `store_tool_calls` off asks upstream each time; on, the calls come back whole in both
    forms. Requests that declare tools match exactly only."""
    async with make_world(store_tool_calls=kept) as world, client(world) as sdk:
        world.upstream.script = rich
        create = sdk.chat.completions.create

        async def whole(text: str = "Find the main station of Hanoi, please") -> dict[str, Any]:
            return summed(await create(model=MODEL, messages=asks(text), tools=[TOOL]))

        async def streamed() -> dict[str, Any]:
            stream = await create(
                model=MODEL,
                messages=asks("Find the main station of Hanoi, please"),
                tools=[TOOL],
                stream=True,
                stream_options={"include_usage": True},
            )
            return gathered([chunk async for chunk in stream])

        told = [await whole(), await streamed(), await whole(), await streamed()]
        ids = [answer["calls"][0]["id"] for answer in told]
        assert ids == (["call_1"] * 4 if kept else ["call_1", "call_2", "call_3", "call_4"])
        for answer in told:
            assert [c["arguments"] for c in answer["calls"].values()] == ['{"city": "Hà Nội"}'] * 2
            assert (answer["finish"], answer["usage"]) == ("tool_calls", USAGE)
        assert world.upstream.calls == (1 if kept else 4)
        await whole("Find Hanoi's main station, please")
        assert world.upstream.calls == (2 if kept else 5)


async def test_other_endpoints_of_the_sdk_pass_through(make_world: WorldMaker) -> None:
    """Models, moderations, files: the SDK gets upstream's own answer."""
    models = {
        "object": "list",
        "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "x"}],
    }
    async with make_world(model="none") as world, client(world) as sdk:
        world.upstream.script = lambda seen: Reply(parts=(orjson.dumps(models),))
        assert [m.id async for m in sdk.models.list()] == [MODEL]
        assert (world.upstream.seen[-1].method, world.upstream.seen[-1].path) == (
            "GET",
            "/v1/models",
        )
        assert world.upstream.seen[-1].key == "sk-one"

        file = {"id": "f1", "object": "file", "bytes": 3, "created_at": 1, "filename": "a.jsonl"}
        file |= {"purpose": "batch", "status": "uploaded"}
        world.upstream.script = lambda seen: Reply(parts=(orjson.dumps(file),))
        made = await sdk.files.create(file=("a.jsonl", b"{}\n\x00\xff"), purpose="batch")
        assert made.id == "f1"
        assert b"{}\n\x00\xff" in world.upstream.seen[-1].body

        world.upstream.script = lambda seen: Reply(parts=(b"\x00\x01\xff",))
        assert (await sdk.files.content("f1")).content == b"\x00\x01\xff"


async def test_azures_client_finds_its_deployments(make_world: WorldMaker) -> None:
    """`AzureOpenAI` spells paths and keys its own way; the cache serves it all the same."""
    async with scripted_upstream() as upstream:
        root = upstream.base_url.removesuffix("/v1")
        async with (
            make_world(model="none", upstream=root) as world,
            openai.AsyncAzureOpenAI(
                azure_endpoint=world.base.removesuffix("/v1"),
                api_key="azure-one",
                api_version="2024-10-21",
            ) as sdk,
        ):
            texts = [
                (await sdk.chat.completions.create(model="mine", messages=asks(FRANCE)))
                .choices[0]
                .message.content
                for _ in range(2)
            ]
        assert texts[0] == texts[1]
        (seen,) = upstream.seen
        assert seen.path == "/openai/deployments/mine/chat/completions"
        assert seen.query == b"api-version=2024-10-21"
        assert seen.headers["api-key"] == "azure-one"


# Embeddings --------------------------------------------------------------------------------------


def coded(seen: Seen) -> Reply:
    """Vectors as asked: base64 of little-endian floats, or plain numbers."""
    reply = vectors(seen)
    if seen.json.get("encoding_format") != "base64":
        return reply
    document = orjson.loads(reply.parts[0])
    for item in document["data"]:
        packed = struct.pack(f"<{len(item['embedding'])}f", *item["embedding"])
        item["embedding"] = base64.b64encode(packed).decode()
    return Reply(parts=(orjson.dumps(document),))


@pytest.mark.parametrize("form", ["base64", "float"])
async def test_embeddings_come_back_as_they_were(make_world: WorldMaker, form: str) -> None:
    """The SDK's own default is base64; either way a hit decodes to the very same numbers."""
    more: Any = {"encoding_format": "float"} if form == "float" else {}
    async with make_world(model="none") as world, client(world) as sdk:
        world.upstream.script = coded
        model = "text-embedding-3-small"
        first = await sdk.embeddings.create(model=model, input=["a", "bb"], **more)
        again = await sdk.embeddings.create(model=model, input=["bb", "a"], **more)
        mixed = await sdk.embeddings.create(model=model, input=["ccc", "a"], **more)
        assert world.upstream.seen[0].json["encoding_format"] == form
        assert [i.embedding for i in reversed(again.data)] == [i.embedding for i in first.data]
        assert [i.index for i in again.data] == [0, 1]
        assert mixed.data[1].embedding == first.data[0].embedding
        assert mixed.data[0].embedding[2] == 2.0
        assert world.upstream.seen[1].json["input"] == ["ccc"]

        def work() -> list[float]:
            with sync_client(world) as blocking:
                return blocking.embeddings.create(model=model, input="a", **more).data[0].embedding

        assert await in_thread(work) == first.data[0].embedding
        assert world.upstream.calls == 2


# Errors and retries ------------------------------------------------------------------------------


def refusing(status: int, message: str, **headers: str) -> Callable[[Seen], Reply]:
    body = {"error": {"message": message, "type": "x", "param": "model", "code": "y"}}
    named = (
        ("content-type", "application/json"),
        *((k.replace("_", "-"), v) for k, v in headers.items()),
    )
    return lambda seen: Reply(status, (orjson.dumps(body),), named)


ERRORS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_upstreams_errors_are_the_sdks_own(make_world: WorldMaker, stream: bool) -> None:
    """Status, message, code and headers as upstream gave them, so the SDK raises what it would."""
    async with make_world(model="none") as world, client(world, max_retries=0) as sdk:
        for calls, (status, error) in enumerate(ERRORS.items(), 1):
            world.upstream.script = refusing(status, "no such", retry_after="7", x_request_id="r")
            with pytest.raises(error, match="no such") as caught:
                await sdk.chat.completions.create(model=MODEL, messages=asks("x"), stream=stream)
            told = caught.value
            assert (told.status_code, told.code, told.param) == (status, "y", "model")
            assert (told.request_id, told.response.headers["retry-after"]) == ("r", "7")
            assert world.upstream.calls == calls


async def test_the_sdk_retries_what_upstream_says_is_worth_it(make_world: WorldMaker) -> None:
    """A 429 that names a moment is asked again by the SDK; the answer is served and kept."""

    def once(seen: Seen) -> Reply:
        if seen.number == 1:
            return refusing(429, "slow down", retry_after_ms="10")(seen)
        return echo(seen)

    async with make_world(model="none") as world, client(world) as sdk:
        world.upstream.script = once
        first = await sdk.chat.completions.create(model=MODEL, messages=asks("x"))
        again = await sdk.chat.completions.create(model=MODEL, messages=asks("x"))
        assert first.choices == again.choices
        assert world.upstream.calls == 2


async def test_the_sdk_does_not_retry_what_cannot_get_better(make_world: WorldMaker) -> None:
    """A 504 for `only-if-cached` and a 400 of ours are final: one request each, none upstream,
    with the SDK's own default retries."""
    async with make_world(model="none") as world, client(world) as sdk:
        create = sdk.chat.completions.create
        with pytest.raises(openai.InternalServerError, match="only-if-cached") as caught:
            await create(
                model=MODEL, messages=asks("x"), extra_headers={"Cache-Control": "only-if-cached"}
            )
        assert caught.value.status_code == 504
        with pytest.raises(openai.BadRequestError, match="X-Cache-Mode"):
            await create(model=MODEL, messages=asks("x"), extra_headers={"X-Cache-Mode": "maybe"})
        with pytest.raises(openai.InternalServerError):
            await sdk.embeddings.create(
                model="m", input="x", extra_headers={"Cache-Control": "only-if-cached"}
            )
        assert (await world.stats())["requests"] == 3
        assert world.upstream.calls == 0


async def test_an_error_in_mid_stream_is_raised_and_not_kept(make_world: WorldMaker) -> None:
    """I4, I5: what came is passed on, then upstream's error; the next one asks anew."""

    def failing(seen: Seen) -> Reply:
        head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
        piece = head | {
            "choices": [{"index": 0, "delta": {"content": "Par"}, "finish_reason": None}]
        }
        broken = {"error": {"message": "overloaded", "type": "server_error", "code": None}}
        parts = tuple(b"data: " + orjson.dumps(event) + b"\n\n" for event in (piece, broken))
        return Reply(parts=parts, headers=(("content-type", "text/event-stream"),))

    async with make_world(model="none") as world, client(world) as sdk:
        world.upstream.script = failing
        for calls in (1, 2):
            texts = []

            async def read(texts: list[str | None] = texts) -> None:
                async for chunk in await sdk.chat.completions.create(
                    model=MODEL, messages=asks("x"), stream=True
                ):
                    texts.append(chunk.choices[0].delta.content)

            with pytest.raises(openai.APIError, match="overloaded"):
                await read()
            assert texts == ["Par"]
            assert world.upstream.calls == calls


# langchain-openai --------------------------------------------------------------------------------


def chat_model(world: World, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(model=MODEL, base_url=world.base, api_key="sk-one", **options)  # type: ignore[arg-type]


async def test_langchain_invokes_and_streams(world: World) -> None:
    """`invoke`, `ainvoke`, `stream` and `astream` share one entry, exactly and by meaning, and
    LangChain finds its token counts in whole answers."""
    world.upstream.script = rich
    chat = chat_model(world)

    def blocking() -> list[str]:
        texts = [str(chat.invoke(text).content) for text in (FRANCE, FRANCE, FRANCE_REWORDED)]
        return [*texts, "".join(str(piece.content) for piece in chat.stream(FRANCE))]

    texts = await in_thread(blocking)
    message = await chat.ainvoke(FRANCE_REWORDED)
    texts.append(str(message.content))
    texts.append("".join([str(piece.content) async for piece in chat.astream(FRANCE)]))

    assert set(texts) == {"Paris, says call 1, choice 0."}
    assert world.upstream.calls == 1
    assert message.usage_metadata
    assert message.usage_metadata["total_tokens"] == 29
    assert message.response_metadata["finish_reason"] == "stop"


async def test_langchain_streams_usage_when_it_asks(world: World) -> None:
    """With `stream_usage` the sum of a stream's pieces carries the tokens, missed and hit."""
    world.upstream.script = rich
    chat = chat_model(world, stream_usage=True)
    for text in (FRANCE, FRANCE, FRANCE_REWORDED):
        whole = None
        async for piece in chat.astream(text):
            whole = piece if whole is None else whole + piece
        assert whole is not None
        assert whole.content == "Paris, says call 1, choice 0."
        assert whole.usage_metadata
        assert whole.usage_metadata["total_tokens"] == 29
    assert world.upstream.calls == 1


async def test_langchain_tools_work(make_world: WorldMaker) -> None:
    """A bound tool's calls arrive parsed, from upstream and from the cache."""
    async with make_world(model="none", store_tool_calls=True) as world:
        world.upstream.script = rich
        chat = chat_model(world).bind_tools([TOOL])
        for _ in range(2):
            message = await chat.ainvoke("Find the main station of Hanoi, please")
            assert [call["args"] for call in message.tool_calls] == [{"city": "Hà Nội"}] * 2
        assert world.upstream.calls == 1


async def test_langchain_embeds(make_world: WorldMaker) -> None:
    """`embed_query` and `embed_documents`, sync and async: known texts are not asked again."""
    async with make_world(model="none") as world:
        world.upstream.script = coded
        embedder = OpenAIEmbeddings(
            model="text-embedding-3-small",
            base_url=world.base,
            api_key="sk-one",  # type: ignore[arg-type]
            check_embedding_ctx_length=False,  # it would fetch a tokenizer from the network
        )
        documents = await embedder.aembed_documents(["a", "bb"])
        assert await embedder.aembed_query("bb") == documents[1]
        assert await in_thread(lambda: embedder.embed_query("a")) == documents[0]
        more = await in_thread(lambda: embedder.embed_documents(["bb", "ccc"]))
        assert more[0] == documents[1]
        assert world.upstream.seen[-1].json["input"] == ["ccc"]
        assert world.upstream.calls == 2
