"""Tokens: upstream is always asked for its own count; before it tells, we count ourselves.

By the model's own vocabulary where that is public, by bytes where there is no tokenizer at all.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import orjson
import pytest

from cache_proxy import tokens
from tests.conftest import World, WorldMaker
from tests.scripted import Reply, Seen, legacy

TALK = {"role": "user", "content": "hello world"}


@pytest.mark.parametrize(
    ("text", "model", "expected"),
    [
        # As OpenAI's own tokenizer counts them.
        ("hello world", "gpt-4o", 2),
        ("hello world", "gpt-4", 2),
        ("お誕生日おめでとう", "gpt-4", 9),
        ("お誕生日おめでとう", "gpt-4o-mini", 8),
        ("お誕生日おめでとう", "gpt-4.1-nano", 8),
        ("お誕生日おめでとう", "ft:gpt-3.5-turbo:org::id", 9),
        ("お誕生日おめでとう", "openai/gpt-5.1", 8),
        ("", "gpt-4o", 0),
    ],
)
def test_openai_models_count_as_their_own_tokenizer_does(
    text: str, model: str, expected: int
) -> None:
    """The vocabulary is that of the model, whoever it is named by and however it was tuned."""
    assert tokens.count(text, model) == expected


def test_families_have_vocabularies_of_their_own() -> None:
    """Qwen and Llama are not counted as if OpenAI had made them; who publishes none is."""
    text = "你好，世界，今天天气很好"
    models = ("qwen3-max", "meta-llama/Llama-3.1-8B-Instruct", "gpt-4o")
    assert len({tokens.count(text, model) for model in models}) == 3
    assert tokens.count(text, "claude-sonnet-4-5") == tokens.count(text, "gpt-4o")


def test_special_tokens_in_a_text_are_text() -> None:
    """Whoever writes the marker that ends a text has written words, and breaks nothing."""
    assert tokens.count("<|endoftext|>", "gpt-4o") > 1
    assert tokens.count("<|im_start|>", "qwen3-max") > 1


def test_a_very_long_text_is_told_by_its_bytes() -> None:
    """UTF-8 bytes / 4.5, rounded up: nobody waits while megabytes are cut into pieces."""
    assert tokens.count("ế" * 1_000_001, "gpt-4o") == -(-3 * 1_000_001 * 2 // 9)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (TALK, 3 + 1 + 2),
        (TALK | {"name": "Bob"}, 3 + 1 + 2 + 1 + 1),
        ({"role": "user", "content": [{"type": "text", "text": "hello world"}]}, 3 + 1 + 2),
        ({"role": "assistant", "content": None}, 3 + 1),
        (
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": "https://x", "detail": "low"}},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64," * 999}},
                    {"type": "file", "file": {"file_id": "f"}},
                ],
            },
            3 + 1 + 85 + 1_445 + 1_445,
        ),
        (  # ten seconds of speech at 16 kB a second
            {
                "role": "user",
                "content": [{"type": "input_audio", "input_audio": {"data": "A" * 213_300}}],
            },
            3 + 1 + 100,
        ),
    ],
)
def test_what_frames_a_message_counts_and_what_is_no_text_has_a_price(
    message: dict[str, Any], expected: int
) -> None:
    """Three tokens a message, one for a name; pictures, sound and files by fixed rates."""
    assert tokens.of_message(message, "gpt-4o") == expected


def test_tool_calls_and_unknown_fields_are_not_free() -> None:
    """The longer a call's arguments, the more they count."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    short = {"role": "assistant", "content": None, "tool_calls": [call]}
    spoken = {"role": "assistant", "content": None, "reasoning_content": "hello world"}
    bare = tokens.of_message({"role": "assistant", "content": None}, "gpt-4o")
    assert tokens.of_message(short, "gpt-4o") > bare
    assert tokens.of_message(spoken, "gpt-4o") == bare + 2


def run(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=60).stdout


def test_without_the_tokenizer_bytes_are_counted() -> None:
    """A plain install counts too: 4.5 bytes a token, rounded up, never none for some text."""
    out = run(
        "import sys; sys.modules['quicktok'] = None\n"
        "from cache_proxy import tokens; tokens.warm()\n"
        "print([tokens.count(text, 'gpt-4o') for text in ('', 'a', 'a' * 9, 'a' * 10, 'ế' * 3)])"
    )
    assert out.strip() == "[0, 1, 2, 3, 2]"


def test_counting_needs_no_network() -> None:
    """I10: every vocabulary comes with its package; no socket is even opened."""
    out = run(
        "import sys\n"
        "def watch(event, args):\n"
        "    assert not event.startswith('socket.'), event\n"
        "sys.addaudithook(watch)\n"
        "from cache_proxy import tokens; tokens.warm()\n"
        "print(tokens.count('hello world', 'qwen3-max'))"
    )
    assert out.strip() == "2"


# Upstream's own count, live ----------------------------------------------------------------------


async def complete(world: World, prompt: str, **fields: Any) -> list[dict[str, Any]]:
    """The chunks of a streamed legacy completion, as the client gets them."""
    body = {"model": "m", "prompt": prompt, "stream": True, **fields}
    headers = {"content-type": "application/json", "authorization": "Bearer sk-one"}
    told = await world.send("POST", "/v1/completions", orjson.dumps(body), headers)
    assert told.status == 200
    events = [event.removeprefix(b"data: ") for event in told.body.split(b"\n\n") if event]
    assert events.pop() == b"[DONE]"
    return [orjson.loads(event) for event in events]


ASK = {"stream_options": {"include_usage": True}}


@pytest.mark.live
async def test_a_legacy_stream_is_measured_too_and_its_client_sees_what_it_asked_for(
    make_world: WorldMaker,
) -> None:
    """The usage chunk is always asked for and counted; on goes it to who asked, hit or miss."""
    async with make_world(model="none") as world:
        plain = [await complete(world, "Once"), await complete(world, "Once")]
        asked = [await complete(world, "Twice", **ASK), await complete(world, "Twice", **ASK)]
        both = [await complete(world, "Once", **ASK), await complete(world, "Twice")]
        assert world.upstream.calls == 2
        assert all(
            seen.json["stream_options"] == ASK["stream_options"] for seen in world.upstream.seen
        )
        usage = world.upstream.seen[0].usage
        for chunks in (*plain, both[1]):
            assert not any(chunk.get("usage") for chunk in chunks)
            assert all(chunk["choices"] for chunk in chunks)
        for chunks in (*asked, both[0]):
            assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], usage)
        stats = await world.stats()
        spent = {"input": 2 * usage["prompt_tokens"], "output": 2 * usage["completion_tokens"]}
        assert stats["tokens_spent"] == spent
        assert stats["tokens_saved"] == {name: 2 * tokens for name, tokens in spent.items()}


@pytest.mark.live
async def test_a_legacy_provider_that_refuses_is_asked_without(make_world: WorldMaker) -> None:
    """Once more without the field that was added here, and from then on never with it."""

    def strict(seen: Seen) -> Reply:
        if "stream_options" in seen.json:
            return Reply(400, parts=(b'{"error":{"message":"unknown field stream_options"}}',))
        return legacy("and so on", seen)

    async with make_world(model="none") as world:
        world.upstream.script = strict
        for prompt in ("Once", "Twice"):
            chunks = await complete(world, prompt)
            assert chunks[0]["choices"][0]["text"] == "and so on"
        sent = ["stream_options" in seen.json for seen in world.upstream.seen]
        assert sent == [True, False, False]


@pytest.mark.live
async def test_a_request_that_is_passed_by_is_measured_too(make_world: WorldMaker) -> None:
    """A bypass costs money as well: its stream is asked for usage, which its client never sees."""
    async with make_world(model="none") as world:
        told = await world.ask("hi", stream=True, headers={"x-cache-mode": "off"})
        assert (told.kind, b'"usage":{' in told.body) == ("BYPASS", False)
        usage = world.upstream.seen[0].usage
        assert (await world.stats())["tokens_spent"]["output"] == usage["completion_tokens"]
