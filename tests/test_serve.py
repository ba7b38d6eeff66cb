"""What the commands promise: one sentence for what is wrong, a clean end, and no secret told."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from pathlib import Path

import orjson
import pytest
import structlog
from redis import Redis
from typer.testing import CliRunner

from cache_proxy.cli import app
from cache_proxy.serve import quiet
from tests.conftest import World
from tests.rawhttp import Line, Told, chat, post
from tests.scripted import Reply, Seen, echo, scripted_upstream, streamed, whole
from tests.served import Ran, Served, command
from tests.stopwatch import awake

pytestmark = pytest.mark.live

NOWHERE = "http://127.0.0.1:9/v1"  # the discard port: nothing in these tests is sent there


async def get(origin: str, path: str, token: str = "", method: str = "GET") -> Told:
    authorization = f"Authorization: Bearer {token}\r\n" if token else ""
    async with Line(origin) as line:
        line.send(f"{method} {path} HTTP/1.1\r\nHost: admin\r\n{authorization}\r\n".encode())
        return await line.answer()


async def ask(served: Served, text: str, **headers: str) -> Told:
    async with Line(served.base) as line:
        line.send(post(chat(text), headers=headers))
        return await line.answer()


async def run(*words: str, **environment: str) -> Ran:
    """A command in this process, which is quicker; nothing that needs the main thread."""
    runner = CliRunner(env={**environment, "COLUMNS": "140"})
    done = await asyncio.to_thread(runner.invoke, app, words)
    return Ran(done.exit_code, done.stdout, done.stderr)


# One life ---------------------------------------------------------------------------------------


async def test_serve_from_its_banner_to_its_end(tmp_path: Path) -> None:
    """What is printed can be pasted; the admin port wants its token; the commands work beside the
    running proxy; SIGTERM lets a running stream end and exits 0; the numbers outlive it."""
    data = tmp_path / "data"

    def script(seen: Seen) -> Reply:
        reply = streamed("slowly " * 15 + "done", seen)
        reply.pause = 0.08
        return reply if seen.json.get("stream") else echo(seen)

    async with scripted_upstream() as upstream:
        upstream.script = script
        served = await Served(data, upstream.base_url).start()
        try:
            origin = f"http://127.0.0.1:{served.port}"
            assert f"export OPENAI_BASE_URL={origin}/v1\n" in served.out
            assert f"export ANTHROPIC_BASE_URL={origin}\n" in served.out
            assert f"forwards misses to {upstream.base_url}\n" in served.out
            assert f"stats: cache-stats --data-dir {data}\n" in served.out
            assert (data / "admin.token").stat().st_mode & 0o777 == 0o600

            await the_admin_port_wants_its_token(served)
            for text in ("Who wrote Hamlet?", "Who wrote Hamlet?", "Who wrote Faust?"):
                assert (await ask(served, text, **{"X-Cache-Tags": "plays"})).status == 200
            await the_commands_work_beside_it(served)

            async with Line(served.base) as line:
                line.send(post(chat("Tell me a long story", stream=True)))
                await line.head()
                stopping = asyncio.create_task(served.stop())
                body, ended = await line._chunks()
                last_byte = awake()
                assert ended
                assert body.endswith(b"data: [DONE]\n\n")
                assert await stopping == 0
                assert awake() - last_byte < 5
            assert served.err == ""
        finally:
            await served.__aexit__()

        told = orjson.loads((await command("stats", "--json", "--data-dir", str(data))).out)
        assert (told["requests"], told["misses"], told["hits"]["exact"]) == (9, 5, 3)
        assert (told["stored"], told["bypasses"]) == (5, {"passthrough": 1})


async def the_admin_port_wants_its_token(served: Served) -> None:
    for path in ("/healthz", "/readyz"):
        assert (await get(served.admin, path)).status in (200, 503)
    for path in ("/metrics", "/stats"):
        assert (await get(served.admin, path)).status == 401
        assert (await get(served.admin, path, "wrong")).status == 401
        assert (await get(served.admin, path, served.token)).status == 200
    assert (await get(served.admin, "/purge", method="POST")).status == 401
    for path in ("/docs", "/openapi.json", "/redoc", "/"):
        assert (await get(served.admin, path)).status == 404
    # And what is the admin's is not to be had from the proxy's port, token or not.
    assert b"cache_proxy" not in (await get(served.base, "/metrics", served.token)).body


async def the_commands_work_beside_it(served: Served) -> None:
    data = str(served.data_dir)

    async def counted() -> dict[str, int]:
        told = await get(served.admin, "/stats", served.token)
        return dict(told.json)

    table = await command("stats", "--data-dir", data)
    assert (table.code, table.err) == (0, "")
    assert "hit rate" in table.out.lower()
    beside = orjson.loads((await command("stats", "--json", "--data-dir", data)).out)
    assert beside["data"] is True
    assert beside["entries"] == (await counted())["entries"] == 2

    assert (await ask(served, "Who wrote Hamlet?")).headers["x-cache"] == "HIT"
    nothing = await command("purge", "--tag", "no such tag", "--data-dir", data)
    assert (nothing.code, nothing.out) == (0, "purged: 0 answers deleted\n")
    assert (await ask(served, "Who wrote Hamlet?")).headers["x-cache"] == "HIT"
    both = await command("purge", "--tag", "plays", "--model", "gpt-4o-mini", "--data-dir", data)
    assert (both.code, both.out) == (0, "purged: 2 answers deleted\n")
    again = await ask(served, "Who wrote Hamlet?", **{"X-Cache-Namespace": "stage"})
    assert again.headers["x-cache"] == "MISS"
    assert (await ask(served, "Who wrote Hamlet?")).headers["x-cache"] == "MISS"


@pytest.mark.parametrize(
    "selection",
    [
        ("--all",),
        ("--namespace", "stage"),
        ("--tag", "plays"),
        ("--model", "gpt-4o-mini"),
        ("--older-than", "0s"),
        ("--entry",),
    ],
    ids=lambda selection: selection[0],
)
async def test_what_is_purged_is_not_served_again(
    world: World, valkey: str, selection: tuple[str, ...]
) -> None:
    """By each of its names; the running proxy knows at once."""
    named = {"X-Cache-Namespace": "stage", "X-Cache-Tags": "plays, verse"}
    text = "Who wrote Hamlet?"
    await world.ask(text, headers=named)
    served = await world.ask(text, headers=named)
    assert served.kind == "HIT"
    if selection == ("--entry",):
        selection = ("--entry", served.headers["x-cache-entry"])
    if selection[0] == "--older-than":  # ages are whole seconds
        created = time.time()
        await world.until(lambda: int(time.time()) > int(created))

    prefix = world.sidecar.memory.store._e.decode().removesuffix(":e:")
    purged = await run(
        "purge",
        *selection,
        "--data-dir",
        str(world.data_dir),
        CACHE_PROXY_KEY_PREFIX=prefix,
        CACHE_PROXY_REDIS_URL=valkey,
    )
    assert (purged.code, purged.out) == (0, "purged: 1 answers deleted\n")
    assert (await world.ask(text, headers=named)).kind == "MISS"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "cache-proxy: Name what to purge, or say that all is meant."),
        (("--all", "--tag", "x"), "cache-proxy: Name what to purge, or say that all is meant."),
        (("--entry", "x"), "cache-proxy: entry: has 40 hexadecimal digits."),
        (("--older-than", "soon"), "cache-proxy: is a duration such as 30s, 15m, 24h or 7d"),
    ],
)
async def test_a_purge_of_nothing_in_particular_is_refused(
    tmp_path: Path, flags: tuple[str, ...], says: str
) -> None:
    """Nobody empties a cache by a slip."""
    ran = await run("purge", *flags, "--data-dir", str(tmp_path / "data"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == says + "\n"
    assert not (tmp_path / "data").exists()


# What is wrong is said in one sentence ----------------------------------------------------------


async def test_a_taken_port_is_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        ran = await command("serve", "--port", port, "--data-dir", str(tmp_path / "data"))
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        f"cache-proxy: port: 127.0.0.1:{port} cannot be listened on: Address already in use.\n"
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("threshold", "2"),
        ("ttl", "for ever"),
        ("port", "99999"),
        ("upstream", "api.openai.com"),
        ("redis_url", "http://localhost"),
        ("workers", "0"),
        ("guards_off", "all"),
        ("tenancy", "everybody"),
        ("model", "no such model here"),
        ("secret", "short"),
        ("prices", "/no/such/file.toml"),
    ],
)
async def test_a_bad_setting_is_one_sentence_that_names_it(
    tmp_path: Path, setting: str, value: str
) -> None:
    named = {f"CACHE_PROXY_{setting.upper()}": value}
    flags = ("--port", "0") if setting != "port" else ()
    started = command if setting in ("model", "prices") else run  # those start a store first
    ran = await started(
        "serve", *flags, "--admin-port", "0", "--data-dir", str(tmp_path / "data"), **named
    )
    assert (ran.code, ran.out) == (2, "")
    assert ran.err.startswith(f"cache-proxy: {setting}: ")
    assert ran.err.count("\n") == 1
    if setting == "secret":
        assert value not in ran.err


def test_a_log_line_that_cannot_be_written_is_lost_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever reads stderr may go away; a request that had something to say goes on."""
    read, write = os.pipe()
    with os.fdopen(write, "w") as stderr:
        monkeypatch.setattr("sys.stderr", stderr)
        quiet("info")
        logger = structlog.get_logger("test")
        logger.warning("read")
        assert b"read" in os.read(read, 200)
        os.close(read)
        logger.warning("never read")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            stderr.close()
    structlog.reset_defaults()


async def test_an_empty_data_dir_is_no_data_and_no_error(tmp_path: Path) -> None:
    data = str(tmp_path / "data")
    table, told = await asyncio.gather(
        command("stats", "--data-dir", data),
        command("stats", "--json", "--by", "model", "--data-dir", str(tmp_path / "other")),
    )
    assert (table.code, told.code) == (0, 0)
    assert "no data" in table.out
    document = orjson.loads(told.out)
    assert (document["data"], document["requests"], document["hit_rate"]) == (False, 0, None)


# The demo ---------------------------------------------------------------------------------------


async def test_the_demo_shows_hits_traps_and_no_wrong_answer() -> None:
    """What a newcomer runs first."""
    ran = await command("demo")
    assert (ran.code, ran.err) == (0, "")
    assert "WRONG" not in ran.out
    assert ran.out.count("right") == 16
    for word in ("HIT", "MISS", "BYPASS", "exact", "semantic", "saved"):
        assert word in ran.out


# Secrets ----------------------------------------------------------------------------------------

SECRETS = {
    "key": "sk-canary-4f1d9c",
    "prompt": "canaryprompt83b2",
    "answer": "canaryanswer77e0",
    "system": "canarysystem19aa",
    "query": "canaryquery55c3",
}


async def test_no_secret_and_no_prompt_leaves_by_a_side_door(tmp_path: Path) -> None:
    """I9: not in the log at its most talkative, nor in metrics, admin pages, errors or the names of
    the store's keys; whatever goes wrong."""
    data = tmp_path / "data"

    def script(seen: Seen) -> Reply:
        if "broken" in seen.text:
            return Reply(parts=(b"half", b"way"), cut=True)
        if "refused" in seen.text:
            return Reply(status=500, parts=(SECRETS["answer"].encode(),))
        say = f"It is {SECRETS['answer']}"
        return (streamed if seen.json.get("stream") else whole)(say, seen)

    async with scripted_upstream() as upstream:
        upstream.script = script
        served = Served(data, upstream.base_url, CACHE_PROXY_LOG_LEVEL="debug")
        async with served:
            texts = (
                f"What is {SECRETS['prompt']}, please?",
                f"What's {SECRETS['prompt']} please?",
                f"A broken {SECRETS['prompt']}",
                f"A refused {SECRETS['prompt']}",
                f"And {SECRETS['prompt']} today?",
            )
            for text in texts * 2:
                for stream in (False, True):
                    body = orjson.dumps(
                        {
                            "model": "gpt-4o-mini",
                            "stream": stream,
                            "user": SECRETS["prompt"],
                            "messages": [
                                {"role": "system", "content": SECRETS["system"]},
                                {"role": "user", "content": text},
                            ],
                        }
                    )
                    await exchange(served, body)
            await exchange(served, b'{"' + SECRETS["prompt"].encode() + b'": [')
            await exchange(served, b"\xff" + SECRETS["prompt"].encode())
            await exchange(served, chat("hello"), "X-Cache-Mode", SECRETS["prompt"])
            await exchange(served, chat("hello"), "Authorization", f"Basic {SECRETS['key']}")
            shown = [
                await get(served.admin, path, served.token)
                for path in ("/metrics", "/stats", "/stats?by=tenant", "/stats?by=reason")
            ]
            shown += [await get(served.admin, path) for path in ("/healthz", "/readyz")]
            with Redis(unix_socket_path=str(data / "valkey" / "valkey.sock")) as store:
                names = b"\n".join(store.scan_iter("*", count=1_000))
                names += b"\n".join(
                    field for hour in store.scan_iter("*:n:*") for field in store.hkeys(hour)
                )
        assert b"hit" in shown[0].body
        assert b":e:" in names
        assert "request" in served.err  # the log did talk
        talk = b"\n".join(
            [
                served.out.encode(),
                served.err.encode(),
                names,
                *(told.body for told in shown),
                (data / "valkey" / "valkey.log").read_bytes(),
            ]
        )
        assert {name for name, secret in SECRETS.items() if secret.encode() in talk} == set()
        for name, secret in SECRETS.items():  # the secrets did come by
            if name != "answer":
                assert any(
                    secret.encode() in seen.body + seen.query or secret in str(seen.headers)
                    for seen in upstream.seen
                )


async def exchange(served: Served, body: bytes, name: str = "", value: str = "") -> None:
    """One request with all the secrets in it, whatever becomes of it."""
    async with Line(served.base) as line:
        path = f"/v1/chat/completions?note={SECRETS['query']}"
        headers = {name: value} if name else {}
        line.send(post(body, path=path, key=SECRETS["key"], headers=headers))
        await line.answer()
