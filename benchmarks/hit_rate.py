"""What a threshold is worth: hit rate, wrong hits and savings of a stream of prompts.

    python -m benchmarks.hit_rate [--stream FILE] [--limit N] [--thresholds 0.8 0.92] [--no-guards]

The stream is a JSONL file of `{"text", "answer_id"}`, or a CSV of text and intent such as
Banking77's `train.csv`: two prompts may share an answer when they have the same id. Every prompt
goes over HTTP through the real sidecar (model, index, Valkey) to an upstream that answers with the
prompt's id, one after the other, so that a hit that serves another id is a wrong hit. Each
threshold gets a sidecar and a store of its own. Money is priced as gpt-4o-mini, each answer as
ANSWER_TOKENS tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import csv
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson
import uvicorn

from cache_proxy import settings as configuration
from cache_proxy import stats
from cache_proxy.certify import interval
from cache_proxy.guards import GUARDS
from cache_proxy.opening import embedded_store
from cache_proxy.serve import bind, quiet, running
from cache_proxy.upstream.client import Upstream

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
OWN_STREAM = HERE / "streams" / "support.jsonl"
BANKING = HERE.parent.parent / "shared" / "data" / "banking77" / "train.csv"
THRESHOLDS = (0.75, 0.80, 0.85, 0.90, 0.92, 0.95, 0.98)
MODEL = "gpt-4o-mini"
ANSWER_TOKENS = 150
SEED = 77


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt of a stream, and the answer that is right for it."""

    text: str
    answer_id: str


@dataclass(frozen=True, slots=True)
class Row:
    """What became of the stream at one threshold. Money and tokens are `cache-stats`' own."""

    threshold: float
    requests: int
    exact: int
    semantic: int
    wrong: int  # hits that served another id
    bypasses: int
    vetoes: int
    tokens_saved: int
    usd_saved: float
    usd_spent: float
    seconds: float

    @property
    def hits(self) -> int:
        return self.exact + self.semantic

    @property
    def hit_rate(self) -> float:
        return self.hits / self.requests

    @property
    def wrong_share(self) -> float:
        """Of the hits."""
        return self.wrong / self.hits if self.hits else 0.0

    @property
    def wrong_interval(self) -> tuple[float, float]:
        """Exact 95 % interval of the wrong share; everything when nothing hit."""
        found = interval(self.wrong, self.hits)
        return found.low, found.high

    @property
    def bill_saved(self) -> float:
        """Share of the bill without a cache."""
        whole = self.usd_saved + self.usd_spent
        return self.usd_saved / whole if whole else 0.0


def default_stream() -> Path:
    """Banking77 where it lies beside the project, else the stream in this folder."""
    return BANKING if BANKING.exists() else OWN_STREAM


def read_stream(path: Path, limit: int | None = None) -> list[Line]:
    """The first `limit` lines; a CSV, which comes sorted by intent, is shuffled first (seeded)."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            lines = [Line(row[0], row[1]) for row in csv.reader(file)][1:]
        random.Random(SEED).shuffle(lines)
    else:
        rows = map(json.loads, path.read_text("utf-8").splitlines())
        lines = [Line(row["text"], row["answer_id"]) for row in rows]
    lines = lines[:limit]
    answers: dict[str, str] = {}
    for line in lines:
        if answers.setdefault(line.text, line.answer_id) != line.answer_id:
            raise ValueError(f"{path.name} wants two answers to {line.text!r}")
    if not lines:
        raise ValueError(f"{path.name} holds no prompts")
    return lines


async def measure(
    lines: Sequence[Line],
    thresholds: Sequence[float] = THRESHOLDS,
    *,
    guards: bool = True,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Replay the stream once per threshold. Call it from the main thread's event loop."""
    quiet("warning")
    rows = []
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(_upstream(lines))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hit-rate-")))
        basis = configuration.load(upstream=upstream, data_dir=folder, redis_url="")
        url, _ = stack.enter_context(embedded_store(basis))
        client = Upstream(max_connections=4, connect_seconds=5)
        stack.push_async_callback(client.close)
        for place, threshold in enumerate(thresholds, 1):
            progress(f"threshold {threshold:.2f} ({place} of {len(thresholds)})")
            settings = configuration.load(
                upstream=upstream,
                data_dir=folder,
                redis_url=url,
                key_prefix=f"hit-rate-{place}",
                threshold=threshold,
                guards_off=() if guards else tuple(GUARDS),
                # This asks what is served, not how fast a busy machine is.
                cache_ms=5_000,
                audit_share=0,  # audits would move the threshold that is being measured
                store_ms=1_000,
            )
            rows.append(await _replay(client, settings, url, lines))
    return rows


async def _replay(
    client: Upstream, settings: configuration.Settings, url: str, lines: Sequence[Line]
) -> Row:
    wrong = 0
    began = time.time()
    with bind("port", "127.0.0.1", 0) as listening:
        async with running(settings, url, proxy_socket=listening, admin_socket=None) as (built, _):
            base = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            started = time.perf_counter()
            for line in lines:
                outcome, answer_id = await _ask(client, base, line.text)
                wrong += outcome == "HIT" and answer_id != line.answer_id
            seconds = time.perf_counter() - started
            await built.ledger.flush(built.memory.store)
            told = stats.as_json(await stats.collect(built.memory.store, began, time.time()))
    return Row(
        threshold=settings.threshold or 0.0,
        requests=told["requests"],
        exact=told["hits"]["exact"],
        semantic=told["hits"]["semantic"],
        wrong=wrong,
        bypasses=sum(told["bypasses"].values()),
        vetoes=sum(told["vetoes"].values()),
        tokens_saved=sum(told["tokens_saved"].values()),
        usd_saved=told["usd_saved"] or 0.0,
        usd_spent=told["usd_spent"] or 0.0,
        seconds=seconds,
    )


async def _ask(client: Upstream, base: str, text: str) -> tuple[str, str]:
    """`X-Cache` and the id in the answer."""
    body = orjson.dumps({"model": MODEL, "messages": [{"role": "user", "content": text}]})
    headers = [(b"content-type", b"application/json"), (b"authorization", b"Bearer sk-benchmark")]
    response = await client.send("POST", f"{base}/chat/completions", headers, body, read_seconds=30)
    whole = b"".join([chunk async for chunk in response.chunks()])
    await response.close()
    told = dict(response.headers)
    answered = orjson.loads(whole)["choices"][0]["message"]["content"]
    return told[b"x-cache"].decode(), answered


@asynccontextmanager
async def _upstream(lines: Sequence[Line]) -> AsyncIterator[str]:
    """The base URL of a chat endpoint that answers each prompt with its id."""
    answers = {line.text: line.answer_id for line in lines}

    async def answer(
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = bool(message.get("more_body"))
        text = orjson.loads(body)["messages"][-1]["content"]
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": _completion(text, answers[text])})

    with bind("upstream", "127.0.0.1", 0) as listening:
        server = uvicorn.Server(
            uvicorn.Config(answer, loop="none", lifespan="off", log_config=None, access_log=False)
        )
        task = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            await task


def _completion(text: str, answer_id: str) -> bytes:
    message = {"role": "assistant", "content": answer_id}
    tokens = {"prompt_tokens": 8 + len(text.encode()) // 4, "completion_tokens": ANSWER_TOKENS}
    return orjson.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": MODEL,
            "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
            "usage": tokens | {"total_tokens": sum(tokens.values())},
        }
    )


def table(rows: Sequence[Row]) -> str:
    """The rows as text, a line a threshold."""
    lines = [
        "threshold  requests  hit rate   exact  semantic  wrong of hits (95 %)     "
        "vetoed  tokens saved  USD saved  of bill  seconds"
    ]
    for row in rows:
        low, high = row.wrong_interval
        wrong = f"{row.wrong_share:.1%} ({low:.1%} to {high:.1%})"
        lines.append(
            f"{row.threshold:>9.2f}  {row.requests:>8,}  {row.hit_rate:>8.1%}  "
            f"{row.exact / row.requests:>6.1%}  {row.semantic / row.requests:>8.1%}  {wrong:<23}  "
            f"{row.vetoes:>6,}  {row.tokens_saved:>12,}  {row.usd_saved:>9.4f}  "
            f"{row.bill_saved:>7.1%}  {row.seconds:>7.1f}"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row]) -> Figure:
    """Hit rate, wrong share and savings by threshold."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    at = [row.threshold for row in rows]
    shares = {
        "hit rate": [row.hit_rate for row in rows],
        "share of the bill saved": [row.bill_saved for row in rows],
        "wrong share of the hits": [row.wrong_share for row in rows],
    }
    for name, values in shares.items():
        axes.plot(at, [100 * value for value in values], marker="o", label=name)
    bounds = [row.wrong_interval for row in rows]
    axes.fill_between(
        at,
        [100 * low for low, _ in bounds],
        [100 * high for _, high in bounds],
        alpha=0.15,
        color="C2",
        label="its 95 % interval",
    )
    axes.set(xlabel="threshold (cosine)", ylabel="per cent", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stream", type=Path, default=default_stream())
    parser.add_argument("--limit", type=int, default=1_000)
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--no-guards", action="store_true", help="cosine alone decides")
    given = parser.parse_args()
    lines = read_stream(given.stream, given.limit)
    print(f"{len(lines):,} prompts of {given.stream.parent.name}/{given.stream.name}")
    with contextlib.suppress(KeyboardInterrupt):
        rows = asyncio.run(
            measure(
                lines,
                given.thresholds,
                guards=not given.no_guards,
                progress=lambda said: print(said, file=sys.stderr, flush=True),
            )
        )
        print(table(rows))


if __name__ == "__main__":
    main()
