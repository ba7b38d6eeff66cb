"""`cache-proxy demo`: the real sidecar in front of a small scripted upstream, asked real questions.

Everything but the upstream's wit is real: model, index, store, sockets. Each answer names the
question it was written for, so a wrong one would show.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import uvicorn
import uvloop
from rich import box
from rich.console import Console
from rich.table import Table

from . import settings as configuration
from .opening import embedded_store
from .serve import bind, quiet, running
from .stats import collect
from .stats_table import render
from .upstream.client import Response, Upstream

__all__ = ["run"]

_MODEL = "gpt-4.1"
_THINKING_SECONDS = 0.4  # what a quick model takes for a short answer

_ANSWERS = {
    "france": "Paris is the capital of France.",
    "spain": "Madrid is the capital of Spain.",
    "dark on": "Open Settings, choose Display, and switch dark mode on.",
    "dark off": "Open Settings, choose Display, and switch dark mode off.",
    "48213": "Order 48213 left the warehouse on Monday.",
    "48231": "Order 48231 is waiting for payment.",
    "password": "Choose 'Forgot password' on the sign-in page and follow the e-mail.",
    "weather": "Sunny, 31 degrees.",
    "mật khẩu": "Chọn 'Quên mật khẩu' ở trang đăng nhập và làm theo e-mail.",
}


@dataclass(frozen=True, slots=True)
class _Question:
    shows: str
    text: str
    topic: str
    key: str = "sk-demo-app-one"
    stream: bool = False


_QUESTIONS = (
    _Question("first of its kind", "What is the capital of France?", "france"),
    _Question("exact repeat", "What is the capital of France?", "france"),
    _Question("paraphrase", "What's the capital city of France?", "france"),
    _Question("trap: other country", "What is the capital of Spain?", "spain"),
    _Question("repeat, streamed", "What is the capital of France?", "france", stream=True),
    _Question("first of its kind", "How do I turn on dark mode?", "dark on"),
    _Question("paraphrase", "How can I turn on dark mode?", "dark on"),
    _Question("trap: the opposite", "How do I turn off dark mode?", "dark off"),
    _Question("first of its kind", "Where is my order 48213?", "48213"),
    _Question("trap: other number", "Where is my order 48231?", "48231"),
    _Question("first of its kind", "How do I reset my password?", "password"),
    _Question("paraphrase", "How can I reset my password?", "password"),
    _Question("goes stale", "What is the weather in Hanoi today?", "weather"),
    _Question("not the model's language", "Làm thế nào để đặt lại mật khẩu?", "mật khẩu"),
    _Question("exact repeat", "Làm thế nào để đặt lại mật khẩu?", "mật khẩu"),
    _Question("another key", "What is the capital of France?", "france", key="sk-demo-app-two"),
)
_BY_TEXT = {question.text: _ANSWERS[question.topic] for question in _QUESTIONS}


def run(console: Console, keep: Path | None) -> None:
    """Ask, show what became of each question, then the `cache-stats` report."""
    quiet("warning")
    with tempfile.TemporaryDirectory(prefix="cache-proxy-demo-") as fresh:
        _show(console, keep or Path(fresh))
    if keep is not None:
        console.print(f"Kept: cache-stats --data-dir {keep}")


def _show(console: Console, data_dir: Path) -> None:
    upstream_socket = bind("upstream", "127.0.0.1", 0)
    settings = configuration.load(
        upstream=f"http://127.0.0.1:{upstream_socket.getsockname()[1]}/v1",
        data_dir=data_dir,
        port=0,
        admin_port=0,
        audit_share=0,  # a show of what is served, with every call to upstream accounted for
    )
    with upstream_socket, embedded_store(settings) as (url, valkey):

        async def main() -> None:
            async with AsyncExitStack() as stack:
                scripted = uvicorn.Server(
                    uvicorn.Config(_scripted, loop="none", lifespan="off", log_config=None)
                )
                answering = asyncio.create_task(scripted.serve(sockets=[upstream_socket]))
                proxy_socket = bind("port", "127.0.0.1", 0)
                sidecar, _ = await stack.enter_async_context(
                    running(
                        settings,
                        url,
                        proxy_socket=proxy_socket,
                        admin_socket=None,
                        valkey=valkey,
                    )
                )
                base = f"http://127.0.0.1:{proxy_socket.getsockname()[1]}/v1"
                console.print(
                    f"cache-proxy listens on {base} and forwards to {settings.upstream}\n"
                )
                console.print(await _ask_all(base))
                await sidecar.ledger.flush(sidecar.memory.store)
                now = time.time()
                report = await collect(sidecar.memory.store, now - 3_600, now)
                console.print()
                console.print(render(report))
                scripted.should_exit = True
                await answering

        uvloop.run(main())


async def _ask_all(base: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, header_style="bold")
    table.add_column("question, and what it shows")
    for column in ("outcome", "tier or reason", "cosine", "answer"):
        table.add_column(column, no_wrap=True)
    table.add_column("ms", justify="right", no_wrap=True)
    client = Upstream(max_connections=4, connect_seconds=5)
    try:
        for question in _QUESTIONS:
            cells = await _ask(client, base, question)
            table.add_row(f"{question.text}\n[dim]  {question.shows}[/]", *cells)
    finally:
        await client.close()
    return table


async def _ask(client: Upstream, base: str, question: _Question) -> tuple[str, ...]:
    """Outcome, tier or reason, similarity, whether the answer is the right one, milliseconds."""
    body = {
        "model": _MODEL,
        "messages": [{"role": "user", "content": question.text}],
        "stream": question.stream,
    }
    headers = [
        (b"content-type", b"application/json"),
        (b"authorization", f"Bearer {question.key}".encode()),
    ]
    started = time.perf_counter()
    response = await client.send(
        "POST", f"{base}/chat/completions", headers, orjson.dumps(body), read_seconds=30
    )
    text = await _text(response, stream=question.stream)
    milliseconds = (time.perf_counter() - started) * 1_000
    told = {name.decode(): value.decode() for name, value in response.headers}
    outcome = told.get("x-cache", "?")
    colour = {"HIT": "green", "MISS": "yellow"}.get(outcome, "cyan")
    return (
        f"[{colour}]{outcome}[/]",
        told.get("x-cache-tier") or told.get("x-cache-veto") or told.get("x-cache-reason", ""),
        told.get("x-cache-similarity", ""),
        "right" if text == _ANSWERS[question.topic] else "[red]WRONG[/]",
        f"{milliseconds:.1f}",
    )


async def _text(response: Response, *, stream: bool) -> str:
    body = b"".join([chunk async for chunk in response.chunks()])
    await response.close()
    if not stream:
        return str(orjson.loads(body)["choices"][0]["message"]["content"])
    chunks = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
    deltas = [piece["delta"] for chunk in chunks for piece in orjson.loads(chunk)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


async def _scripted(
    scope: MutableMapping[str, Any],
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
    send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
) -> None:
    """A chat endpoint that knows its dozen answers."""
    body = b""
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    asked = orjson.loads(body)
    text = asked["messages"][-1]["content"]
    answer = _BY_TEXT[text]
    await asyncio.sleep(_THINKING_SECONDS)
    completion = {
        "id": "chatcmpl-demo",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": asked["model"],
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer},
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": len(text) // 4 + 8,
            "completion_tokens": len(answer) // 4 + 1,
            "total_tokens": len(text) // 4 + len(answer) // 4 + 9,
        },
    }
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(completion)})
