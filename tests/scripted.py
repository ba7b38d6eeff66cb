"""A scripted upstream: a real HTTP server that answers as told and writes down what it saw.

Each answer carries a token of its own, so that a replay, a splice or somebody else's answer shows
as a plain comparison of strings.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import uvicorn

from cache_proxy.serve import bind

Script = Callable[["Seen"], "Reply | Awaitable[Reply]"]


@dataclass
class Seen:
    """One request as upstream got it."""

    method: str
    path: str
    query: bytes
    headers: dict[str, str]
    body: bytes
    number: int
    answered: str = ""  # the token in the answer
    usage: dict[str, int] = field(default_factory=dict)
    aborted_at: float | None = None  # the caller hung up before the answer was whole
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def json(self) -> dict[str, Any]:
        return orjson.loads(self.body)

    @property
    def text(self) -> str:
        """The last message's text, or the prompt."""
        if "messages" not in self.json:
            return str(self.json.get("prompt", self.json.get("input")))
        content = self.json["messages"][-1]["content"]
        return content if isinstance(content, str) else content[-1]["text"]

    @property
    def key(self) -> str:
        return self.headers.get("authorization", "").removeprefix("Bearer ")


@dataclass
class Reply:
    """What to answer: `parts` are sent one by one, `pause` seconds apart; `cut` drops the line."""

    status: int = 200
    parts: tuple[bytes, ...] = ()
    headers: tuple[tuple[str, str], ...] = (("content-type", "application/json"),)
    delay: float = 0.0
    pause: float = 0.0
    cut: bool = False


def completion(text: str, seen: Seen, **changes: Any) -> dict[str, Any]:
    """A chat completion as OpenAI writes one."""
    usage = {"prompt_tokens": 7 + len(seen.text) // 4, "completion_tokens": 3 + len(text) // 4}
    usage["total_tokens"] = sum(usage.values())
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None, "annotations": []},
        "logprobs": None,
        "finish_reason": "stop",
    }
    return {
        "id": f"chatcmpl-up{seen.number}",
        "object": "chat.completion",
        "created": 1_700_000_000 + seen.number,
        "model": seen.json.get("model", "") + "-2024-07-18",
        "choices": [choice],
        "usage": usage,
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    } | changes


def whole(text: str, seen: Seen, **changes: Any) -> Reply:
    """The completion as one JSON body."""
    body = completion(text, seen, **changes)
    seen.usage = body.get("usage") or {}
    return Reply(parts=(orjson.dumps(body),))


def streamed(text: str, seen: Seen, *, finish: str = "stop", done: bool = True) -> Reply:
    """The completion as server-sent events, a word an event."""
    full = completion(text, seen)
    base = {k: full[k] for k in ("id", "created", "model", "system_fingerprint")}
    base["object"] = "chat.completion.chunk"
    asked = (seen.json.get("stream_options") or {}).get("include_usage", False)
    tail = {"usage": None} if asked else {}

    def event(delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return b"data: " + orjson.dumps(base | {"choices": [choice]} | tail) + b"\n\n"

    words = [word + " " for word in text.split(" ")]
    words[-1] = words[-1][:-1]
    parts = [event({"role": "assistant", "content": ""})]
    parts += [event({"content": word}) for word in words]
    parts.append(event({}, finish))
    seen.usage = full["usage"]
    if asked:
        usage = base | {"choices": [], "usage": full["usage"]}
        parts.append(b"data: " + orjson.dumps(usage) + b"\n\n")
    if done:
        parts.append(b"data: [DONE]\n\n")
    return Reply(parts=tuple(parts), headers=(("content-type", "text/event-stream"),))


def echo(seen: Seen) -> Reply:
    """The default script: names the caller's key, the prompt and a serial number."""
    if seen.method == "POST" and seen.path.endswith("/embeddings"):
        return vectors(seen)
    if seen.method != "POST" or not seen.path.endswith("/completions"):
        return Reply(parts=(orjson.dumps({"path": seen.path, "serial": seen.number}),))
    seen.answered = f"answer {seen.number} to <{seen.text}> for {seen.key}"
    if not seen.path.endswith("/chat/completions"):
        return legacy(seen.answered, seen)
    if seen.json.get("stream"):
        return streamed(seen.answered, seen)
    return whole(seen.answered, seen)


def legacy(text: str, seen: Seen) -> Reply:
    """A legacy completion, whole or streamed."""
    usage = {"prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14}
    seen.usage = usage
    base = {"id": f"cmpl-up{seen.number}", "object": "text_completion", "created": 1_700_000_000}
    base |= {"model": seen.json["model"]}
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "stop"}
    if not seen.json.get("stream"):
        return Reply(parts=(orjson.dumps(base | {"choices": [choice], "usage": usage}),))
    parts = [orjson.dumps(base | {"choices": [choice | {"finish_reason": None}]})]
    parts.append(orjson.dumps(base | {"choices": [choice | {"text": ""}]}))
    if (seen.json.get("stream_options") or {}).get("include_usage"):
        parts.append(orjson.dumps(base | {"choices": [], "usage": usage}))
    events = tuple(b"data: " + part + b"\n\n" for part in (*parts, b"[DONE]"))
    return Reply(parts=events, headers=(("content-type", "text/event-stream"),))


def vectors(seen: Seen) -> Reply:
    """One small vector an input; the input's length is in it."""
    given = seen.json["input"]
    inputs = given if isinstance(given, list) and not isinstance(given[0], int) else [given]
    data = [
        {"object": "embedding", "index": n, "embedding": [len(str(item)) / 100, 0.5, seen.number]}
        for n, item in enumerate(inputs)
    ]
    tokens = sum(len(str(item)) for item in inputs)
    seen.usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    body = {"object": "list", "data": data, "model": seen.json["model"], "usage": seen.usage}
    return Reply(parts=(orjson.dumps(body),))


class ScriptedUpstream:
    """Answers by `script`, keeps every request in `seen`."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.script: Script = echo
        self.port = 0
        self.server: uvicorn.Server | None = None
        self._numbers = itertools.count(1)

    def stop(self) -> None:
        """Begin to close; may be called before its time, and again."""
        if self.server is not None:
            self.server.should_exit = True

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def calls(self) -> int:
        return len(self.seen)

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
        path = scope["raw_path"].decode("latin-1")
        seen = Seen(
            scope["method"], path, scope["query_string"], headers, body, next(self._numbers)
        )
        self.seen.append(seen)
        answering = asyncio.create_task(self._answer(seen, send))
        leaving = asyncio.create_task(_left(receive))
        await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not answering.done():
            seen.aborted_at = time.monotonic()
            answering.cancel()
        leaving.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)
        seen.ended.set()

    async def _answer(
        self, seen: Seen, send: Callable[[MutableMapping[str, Any]], Awaitable[None]]
    ) -> None:
        result = self.script(seen)
        reply = result if isinstance(result, Reply) else await result
        if reply.delay:
            await asyncio.sleep(reply.delay)
        headers = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in reply.headers]
        if len(reply.parts) == 1 and not reply.cut:
            headers.append((b"content-length", b"%d" % len(reply.parts[0])))
        await send({"type": "http.response.start", "status": reply.status, "headers": headers})
        for part in reply.parts:
            await send({"type": "http.response.body", "body": part, "more_body": True})
            if reply.pause:
                await asyncio.sleep(reply.pause)
        if not reply.cut:  # a callable that returns early makes the server drop the line
            await send({"type": "http.response.body", "body": b""})


async def _left(receive: Callable[[], Awaitable[MutableMapping[str, Any]]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@asynccontextmanager
async def scripted_upstream() -> AsyncIterator[ScriptedUpstream]:
    """A scripted upstream on a free loopback port."""
    upstream = ScriptedUpstream()
    listening = bind("upstream", "127.0.0.1", 0)
    upstream.port = listening.getsockname()[1]
    server = uvicorn.Server(
        uvicorn.Config(
            upstream, loop="none", lifespan="off", log_config=None, timeout_graceful_shutdown=1
        )
    )
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    upstream.server = server
    with listening:
        task = asyncio.create_task(server.serve(sockets=[listening]))
        while not server.started:  # noqa: ASYNC110  # it tells by a flag alone
            await asyncio.sleep(0.005)
        try:
            yield upstream
        finally:
            upstream.stop()
            await task
