"""The commands: `cache-proxy ...` and `cache-stats`. Reads flags, prints, and leaves the rest."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from . import settings as configuration
from .admin import Purge, selector
from .errors import ConfigError, MemoryUnavailable
from .settings import Settings
from .stats import By, Report, as_json, collect, parse_since, render

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


@stats_app.command(epilog="Example: cache-stats --since 24h --by model")
def stats(
    since: Annotated[str, typer.Option(help="How far back: 7d, 24h, 30m or a date.")] = "7d",
    by: Annotated[str | None, typer.Option(help="model, tenant, day, tier or reason.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
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
        Console().print(render(found))


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
