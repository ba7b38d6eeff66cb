"""`cache-proxy bench`: models, and the ways to them, measured side by side.

A closed loop: so many workers, each of which asks again once it has its answer. Arms (a model by a
way) take turns, so that a slow minute of the provider or of this machine falls on all of them.
Speaks OpenAI's chat completions. Retries nothing and keeps no answer.
"""

from __future__ import annotations

import asyncio
import datetime
import secrets
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import orjson
import uvloop
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from .caller import Caller, Told
from .errors import ConfigError, UpstreamUnavailable
from .model import Usage
from .pricing import PriceBook
from .protocols.openai_answer import usage_of
from .protocols.sse import Splitter, SseTooLarge, data

__all__ = [
    "Arm",
    "Measured",
    "Plan",
    "Shot",
    "markdown",
    "measure",
    "plot",
    "plotter",
    "report",
    "run",
    "table",
    "turns",
]

Via = Literal["proxy", "direct"]

# Common English words: about a token each for every tokenizer.
_WORDS = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work night point "
    "home water room mother area money story fact month lot right study book eye job word business"
)
_FRAME_TOKENS = 30  # what surrounds the words
_FILLING_TRIES = 5
_NO_DATA = "no data"


@dataclass(frozen=True, slots=True)
class Arm:
    """One model by one way."""

    model: str
    via: Via


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured. `bases` are base URLs, with `/v1` where the provider has it."""

    arms: tuple[Arm, ...]
    bases: Mapping[Via, str]
    requests: int  # of each arm
    concurrency: int
    prompt_tokens: int
    max_tokens: int
    stream: bool
    cached: bool  # one prompt for all, so that the cache answers


@dataclass(frozen=True, slots=True)
class Shot:
    """One request. Seconds from sending to the last byte, and to the first text of a stream."""

    arm: Arm
    seconds: float
    busy: float  # until its worker was free again
    error: str = ""  # "429", "no_answer", "unreadable", "unfinished"; empty when all went well
    first: float | None = None
    usage: Usage | None = None
    hit: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """All shots of one run, in the order in which they ended."""

    plan: Plan
    shots: Sequence[Shot]
    began: float  # Unix seconds
    seconds: float
    interrupted: bool


def turns(arms: Sequence[Arm], requests: int, grain: int) -> Iterator[Arm]:
    """Whose turn it is, request by request: `grain` of one arm, then of the next.

    Each round begins with another arm, so that none always follows the same one.
    """
    left = dict.fromkeys(arms, requests)
    first = 0
    while any(left.values()):
        for arm in islice(cycle(arms), first, first + len(arms)):
            now = min(grain, left[arm])
            left[arm] -= now
            yield from (arm for _ in range(now))
        first = (first + 1) % len(arms)


# Measuring ----------------------------------------------------------------------------------------


def run(plan: Plan, key: str, screen: Console) -> Measured:
    """`measure`, in an event loop of its own."""
    return uvloop.run(measure(plan, key, screen))


async def measure(plan: Plan, key: str, screen: Console) -> Measured:
    """Warm up, ask, and return every shot; interrupted by a signal, those that there are.

    ConfigError when nobody answers at one of the addresses.
    """
    bench = _Bench(plan, key)
    asking = asyncio.create_task(bench.ask_all(screen))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, asking.cancel)
    began = time.time()
    try:
        await asking
    except asyncio.CancelledError:
        interrupted = True
    else:
        interrupted = False
    finally:
        bench.close()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    return Measured(plan, bench.shots, began, bench.seconds, interrupted)


class _Bench:
    """Workers with a connection of their own to each address."""

    def __init__(self, plan: Plan, key: str) -> None:
        self.shots: list[Shot] = []
        self.seconds = 0.0
        self._plan = plan
        self._nonce = secrets.token_hex(6)
        self._number = 0
        used = {arm.via for arm in plan.arms}
        self._workers = [
            {via: Caller(plan.bases[via], key) for via in used}
            for _ in range(min(plan.concurrency, plan.requests))
        ]

    def close(self) -> None:
        for callers in self._workers:
            for caller in callers.values():
                caller.close()

    async def ask_all(self, screen: Console) -> None:
        plan = self._plan
        await self._warm_up()
        todo = turns(plan.arms, plan.requests, len(self._workers))
        started = time.perf_counter()
        with Progress(console=screen, transient=True, disable=not screen.is_terminal) as bar:
            asked = bar.add_task("asking", total=len(plan.arms) * plan.requests)

            async def work(callers: Mapping[Via, Caller]) -> None:
                for arm in todo:
                    self.shots.append(await self._shoot(arm, callers[arm.via]))
                    bar.advance(asked)

            try:
                async with asyncio.TaskGroup() as group:
                    for callers in self._workers:
                        group.create_task(work(callers))
            finally:
                self.seconds = time.perf_counter() - started

    async def _warm_up(self) -> None:
        """Open every connection, by a question that costs nothing, and ask each model once."""
        opened = (
            caller.ask(self._target(via, "/models"), None)
            for callers in self._workers
            for via, caller in callers.items()
        )
        for failure in await asyncio.gather(*opened, return_exceptions=True):
            if isinstance(failure, UpstreamUnavailable):
                raise ConfigError(f"bench: {self._addresses()} cannot be measured: {failure}")
        for arm in self._plan.arms:
            for _ in range(_FILLING_TRIES if self._plan.cached and arm.via == "proxy" else 1):
                if (await self._shoot(arm, self._workers[0][arm.via])).hit:
                    break
                await asyncio.sleep(0.05)  # an answer is stored after its client has it

    async def _shoot(self, arm: Arm, caller: Caller) -> Shot:
        started = time.perf_counter()
        self._number += 1
        body = _request(self._plan, arm.model, self._nonce, self._number)
        # What is asked once need not be kept for a week.
        headers = [("X-Cache-TTL", "3600" if self._plan.cached else "60")]
        try:
            told = await caller.ask(
                self._target(arm.via, "/chat/completions"),
                body,
                headers if arm.via == "proxy" else (),
            )
        except UpstreamUnavailable:
            busy = time.perf_counter() - started
            return Shot(arm, busy, busy, "no_answer")
        error, first, usage = _judged(told, stream=self._plan.stream)
        return Shot(
            arm=arm,
            seconds=told.ended - told.sent,
            busy=time.perf_counter() - started,
            error=error,
            first=None if first is None else first - told.sent,
            usage=usage,
            hit=told.header(b"x-cache") == "HIT",
        )

    def _addresses(self) -> str:
        return " or ".join(self._plan.bases[via] for via in self._workers[0])

    def _target(self, via: Via, path: str) -> str:
        return urlsplit(self._plan.bases[via]).path.rstrip("/") + path


def _request(plan: Plan, model: str, nonce: str, number: int) -> bytes:
    """A prompt of about `prompt_tokens` that nobody has asked before, unless hits are measured.

    It differs from its first words on, or the provider's own prompt cache would help.
    """
    number = 0 if plan.cached else number
    words = islice(cycle(_WORDS.split()), number % 50, None)
    text = " ".join(islice(words, max(1, plan.prompt_tokens - _FRAME_TOKENS)))
    system = f"Run {nonce}, number {number}."
    fields: dict[str, Any] = {
        "model": model,
        "messages": [
            {"role": "system", "content": system},
            {"role": "user", "content": f"Write a short story with some of these words: {text}"},
        ],
    }
    if plan.max_tokens:
        fields["max_tokens"] = plan.max_tokens
    if plan.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return orjson.dumps(fields)


def _judged(told: Told, *, stream: bool) -> tuple[str, float | None, Usage | None]:
    """What was wrong with the answer, when its first text came, and what it used."""
    if told.status != 200:
        return str(told.status), None, None
    try:
        return _streamed(told) if stream else _whole(told.body)
    except (ValueError, TypeError, AttributeError, SseTooLarge):
        return "unreadable", None, None


def _whole(body: bytes) -> tuple[str, float | None, Usage | None]:
    document = orjson.loads(body)
    return "" if document.get("choices") else "unfinished", None, usage_of(document)


def _streamed(told: Told) -> tuple[str, float | None, Usage | None]:
    splitter = Splitter()
    first, usage, done = None, None, False
    for moment, chunk in told.chunks:
        for event in splitter.feed(chunk):
            said = data(event)
            if said == b"[DONE]":
                done = True
            elif said is not None and (first is None or b'"usage":{' in said.replace(b" ", b"")):
                document = orjson.loads(said)
                usage = usage_of(document) or usage
                if first is None and any(map(_speaks, document.get("choices") or ())):
                    first = moment
    return "" if done else "unfinished", first, usage


def _speaks(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return bool(delta.get("content") or delta.get("reasoning_content"))


# Telling ------------------------------------------------------------------------------------------


def report(measured: Measured, prices: PriceBook, seller: str) -> dict[str, Any]:
    """The documented shape of `--json`. Times in milliseconds, money in US dollars.

    What there is no data for is null. `seller` is the base URL whose prices count.
    """
    plan = measured.plan
    began = datetime.datetime.fromtimestamp(measured.began, datetime.UTC)
    return {
        "began": began.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seconds": round(measured.seconds, 3),
        "interrupted": measured.interrupted,
        "requests": plan.requests,
        "concurrency": min(plan.concurrency, plan.requests),
        "prompt_tokens": plan.prompt_tokens,
        "max_tokens": plan.max_tokens or None,
        "stream": plan.stream,
        "cached": plan.cached,
        "arms": [_arm(measured, arm, prices, seller) for arm in plan.arms],
        "prices_as_of": prices.as_of,
    }


def _arm(measured: Measured, arm: Arm, prices: PriceBook, seller: str) -> dict[str, Any]:
    shots = [shot for shot in measured.shots if shot.arm == arm]
    good = [shot for shot in shots if not shot.error]
    errors = Counter(shot.error for shot in shots if shot.error)
    busy = sum(shot.busy for shot in shots)
    workers = min(measured.plan.concurrency, measured.plan.requests)
    firsts = [shot.first for shot in good if shot.first is not None]
    paid = [shot for shot in good if not shot.hit]
    costs = [prices.cost(shot.usage, arm.model, seller) if shot.usage else None for shot in paid]
    known = [cost for cost in costs if cost is not None]
    return {
        "model": arm.model,
        "via": arm.via,
        "requests": len(shots),
        "good": len(good),
        "errors": dict(errors.most_common()),
        "error_rate": round(1 - len(good) / len(shots), 4) if shots else None,
        "hits": sum(shot.hit for shot in good),
        "ms": _times([shot.seconds for shot in good]),
        "first_token_ms": _times(firsts),
        # Of workers that did nothing else: with one arm, requests over wall clock.
        "requests_per_second": round(len(good) * workers / busy, 3) if good else None,
        "tokens": {
            "input": sum(shot.usage.input for shot in good if shot.usage),
            "output": sum(shot.usage.output for shot in good if shot.usage),
        },
        "usd_per_mtok": {
            "input": _per_mtok(prices.cost(Usage(input=1_000), arm.model, seller)),
            "output": _per_mtok(prices.cost(Usage(output=1_000), arm.model, seller)),
        },
        "usd": sum(known) / 1e9 if known or (good and not paid) else None,
        "price_unknown": len(costs) - len(known),
    }


def _times(seconds: Sequence[float]) -> dict[str, float | None]:
    """Mean and percentiles in milliseconds; a percentile is a time that was measured."""
    ordered = sorted(seconds)
    count = len(ordered)
    if not count:
        return dict.fromkeys(("mean", "p50", "p95", "p99"))
    times: dict[str, float | None] = {"mean": round(sum(ordered) / count * 1_000, 3)}
    for percent in (50, 95, 99):
        rank = -(-percent * count // 100)  # nearest rank: the least that so many do not exceed
        times[f"p{percent}"] = round(ordered[rank - 1] * 1_000, 3)
    return times


def _per_mtok(nano_for_1000: int | None) -> float | None:
    return None if nano_for_1000 is None else nano_for_1000 / 1e6


def _rows(told: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Names of the columns, and a row of texts for each arm."""
    names = ["model", "via", "requests", "errors", "mean ms", "P50", "P95", "P99"]
    if told["stream"]:
        names += ["TTFT P50", "TTFT P95"]
    names += ["req/s", "hits", "$/MTok in", "$/MTok out", "cost"]
    rows = []
    for arm in told["arms"]:
        times = [arm["ms"][name] for name in ("mean", "p50", "p95", "p99")]
        if told["stream"]:
            times += [arm["first_token_ms"][name] for name in ("p50", "p95")]
        failed = ", ".join(f"{n:,} x {why}" for why, n in arm["errors"].items())
        rate = arm["error_rate"]
        rows.append(
            [
                arm["model"],
                arm["via"],
                f"{arm['requests']:,}",
                _NO_DATA if rate is None else f"{rate:.1%}" + (f" ({failed})" if failed else ""),
                *(_shown(each, "{:,.1f}") for each in times),
                _shown(arm["requests_per_second"], "{:,.1f}"),
                f"{arm['hits']:,}",
                *(_shown(arm["usd_per_mtok"][each], "{:,.3g}", "unknown") for each in _IN_OUT),
                _shown(arm["usd"], "${:,.4f}", "unknown" if arm["good"] else _NO_DATA),
            ]
        )
    return names, rows


_IN_OUT = ("input", "output")


def _shown(value: float | None, form: str, without: str = _NO_DATA) -> str:
    return without if value is None else form.format(value)


def table(told: Mapping[str, Any]) -> Table:
    """`report` for a terminal, a column an arm: the figures of one would not fit into a line."""
    names, rows = _rows(told)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title=_title(told))
    made.add_column()
    for model, via, *_ in rows:
        made.add_column(f"{model}\n{via}", justify="right")
    for name, *cells in list(zip(names, *rows, strict=True))[2:]:
        made.add_row(name, *cells)
    return made


def markdown(told: Mapping[str, Any]) -> str:
    """`report` as a table in Markdown."""
    names, rows = _rows(told)
    lines = [names, ["---" if n < 2 else "---:" for n in range(len(names))], *rows]
    cells = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in lines)
    return f"{_title(told)}\n\n{cells}"


def _title(told: Mapping[str, Any]) -> str:
    kind = "streams" if told["stream"] else "answers"
    return (
        f"{told['requests']:,} {'cached ' if told['cached'] else ''}{kind} of each, "
        f"{told['concurrency']:,} at a time, prompts of about {told['prompt_tokens']:,} tokens"
        f"{'; interrupted' if told['interrupted'] else ''}"
    )


def plot(measured: Measured, path: Path) -> None:
    """How the times are spread, one line an arm, as a PNG. ConfigError without matplotlib."""
    figure_of = plotter()
    kinds = ["answer"] + ["first token"] * measured.plan.stream
    figure = figure_of(figsize=(6.5 * len(kinds), 4.5), layout="constrained")
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for arm in measured.plan.arms:
            good = [shot for shot in measured.shots if shot.arm == arm and not shot.error]
            seconds = [shot.seconds if kind == "answer" else shot.first for shot in good]
            times = sorted(each * 1_000 for each in seconds if each is not None)
            shares = [(n + 1) / len(times) for n in range(len(times))]
            label = f"{arm.model}, {arm.via}" + ("" if times else f": {_NO_DATA}")
            axes.step(times, shares, where="post", label=label)
        axes.set(xlabel=f"milliseconds to the {kind}", ylabel="share within", ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, format="png", dpi=120)


def plotter() -> Any:
    """matplotlib's Figure. ConfigError when that is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plot: needs matplotlib: pip install 'semantic-cache-proxy[plot]'."
        ) from None
    return Figure
