"""The commands: `cache-proxy ...` and `cache-stats`. Reads flags, prints, and leaves the rest."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from . import settings as configuration
from .admin import Purge, selector
from .errors import ConfigError, MemoryUnavailable, UpstreamUnavailable
from .explain import explanation
from .settings import Settings
from .stats import (
    By,
    Report,
    as_json,
    collect,
    parse_since,
    render,
    shadow_table,
    wrong_rate,
)
from .upstream.client import Upstream

__all__ = ["app", "stats_app"]

app = typer.Typer(
    help="A semantic response cache that runs beside an LLM app as an HTTP proxy.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
stats_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

DataDir = Annotated[Path | None, typer.Option(help="Where the embedded store and the keys live.")]
RedisUrl = Annotated[str | None, typer.Option(help="A Redis or Valkey 7+; unset is embedded.")]
Config = Annotated[Path | None, typer.Option(help="A TOML file; ./cache-proxy.toml by default.")]


def _fail(exc: Exception) -> NoReturn:
    """One sentence on stderr, exit 2."""
    print(f"cache-proxy: {exc}", file=sys.stderr)
    raise typer.Exit(2) from exc


def _settings(config: Path | None, **flags: Any) -> Settings:
    try:
        return configuration.load(config, **flags)
    except ConfigError as exc:
        _fail(exc)


@app.command(epilog="Example: cache-proxy serve --upstream https://api.openai.com/v1")
def serve(
    upstream: Annotated[str | None, typer.Option(help="Base URL that misses go to.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 takes a free one.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="Port of health and metrics.")] = None,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    model: Annotated[str | None, typer.Option(help="The encoder.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Least cosine of a hit.")] = None,
    ttl: Annotated[str | None, typer.Option(help="How long answers are kept: 7d, 12h.")] = None,
    config: Config = None,
    workers: Annotated[int | None, typer.Option(help="Processes that share the port.")] = None,
) -> None:
    """Run the proxy beside an app."""
    from .serve import run

    settings = _settings(
        config,
        upstream=upstream,
        host=host,
        port=port,
        admin_port=admin_port,
        data_dir=data_dir,
        redis_url=redis_url,
        model=model,
        threshold=threshold,
        ttl=ttl,
        workers=workers,
    )
    try:
        run(settings, lambda *ports: _announce(settings, *ports))
    except ConfigError as exc:
        _fail(exc)


def _announce(settings: Settings, port: int, admin_port: int) -> None:
    """What to paste into the app."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - shown only
    print(
        f"cache-proxy listens on http://{host}:{port} and forwards misses to {settings.upstream}\n"
        f"\n"
        f"  export OPENAI_BASE_URL=http://{host}:{port}/v1\n"
        f"  export ANTHROPIC_BASE_URL=http://{host}:{port}\n"
        f"\n"
        f"admin: http://{settings.admin_host}:{admin_port}/healthz"
        f" (token in {settings.data_dir / 'admin.token'})\n"
        f"stats: cache-stats --data-dir {settings.data_dir}",
        flush=True,
    )


@app.command(epilog="Example: cache-proxy demo")
def demo(
    keep: Annotated[
        Path | None, typer.Option(help="Keep the demo's data in this folder instead of a new one.")
    ] = None,
) -> None:
    """Try the whole thing: a scripted upstream, real questions, and what became of them."""
    from .demo import run

    try:
        run(Console(), keep)
    except ConfigError as exc:
        _fail(exc)


@app.command(epilog="Example: cache-proxy purge --tag doc:42")
def purge(
    entry: Annotated[str | None, typer.Option(help="X-Cache-Entry of one answer.")] = None,
    tag: Annotated[str | None, typer.Option(help="Answers stored with this tag.")] = None,
    namespace: Annotated[str | None, typer.Option(help="Answers of this namespace.")] = None,
    model: Annotated[str | None, typer.Option(help="Answers of this model.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Answers older than 1d, 6h ...")] = None,
    all_: Annotated[bool, typer.Option("--all", help="Everything.")] = False,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Never serve these answers again. Conditions given together must all match."""
    settings = _settings(config, data_dir=data_dir, redis_url=redis_url)
    try:
        age = None if older_than is None else configuration.seconds(older_than)
        asked = Purge(
            entry=entry,
            tag=tag,
            namespace=namespace,
            model=model,
            older_than_seconds=age,
            all=all_,
        )
        chosen = selector(asked, time.time())
    except ValueError as exc:
        message = "entry: has 40 hexadecimal digits." if entry and "entry" in str(exc) else str(exc)
        _fail(ConfigError(message))

    async def work(store: Any) -> int:
        await store.purge(chosen, time.time())
        swept: int = await store.sweep(chosen)
        return swept

    print(f"purged: {_with_store(settings, work)} answers deleted")


@app.command(epilog='Example: cache-proxy explain "What is the capital of France?"')
def explain(
    prompt: Annotated[str, typer.Argument(help="A prompt, or @FILE with a request's JSON body.")],
    request_model: Annotated[str, typer.Option(help="The request's model.")] = "gpt-4o-mini",
    key: Annotated[
        str, typer.Option(envvar="OPENAI_API_KEY", help="The key that the app sends.")
    ] = "",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    admin_port: Annotated[int | None, typer.Option(help="The running proxy's admin port.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Why a request hits or misses, and the one thing that would change it."""
    settings = _settings(config, data_dir=data_dir, admin_port=admin_port)
    messages = [{"role": "user", "content": prompt}]
    body: Any = {"model": request_model, "messages": messages}
    if prompt.startswith("@"):
        try:
            body = json.loads(Path(prompt[1:]).read_text("utf-8"))
        except (OSError, ValueError):
            _fail(ConfigError("prompt: the file cannot be read as JSON."))
    headers = {"authorization": f"Bearer {key}"} if key else {}
    path = (
        "/v1/completions" if isinstance(body, dict) and "prompt" in body else "/v1/chat/completions"
    )
    found = _admin(settings, "/explain", {"body": body, "headers": headers, "path": path})
    if json_:
        print(json.dumps(found, indent=2))
    else:
        Console().print(explanation(found))


@app.command(epilog="Example: cache-proxy tune pairs.jsonl --budget 0.01")
def tune(
    pairs: Annotated[Path, typer.Argument(help='JSON lines: {"a": ..., "b": ..., "same": true}.')],
    budget: Annotated[float, typer.Option(help="Share of wrong hits that is bearable.")] = 0.01,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    model: Annotated[str | None, typer.Option(help="The encoder.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Certify a threshold on your own labelled pairs; exit 1 when they cannot carry one."""
    from .tune import run

    settings = _settings(config, data_dir=data_dir, model=model)
    try:
        certified = run(pairs, budget, settings, Console(), json_)
    except ConfigError as exc:
        _fail(exc)
    raise typer.Exit(0 if certified else 1)


@app.command(epilog="Example: cache-proxy audit 300")
def audit(
    count: Annotated[int, typer.Argument(min=1, max=1_000, help="How many distinct hits.")] = 100,
    admin_port: Annotated[int | None, typer.Option(help="The running proxy's admin port.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Ask upstream now what the latest distinct semantic hits were served from memory."""
    settings = _settings(config, data_dir=data_dir, admin_port=admin_port)
    found = _admin(settings, "/audit", {"n": count})
    if not found["audited"]:
        print("no data: no semantic hit is left to audit, or upstream gave no clear answer")
        return
    print(wrong_rate(found))
    bound = math.ceil(round(found["bound"] * 1_000, 6)) / 10
    print(f"at most {bound:.1f} % at 95 % confidence; {found['unclear']} without a clear answer")


@app.command(epilog="Example: cache-proxy bad 3f9c... --prompt 'Turn off dark mode'")
def bad(
    entry: Annotated[str, typer.Argument(help="X-Cache-Entry of the wrong answer.")],
    prompt: Annotated[str | None, typer.Option(help="The prompt that it was wrong for.")] = None,
    admin_port: Annotated[int | None, typer.Option(help="The running proxy's admin port.")] = None,
    data_dir: DataDir = None,
    config: Config = None,
) -> None:
    """Report a wrong hit: neither that answer nor its like is served to such prompts again."""
    settings = _settings(config, data_dir=data_dir, admin_port=admin_port)
    found = _admin(settings, "/bad", {"entry": entry, "prompt": prompt})
    if found["found"] and found["floor"] < 1:
        print(f"purged; by meaning its question is only matched above {found['floor']:.3f}")
    elif found["found"]:
        print("purged; its question is matched exactly only from here on")
    else:
        print("no such entry is stored now; its question is matched exactly only from here on")


@stats_app.command(epilog="Example: cache-stats --since 24h --by model")
def stats(
    since: Annotated[str, typer.Option(help="How far back: 7d, 24h, 30m or a date.")] = "7d",
    by: Annotated[str | None, typer.Option(help="model, tenant, day, tier or reason.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="What each threshold would have served.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until interrupted.")] = False,
    data_dir: DataDir = None,
    redis_url: RedisUrl = None,
    config: Config = None,
) -> None:
    """Hit rate, savings and latency, from the persisted counters; the proxy need not run."""
    settings = _settings(config, data_dir=data_dir, redis_url=redis_url)
    if by is not None and by not in ("model", "tenant", "day", "tier", "reason"):
        _fail(ConfigError("by: is one of model, tenant, day, tier, reason."))
    grouping: By | None = by  # type: ignore[assignment]
    try:
        parse_since(since, time.time())
    except ValueError as exc:
        _fail(ConfigError(f"since: {exc}"))

    async def report(store: Any) -> Report:
        return await collect(store, parse_since(since, time.time()), time.time(), grouping)

    async def watching(store: Any) -> None:
        with Live(render(await report(store)), auto_refresh=False, screen=False) as live:
            while True:
                await asyncio.sleep(1.0)
                live.update(render(await report(store)), refresh=True)

    if watch:
        try:
            _with_store(settings, watching)
        except KeyboardInterrupt:
            return
    found = _with_store(settings, report)
    if json_:
        print(json.dumps(as_json(found), indent=2))
    else:
        Console().print(shadow_table(found) if shadow else render(found))


def _admin(settings: Settings, path: str, body: Any) -> Any:
    """Ask the running proxy's admin port; its token lies in the data dir."""
    try:
        token = (settings.data_dir / "admin.token").read_text("ascii").strip()
    except OSError:
        _fail(ConfigError(f"data_dir: there is no admin token in {settings.data_dir}."))

    async def ask() -> tuple[int, bytes]:
        client = Upstream(max_connections=1, connect_seconds=5.0)
        url = f"http://{settings.admin_host}:{settings.admin_port}{path}"
        headers = [
            (b"authorization", f"Bearer {token}".encode()),
            (b"content-type", b"application/json"),
        ]
        try:
            sent = json.dumps(body).encode()
            response = await client.send("POST", url, headers, sent, read_seconds=600.0)
            answer = b"".join([chunk async for chunk in response.chunks()])
            await response.close()
            return response.status, answer
        finally:
            await client.close()

    try:
        status, answer = asyncio.run(ask())
    except UpstreamUnavailable:
        _fail(ConfigError("admin_port: no proxy answers there."))
    if status != 200:
        _fail(ConfigError(f"admin: {json.loads(answer).get('detail', status)}"))
    return json.loads(answer)


def _with_store(settings: Settings, work: Any) -> Any:
    """Run `work(store)` against the store that `serve` uses, started for the moment if need be."""
    from .serve import embedded_store
    from .wiring import open_store

    async def run(url: str) -> Any:
        store = open_store(settings, url)
        try:
            return await work(store)
        finally:
            await store.close()

    try:
        with embedded_store(settings) as (url, _):
            return asyncio.run(run(url))
    except ConfigError as exc:
        _fail(exc)
    except MemoryUnavailable:
        _fail(ConfigError("redis_url: the store does not answer."))
