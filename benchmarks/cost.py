"""What the cache costs: server CPU of a hit, latency added to a miss. `python -m benchmarks.cost`.

Every figure is a ratio or difference within one run: the sidecar against the same HTTP server that
returns a constant, a semantic hit against the encoder's own forward pass, a miss against upstream
asked directly. CPU seconds are the server process's own, from the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import orjson
import uvicorn
import uvloop

from cache_proxy.serve import bind
from embeddings import load

ANSWER = "Choose 'Forgot password' on the sign-in page and follow the e-mail. " * 4
TEXT = "How do I reset my password?"
PARAPHRASES = (
    "How can I reset my password?",
    "How do I reset the password?",
    "how do i reset my password",
    "How to reset my password?",
)
KEY = b"authorization: Bearer sk-benchmark\r\n"


def completion(text: str) -> bytes:
    """A chat completion with a short answer."""
    return orjson.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1_700_000_000,
            "model": "gpt-4o-mini",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": text},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 15, "completion_tokens": 60, "total_tokens": 75},
        }
    )


async def constant(scope, receive, send):  # type: ignore[no-untyped-def]
    """The same answer to everything: the bare server, and the upstream of the sidecar."""
    while (await receive()).get("more_body"):
        pass
    body = completion(ANSWER)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def serve_constant(port: int) -> None:
    """The bare server, set up as `cache_proxy.serve` sets up its own."""
    listening = bind("port", "127.0.0.1", port)
    config = uvicorn.Config(
        constant,
        http="httptools",
        loop="none",
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )
    uvloop.run(uvicorn.Server(config).serve(sockets=[listening]))


def request(text: str) -> bytes:
    """One HTTP request as the OpenAI client writes it."""
    body = orjson.dumps(
        {
            "messages": [{"role": "user", "content": text}],
            "model": "gpt-4o-mini",
            "temperature": 0.2,
        }
    )
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        b"content-type: application/json\r\nuser-agent: benchmark\r\n" + KEY
    )
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


async def ask(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, message: bytes
) -> tuple[bytes, bytes]:
    """Head and body of one answer with a content-length."""
    writer.write(message)
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


async def load_run(
    port: int, messages: Sequence[bytes], concurrency: int, expect: bytes
) -> list[float]:
    """Ask all messages over `concurrency` connections; each answer's milliseconds."""
    waiting = iter(messages)
    times: list[float] = []

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for message in waiting:
            started = time.perf_counter()
            head, _ = await ask(reader, writer, message)
            times.append((time.perf_counter() - started) * 1_000)
            if expect not in head:
                raise SystemExit(f"expected {expect!r} in the answer's head:\n{head.decode()}")
        writer.close()

    await asyncio.gather(*(one() for _ in range(concurrency)))
    return times


def cpu_seconds(pid: int) -> float:
    """Time on a processor, of all threads so far; to the nanosecond, where ticks are too coarse."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


@contextmanager
def process(command: Sequence[str], port: int) -> Iterator[int]:
    """A server process, ready to answer; its id."""
    # The question is what a hit costs, not whether a busy machine makes it in time.
    patient = {"CACHE_PROXY_CACHE_MS": "5000", "CACHE_PROXY_STORE_MS": "1000"}
    patient["CACHE_PROXY_AUDIT_SHARE"] = "0"
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | patient)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                asyncio.run(load_run(port, [request("ready?")], 1, b"200 OK"))
                break
            except OSError:
                if time.monotonic() > deadline or running.poll() is not None:
                    raise SystemExit("a server did not start") from None
                time.sleep(0.05)
        yield running.pid
    finally:
        running.send_signal(signal.SIGTERM)
        running.wait(30)


def free_port() -> int:
    with bind("port", "127.0.0.1", 0) as listening:
        return int(listening.getsockname()[1])


def per_request(pid: int, run: Callable[[], object], count: int) -> float:
    """Server CPU a request, in microseconds."""
    before = cpu_seconds(pid)
    run()
    return (cpu_seconds(pid) - before) / count * 1e6


def measure(requests: int, rounds: int) -> dict[str, float]:
    """All figures, medians of `rounds` interleaved runs."""
    python, here = sys.executable, ["-m", "benchmarks.cost"]
    bare_port, proxy_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        serve = [python, "-m", "cache_proxy", "serve", "--port", str(proxy_port)]
        serve += ["--admin-port", "0", "--data-dir", folder]
        serve += ["--upstream", f"http://127.0.0.1:{bare_port}/v1"]
        with (
            process([python, *here, "--constant", str(bare_port)], bare_port) as bare,
            process(serve, proxy_port) as proxy,
        ):
            return figures(bare, bare_port, proxy, proxy_port, requests, rounds)


def figures(
    bare: int, bare_port: int, proxy: int, proxy_port: int, requests: int, rounds: int
) -> dict[str, float]:
    same = [request(TEXT)] * requests
    similar = [request(PARAPHRASES[n % len(PARAPHRASES)]) for n in range(requests // 5)]

    def run(
        port: int, messages: Sequence[bytes], expect: bytes, concurrency: int = 8
    ) -> list[float]:
        return asyncio.run(load_run(port, messages, concurrency, expect))

    run(proxy_port, same[:1], b"200 OK")
    for _ in range(50):  # the store writes behind the answer
        if run(proxy_port, [similar[0]], b"200 OK"):
            break
    bare_us, exact_us, semantic_us, encoder_us = [], [], [], []
    for _ in range(rounds):
        bare_us.append(per_request(bare, lambda: run(bare_port, same, b"200 OK"), requests))
        exact_us.append(
            per_request(proxy, lambda: run(proxy_port, same, b"x-cache-tier: exact"), requests)
        )
        semantic_us.append(
            per_request(
                proxy,
                lambda: run(proxy_port, similar, b"x-cache-tier: semantic"),
                len(similar),
            )
        )
        encoder_us.append(encoder_cpu(len(similar)))
    miss, direct, encoder_ms = [], [], []
    encoder = load("all-MiniLM-L6-v2", Path(tempfile.gettempdir()))
    for n in range(requests // 10):
        fresh = request(f"{TEXT} {time.time_ns()} {n}")
        direct += run(bare_port, [fresh], b"200 OK", 1)
        miss += run(proxy_port, [fresh], b"x-cache: MISS", 1)
        started = time.perf_counter()
        encoder.encode([f"{TEXT} {time.time_ns()} {n}"])
        encoder_ms.append((time.perf_counter() - started) * 1_000)
    median = statistics.median
    return {
        "bare_us": median(bare_us),
        "exact_us": median(exact_us),
        "semantic_us": median(semantic_us),
        "encoder_us": median(encoder_us),
        "direct_ms": median(direct),
        "miss_ms": median(miss),
        "encoder_ms": median(encoder_ms),
    }


def encoder_cpu(count: int) -> float:
    """CPU microseconds of one forward pass over the same texts, tokenizer included."""
    encoder = load("all-MiniLM-L6-v2", Path(tempfile.gettempdir()))
    encoder.encode(PARAPHRASES)
    started = time.process_time()
    for n in range(count):
        encoder.encode([PARAPHRASES[n % len(PARAPHRASES)]])
    return (time.process_time() - started) / count * 1e6


def main() -> None:
    """Print the figures beside their targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=4_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--constant", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.constant:
        serve_constant(arguments.constant)
        return
    found = measure(arguments.requests, arguments.rounds)
    semantic_bound = 1.5 * found["encoder_us"] + found["exact_us"]
    added = found["miss_ms"] - found["direct_ms"] - found["encoder_ms"]
    print(f"bare server          {found['bare_us']:8.0f} us CPU a request, concurrency 8")
    print(f"exact hit            {found['exact_us']:8.0f} us CPU")
    print(f"  against the bare server {found['exact_us'] / found['bare_us']:.2f}x (target 3x)")
    print(f"encoder alone        {found['encoder_us']:8.0f} us CPU a short text")
    print(f"semantic hit         {found['semantic_us']:8.0f} us CPU")
    print(
        f"  against 1.5 encoder passes + an exact hit {found['semantic_us'] / semantic_bound:.2f}x"
    )
    print(f"upstream directly    {found['direct_ms']:8.2f} ms")
    print(f"a miss               {found['miss_ms']:8.2f} ms, encoder {found['encoder_ms']:.2f} ms")
    print(f"  added beyond the encoder {added:.2f} ms (target 3 ms)")


if __name__ == "__main__":
    main()
