"""The commands: `cache-proxy ...` and `cache-stats`. Reads flags, prints, and leaves the rest."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live

from . import settings as configuration
from .errors import ConfigError, MemoryUnavailable, UpstreamUnavailable
from .pricing import PriceBook
from .settings import Settings
from .stats import BYS, By, Report, as_json, collect, parse_since
from .stats_table import render, shadow_table, wrong_rate

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
    to = ", ".join(settings.providers) or settings.upstream
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - shown only
    print(
        f"cache-proxy listens on http://{host}:{port} and forwards misses to {to}\n"
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
    from .admin import Purge, selector

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
    from .explain import explanation

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


Url = Annotated[str | None, typer.Option(help="The sidecar's base URL; where serve listens.")]
KeyEnv = Annotated[str, typer.Option(help="The environment variable that holds the key.")]


@app.command(epilog="Example: cache-proxy batch in.jsonl out.jsonl --concurrency 20 --rate 600/m")
def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN", help="JSON lines to ask.")],
    answers: Annotated[Path, typer.Argument(metavar="OUT", help="Answers are added here.")],
    errors: Annotated[
        Path | None, typer.Option(help="Lines that failed; OUT with .errors by default.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=1_000, help="Requests at a time.")] = 20,
    rate: Annotated[
        str | None, typer.Option(help="Most calls upstream: 600/m, 10/s; hits do not count.")
    ] = None,
    url: Url = None,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    config: Config = None,
) -> None:
    """Ask a file of requests through the running sidecar, each line answered exactly once.

    Files are those of OpenAI's Batch API. Lines that ask the same are asked once, and share the
    answer. Killed or interrupted, the same command goes on where it was: what is in OUT is not
    asked again, a failure that may pass (429, 5xx) is. Each answer is written as it comes; a power
    loss can take those of the last seconds. Exit 0 when all is answered, 1 with errors, 130 when
    interrupted.
    """
    from .batch import parse_rate, run
    from .batch_files import Batch

    settings = _settings(config)
    try:
        with closing(Batch(requests, answers, errors or _beside(answers))) as opened:
            code = run(
                opened,
                Console(),
                base=url or _sidecar(settings),
                key=_key(api_key_env),
                concurrency=concurrency,
                rate=None if rate is None else parse_rate(rate),
                prices=_prices(settings),
                seller=settings.upstream,
            )
    except ConfigError as exc:
        _fail(exc)
    raise typer.Exit(code)


def _beside(answers: Path) -> Path:
    return answers.with_name(f"{answers.stem}.errors{answers.suffix}")


def _sidecar(settings: Settings) -> str:
    """Where `serve` listens with the same settings."""
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - asked only
    return f"http://{_bracketed(host)}:{settings.port}/v1"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _key(name: str) -> str:
    """The key in that variable; none when the usual one is not set, as a local model needs none."""
    return configuration.variable("api_key_env", name, needed=name != "OPENAI_API_KEY")


def _prices(settings: Settings) -> PriceBook:
    from .opening import price_overrides

    return PriceBook(overrides=price_overrides(settings), clock=time.time)


@app.command(epilog="Example: cache-proxy bench --models gpt-4.1,gpt-4.1-mini --stream")
def bench(
    models: Annotated[str, typer.Option(help="Models, with commas between.")],
    via: Annotated[str, typer.Option(help="proxy, direct or both.")] = "proxy,direct",
    requests: Annotated[int, typer.Option(min=1, help="Of each model and way.")] = 100,
    concurrency: Annotated[int, typer.Option(min=1, max=1_000, help="Workers.")] = 10,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="About; usage is billed.")] = 500,
    max_tokens: Annotated[int, typer.Option(min=0, help="Of each answer; 0 names none.")] = 64,
    stream: Annotated[bool, typer.Option("--stream", help="Streams, with time to text.")] = False,
    cached: Annotated[
        bool, typer.Option("--cached", help="One prompt for all, so that the cache answers.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a PNG of how times spread.")] = None,
    proxy_url: Url = None,
    direct_url: Annotated[
        str | None, typer.Option(help="The provider's base URL; upstream by default.")
    ] = None,
    api_key_env: KeyEnv = "OPENAI_API_KEY",
    config: Config = None,
) -> None:
    """Measure models side by side, through the proxy and without it. This spends real tokens.

    The loop is closed: each worker asks again once it has its answer, so a stall also holds back
    requests that users would have sent meanwhile, and percentiles look better than what those users
    would see (coordinated omission). Every prompt is new, unless --cached; connections are opened
    and each model asked once beforehand, uncounted. req/s is what so many workers get through when
    they do nothing else.
    """
    from . import bench as bench_

    settings = _settings(config)
    ways = [way.strip() for way in via.split(",") if way.strip()]
    names = [name.strip() for name in models.split(",") if name.strip()]
    try:
        if not names or not ways or not set(ways) <= {"proxy", "direct"}:
            raise ConfigError("bench: models has a name, and via is proxy, direct or both.")
        if plot is not None:
            bench_.plotter()
        named = settings.providers and "upstream" not in settings.model_fields_set
        if "direct" in ways and direct_url is None and named:
            raise ConfigError("bench: providers are named; say --direct-url, or --via proxy.")
        direct = direct_url or settings.upstream
        plan = bench_.Plan(
            arms=tuple(
                bench_.Arm(name, "proxy" if way == "proxy" else "direct")
                for name in dict.fromkeys(names)
                for way in dict.fromkeys(ways)
            ),
            bases={"proxy": proxy_url or _sidecar(settings), "direct": direct},
            requests=requests,
            concurrency=concurrency,
            prompt_tokens=prompt_tokens,
            max_tokens=max_tokens,
            stream=stream,
            cached=cached,
        )
        measured = bench_.run(plan, _key(api_key_env), Console(stderr=True))
        told = bench_.report(measured, _prices(settings), direct)
    except ConfigError as exc:
        _fail(exc)
    if json_:
        print(json.dumps(told, indent=2))
    elif markdown:
        print(bench_.markdown(told))
    else:
        Console().print(bench_.table(told))
    if plot is not None:
        try:
            bench_.plot(measured, plot)
        except OSError as exc:
            _fail(ConfigError(f"plot: {plot} cannot be written: {exc.strerror}."))
    raise typer.Exit(130 if measured.interrupted else 0)


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
    by: Annotated[str | None, typer.Option(help=f"{', '.join(BYS[:-1])} or {BYS[-1]}.")] = None,
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
    if by is not None and by not in BYS:
        _fail(ConfigError(f"by: is one of {', '.join(BYS)}."))
    grouping: By | None = by
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
    from .upstream.client import Upstream

    try:
        token = (settings.data_dir / "admin.token").read_text("ascii").strip()
    except OSError:
        _fail(ConfigError(f"data_dir: there is no admin token in {settings.data_dir}."))

    async def ask() -> tuple[int, bytes]:
        client = Upstream(max_connections=1, connect_seconds=5.0)
        url = f"http://{_bracketed(settings.admin_host)}:{settings.admin_port}{path}"
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
    try:
        found = json.loads(answer)
        told = None if status == 200 else found.get("detail", status)
    except (ValueError, AttributeError):
        _fail(ConfigError("admin_port: what answers there is no cache-proxy."))
    if told is not None:
        _fail(ConfigError(f"admin: {told}"))
    return found


def _with_store(settings: Settings, work: Any) -> Any:
    """Run `work(store)` against the store that `serve` uses, started for the moment if need be."""
    from .opening import embedded_store, open_store

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
