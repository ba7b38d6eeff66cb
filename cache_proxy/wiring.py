"""All wiring in one place: settings in, a finished sidecar out.

Builds and closes; handles no request.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog

from embeddings import Encoder, EncoderError, Index, Worker, load, self_test
from embeddings.background import background, rests_on

from . import tokens
from .acceptance import Acceptance
from .admin import admin_app
from .app import App
from .audit import Auditor
from .clients import ClientTokens
from .dial import Dial
from .errors import ConfigError, MemoryUnavailable
from .explain import Explainer, Partitions
from .flights import Flights
from .judge import Judge
from .ledger import Ledger
from .memory import Memory
from .model import Attempt, Outcome, Policy
from .opening import NO_ENCODER, file_secret, open_store, price_overrides, store_secret
from .piecewise import Piecewise
from .pricing import PriceBook
from .proxy import Parts, Proxy
from .reading import Reader
from .settings import Settings
from .stats import collect
from .store import Store
from .tally import labels
from .tenancy import Tenancy, is_credential
from .upstream.attempts import Attempts
from .upstream.client import Upstream
from .upstream.deadlines import Deadlines, Learnt
from .upstream.fair_queue import CLASSES, PriorityClass
from .upstream.fallback import Chain
from .upstream.providers import Provider, Route, Router, ready_made
from .upstream.relay import Relay
from .upstream.retry import Retrying
from .upstream.routes import probe_path
from .upstream.tasks import Task, Tasks
from .upstream.trim import Trimmer, shipped_windows
from .upstream.turnstile import Turnstile

__all__ = ["Sidecar", "open_encoder", "router", "sidecar"]

log = structlog.get_logger("cache_proxy")

_DRAIN_SECONDS = 2.0
# How far back audits count towards the threshold in force.
_AUDITS_SECONDS = 30 * 86_400
_LABELS_SECONDS = 600.0


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A running sidecar's two applications."""

    app: App
    admin: Callable[..., Awaitable[None]]
    memory: Memory
    ledger: Ledger
    policy: Policy


def open_encoder(settings: Settings) -> Encoder | None:
    """The encoder, tried on known pairs; None for exact hits only. Raises ConfigError."""
    if settings.model == "none":
        return None
    try:
        encoder = load(settings.model, settings.data_dir)
        self_test(encoder)
    except EncoderError as exc:
        raise ConfigError(str(exc)) from exc
    return encoder


def policy(settings: Settings, encoder: Encoder | None) -> Policy:
    """The part of the settings that the decisions may know."""
    threshold = settings.threshold or (encoder.threshold if encoder else None)
    reported = background(encoder) if encoder is not None and threshold is None else 1.0
    return Policy(
        threshold=threshold or reported,
        ttl_seconds=settings.ttl,
        max_temperature=settings.max_temperature,
        neighbours=settings.neighbours,
        guards_off=frozenset(settings.guards_off),
        agreement=settings.agreement,
        bypass_time_bound=settings.time_bound == "bypass",
        semantic_with_tools=settings.semantic_with_tools,
        store_tool_calls=settings.store_tool_calls,
        max_answer_bytes=settings.max_answer_bytes,
        languages=encoder.languages if encoder else None,
        shadow=settings.shadow,
        shadow_models=tuple(settings.shadow_models),
        semantic_shadow=encoder is not None and threshold is None,
    )


def router(settings: Settings) -> Router:
    """The providers of the settings, filled up from the ready-made ones. Raises ConfigError.

    `upstream` counts beside named ones only where it is set.
    """
    known, keys = ready_made(), settings.provider_keys()
    providers = [
        _provider(name, settings, known.get(name, {}), keys.get(name, ""))
        for name in settings.providers
    ]
    tasks = {name: Task(**table.model_dump()) for name, table in settings.tasks.items()}
    windows = [*settings.trim.windows.items(), *shipped_windows()]
    built = partial(
        Router,
        providers,
        tasks=Tasks(tasks) if tasks else None,
        trimmer=Trimmer(windows, settings.trim.reserve) if settings.trim.enabled else None,
        classed=bool(settings.priorities),
    )
    if providers and "upstream" not in settings.model_fields_set:
        return built()
    upstream = Provider(
        name="upstream" if providers else "",
        base_url=settings.upstream,
        judges=not settings.client_tokens,
        probe=probe_path(settings.upstream, settings.probe),
        max_connections=settings.max_connections,
    )
    return built(upstream)


def _provider(name: str, settings: Settings, entry: Mapping[str, Any], key: str) -> Provider:
    """One table; what it leaves out is `entry`'s."""
    table = settings.providers[name]
    base_url = table.base_url or entry.get("base_url")
    if not base_url:
        raise ConfigError(
            f"providers.{name}.base_url: is needed; none is ready-made for this name."
        )
    models = entry.get("models", ()) if table.models is None else table.models
    ours = bool(key) or any(is_credential(header.lower().encode()) for header in table.headers)
    return Provider(
        name=name,
        base_url=base_url,
        protocol=table.protocol or entry.get("protocol", "openai"),
        key=key,
        key_header=(table.key_header or entry.get("key_header", "")).lower(),
        judges=not ours and not settings.client_tokens,
        models=tuple(models),
        headers=tuple(
            (header.lower().encode(), value.get_secret_value().encode())
            for header, value in table.headers.items()
        ),
        probe=probe_path(base_url, table.probe or ""),
        max_connections=table.max_connections or settings.max_connections,
        max_concurrency=table.max_concurrency,
        rate=None if table.rate is None else _per_second(table.rate),
    )


def priority_classes(settings: Settings) -> dict[str, PriorityClass]:
    """The three classes, with what the settings say of them."""
    found = dict(CLASSES)
    for name, table in settings.priorities.items():
        found[name] = replace(found[name], **table.model_dump(exclude_none=True))
    return found


def _per_second(rate: str) -> float:
    """`600/m` as calls a second."""
    count, _, unit = rate.partition("/")
    return int(count) / {"s": 1, "m": 60, "h": 3_600}[unit]


def deadlines(settings: Settings) -> Deadlines:
    """What is learnt needs a bound to tighten: the one that holds unset."""
    table = settings.deadlines
    total = table.total_seconds or (settings.upstream_seconds if table.learn else None)
    return Deadlines(
        total=total,
        first_byte=table.first_byte_seconds,
        idle=table.idle_seconds,
        models=tuple(table.models.items()),
        otherwise=settings.upstream_seconds,
    )


def _relay(
    settings: Settings, routes: Router, ledger: Ledger, classes: Mapping[str, PriorityClass]
) -> Relay:
    monotonic = asyncio.get_running_loop().time
    pools = {
        provider.name: Upstream(
            max_connections=provider.max_connections,
            connect_seconds=settings.connect_seconds,
        )
        for provider in routes.providers
    }

    def count(why: Attempt, route: Route) -> None:
        ledger.record_attempt(why, provider=route.provider.name, model=route.model)

    attempts = Attempts(
        pools=pools,
        turnstiles={
            provider.name: Turnstile(
                concurrency=provider.max_concurrency,
                per_second=provider.rate,
                classes=classes,
                now=monotonic,
            )
            for provider in routes.providers
            if provider.limited
        },
        count=count,
        retrying=Retrying(settings.retry.attempts, settings.retry.budget),
        learnt=Learnt() if settings.deadlines.learn else None,
        now=monotonic,
        clock=time.time,
        sleep=asyncio.sleep,
        dice=random.random,
    )
    return Relay(
        attempts=attempts,
        pools=pools,
        count=count,
        deadlines=deadlines(settings),
        chains={
            model: Chain(table.timeout, table.error) for model, table in settings.fallback.items()
        },
        router=routes,
        now=monotonic,
    )


@asynccontextmanager
async def sidecar(
    settings: Settings, store_url: str, encoder: Encoder | None
) -> AsyncIterator[Sidecar]:
    """Everything built, running in the background, and closed again at the end."""
    routes = router(settings)
    clients = ClientTokens(settings.client_token_digests())
    fingerprint = bytes.fromhex(encoder.fingerprint) if encoder else NO_ENCODER
    store = open_store(settings, store_url, fingerprint=fingerprint)
    worker = Worker(encoder, Index(encoder.dimension)) if encoder else None
    prices = PriceBook(overrides=price_overrides(settings), clock=time.time)
    classes = priority_classes(settings)
    ledger = Ledger(
        process=secrets.token_hex(6),
        clock=time.time,
        prices=prices,
        encoder=_labels_of(encoder),
        classes=classes,
    )
    relay = _relay(settings, routes, ledger, classes)
    memory = Memory(
        store=store,
        worker=worker,
        deadline_seconds=settings.cache_ms / 1_000,
        lens=encoder.lens if encoder else None,
        note_unstored=ledger.record_unstored,
    )
    secret = store_secret(settings)
    now = asyncio.get_running_loop().time
    record = _logged(ledger.record) if settings.log_level == "debug" else ledger.record
    chosen = policy(settings, encoder)
    basis = "your setting" if settings.threshold else rests_on(encoder) if encoder else "no encoder"
    if chosen.semantic_shadow and encoder:
        log.warning(
            "similar prompts are only looked up and counted, not served",
            model=encoder.name,
            threshold=chosen.threshold,
            rests_on=basis,
            change="set threshold; cache-proxy tune finds one on your own pairs",
        )
    dial = Dial(chosen.threshold, settings.wrong_budget)
    await _relearn(dial, store, _labels_of(encoder))
    parts = Parts(
        policy=chosen,
        dial=dial,
        partitions=Partitions(secret),
        reader=Reader(
            tenancy=Tenancy(
                secret, settings.tenancy, settings.tenant_names(), settings.jwt_tenants
            ),
            router=routes,
            fingerprint=fingerprint,
            ignore_end_user=settings.end_user == "ignore",
            masks=tuple(re.compile(mask) for mask in settings.masks),
            question_marker=settings.question_marker,
        ),
        memory=memory,
        acceptance=Acceptance(
            store=store,
            relay=relay,
            strict=settings.acceptance == "strict",
            clock=time.time,
        ),
        relay=relay,
        flights=Flights(hold_bytes=settings.max_answer_bytes * 2),
        record=record,
        prices=prices,
        fingerprint=fingerprint,
        secret=secret,
        read_seconds=settings.upstream_seconds,
        clock=time.time,
        now=now,
        new_id=lambda: os.urandom(16).hex(),
    )
    proxy = Proxy(parts)
    proxy.auditor = auditor = Auditor(
        ask=proxy.ask,
        memory=memory,
        ledger=ledger,
        dial=dial,
        share=settings.audit_share,
        dice=random.random,
        judge=Judge(
            model=settings.judge_model,
            relay=relay,
            router=routes,
            ledger=ledger,
            prices=prices,
        )
        if settings.judge_model
        else None,
    )
    explainer = Explainer(
        reader=parts.reader,
        memory=memory,
        acceptance=parts.acceptance,
        policy=proxy.policy,
        rests_on=lambda model: (
            f"wrong hits, which raised it from {dial.configured:.3f}"
            if dial.threshold(model) > dial.configured
            else basis
        ),
        partitions=parts.partitions,
        clock=time.time,
        now=now,
    )
    app = App(
        handlers={
            "chat": proxy.handle,
            "completions": proxy.handle,
            "embeddings": Piecewise(proxy).handle,
        },
        relay=relay,
        router=routes,
        clients=clients,
        record=record,
        max_body_bytes=settings.max_body_bytes,
        body_seconds=settings.body_seconds,
        read_seconds=settings.upstream_seconds,
        now=now,
    )
    admin = admin_app(
        token=file_secret(settings.data_dir, "admin.token"),
        memory=memory,
        ledger=ledger,
        auditor=auditor,
        explainer=explainer,
        clock=time.time,
    )
    await asyncio.to_thread(prices.warm)  # half a second of imports that no request should pay
    if settings.trim.enabled:
        await asyncio.to_thread(tokens.warm)
    if worker is not None:
        worker.start()
    tasks = [
        asyncio.create_task(memory.run()),
        asyncio.create_task(ledger.run(store)),
        asyncio.create_task(_follow_labels(dial, ledger, store, _labels_of(encoder))),
    ]
    try:
        yield Sidecar(app, admin, memory, ledger, chosen)
    finally:
        await memory.settle(_DRAIN_SECONDS)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await ledger.flush(store)
        except MemoryUnavailable:
            log.warning("counters", lost="the last second: the store does not answer")
        await relay.close()
        await store.close()
        if worker is not None:
            worker.close(_DRAIN_SECONDS)


def _labels_of(encoder: Encoder | None) -> str:
    """Scores of one encoder say nothing about another's: the name that labels are kept under."""
    return encoder.fingerprint[:8] if encoder else "none"


async def _relearn(dial: Dial, store: Store, encoder: str) -> None:
    """Take what audits and reports found of late, in all processes; as it was when the store does
    not say."""
    now = time.time()
    try:
        report = await collect(store, now - _AUDITS_SECONDS, now, "model")
    except MemoryUnavailable:
        return
    found = {
        model: labels(tally, "audit", "report", encoder=encoder)
        for model, tally in report.groups.items()
    }
    before = dial.tightened
    dial.relearn({model: pool for model, pool in found.items() if pool.right or pool.wrong})
    for model, threshold in dial.tightened.items():
        if before.get(model) != threshold:
            log.warning("threshold", model=model, now=threshold, why="wrong hits found earlier")


async def _follow_labels(dial: Dial, ledger: Ledger, store: Store, encoder: str) -> None:
    """Keep up with the labels of other processes, and let old ones go, until cancelled."""
    while True:
        await asyncio.sleep(_LABELS_SECONDS)
        try:
            await ledger.flush(store)  # or this process's latest would be forgotten
        except MemoryUnavailable:
            continue
        await _relearn(dial, store, encoder)


def _logged(record: Callable[[Outcome], None]) -> Callable[[Outcome], None]:
    """One line a request, of what the outcome says; never a prompt, never a key."""

    def both(outcome: Outcome) -> None:
        record(outcome)
        log.debug(
            "request",
            kind=outcome.kind,
            tier=outcome.tier,
            reason=outcome.reason,
            status=outcome.status,
            model=outcome.model[:80],
            similarity=outcome.similarity,
            ms=round(outcome.ms, 2),
        )

    return both
