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
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from embeddings import Encoder, EncoderError, Index, Worker, load, self_test
from embeddings.background import background, rests_on

from .acceptance import Acceptance
from .admin import admin_app
from .app import App
from .audit import Auditor
from .dial import Dial
from .errors import ConfigError, MemoryUnavailable
from .explain import Explainer, Partitions
from .flights import Flights
from .judge import Judge
from .ledger import Ledger
from .memory import Memory
from .model import Outcome, Policy
from .piecewise import Piecewise
from .pricing import Override, PriceBook, parse_prices, shipped_prices
from .proxy import Parts, Proxy
from .reading import Reader
from .settings import Settings
from .stats import collect
from .store import Store
from .tally import labels
from .tenancy import Tenancy
from .upstream.client import Upstream
from .upstream.routes import probe_path

__all__ = ["Sidecar", "file_secret", "open_encoder", "open_store", "sidecar"]

log = structlog.get_logger("cache_proxy")

_NO_ENCODER = bytes(8)
# The embedded store's books, buffers and fragmentation, on top of the values that are capped.
_STORE_OVERHEAD = 1.5
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


def file_secret(folder: Path, name: str) -> str:
    """64 hex characters kept in `folder/name` (mode 600), made at first use."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_text("ascii").strip()
    with os.fdopen(handle, "w") as file:
        value = secrets.token_hex(32)
        file.write(value)
    return value


def store_secret(settings: Settings) -> bytes:
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()[:64]
    return file_secret(settings.data_dir, "secret").encode()


def store_memory(settings: Settings) -> int:
    """Bytes of memory for an embedded store that holds `max_bytes` of answers."""
    return int(settings.max_bytes * _STORE_OVERHEAD) + 64 * 1024 * 1024


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


def open_store(settings: Settings, url: str, *, fingerprint: bytes = _NO_ENCODER) -> Store:
    def turned(state: str) -> None:
        log.info("store", state=state)

    return Store(
        url,
        secret=store_secret(settings),
        fingerprint=fingerprint,
        prefix=settings.key_prefix,
        deadline_seconds=settings.store_ms / 1_000,
        max_entries=settings.max_entries,
        max_bytes=settings.max_bytes,
        longest_ttl_seconds=settings.ttl,
        on_state=turned,
    )


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


@asynccontextmanager
async def sidecar(
    settings: Settings, store_url: str, encoder: Encoder | None
) -> AsyncIterator[Sidecar]:
    """Everything built, running in the background, and closed again at the end."""
    fingerprint = bytes.fromhex(encoder.fingerprint) if encoder else _NO_ENCODER
    store = open_store(settings, store_url, fingerprint=fingerprint)
    worker = Worker(encoder, Index(encoder.dimension)) if encoder else None
    prices = PriceBook(overrides=_overrides(settings), clock=time.time)
    ledger = Ledger(
        process=secrets.token_hex(6), clock=time.time, prices=prices, encoder=_labels_of(encoder)
    )
    upstream = Upstream(
        max_connections=settings.max_connections, connect_seconds=settings.connect_seconds
    )
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
            base_url=settings.upstream,
            fingerprint=fingerprint,
            ignore_end_user=settings.end_user == "ignore",
            masks=tuple(re.compile(mask) for mask in settings.masks),
            question_marker=settings.question_marker,
        ),
        memory=memory,
        acceptance=Acceptance(
            store=store,
            upstream=upstream,
            probe_url=probe_path(settings.upstream, settings.probe),
            strict=settings.acceptance == "strict",
            clock=time.time,
        ),
        upstream=upstream,
        base_url=settings.upstream,
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
            upstream=upstream,
            base_url=settings.upstream,
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
        upstream=upstream,
        base_url=settings.upstream,
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
        await upstream.close()
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


def _overrides(settings: Settings) -> Sequence[Override]:
    if settings.prices is None:
        return shipped_prices()
    try:
        return [*parse_prices(settings.prices.read_text("utf-8")), *shipped_prices()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"prices: {settings.prices} cannot be read.") from exc


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
