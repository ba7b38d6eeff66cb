"""What `serve` and the other commands open alike: the store, its secret, the prices.

Imports neither the encoder nor a server, so that a command is there at once.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from .embedded import EmbeddedValkey
from .errors import ConfigError
from .pricing import Override, parse_prices, shipped_prices
from .settings import Settings
from .store import Store

__all__ = [
    "NO_ENCODER",
    "embedded_store",
    "file_secret",
    "open_store",
    "price_overrides",
    "store_secret",
]

log = structlog.get_logger("cache_proxy")

NO_ENCODER = bytes(8)
# The embedded store's books, buffers and fragmentation, on top of the values that are capped.
_STORE_OVERHEAD = 1.5
_SHORTEST_SECRET = 32


def file_secret(folder: Path, name: str) -> str:
    """64 hex characters kept in `folder/name` (mode 600), made at first use."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        # Whole before it has its name: a full disk or another process must not find half of it.
        fresh = folder / f".{name}.{secrets.token_hex(8)}"
        handle = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(secrets.token_hex(32))
            with suppress(FileExistsError):  # another process was quicker
                os.link(fresh, path)
        finally:
            fresh.unlink()
    value = path.read_text("ascii").strip()
    if len(value) < _SHORTEST_SECRET:
        raise ConfigError(f"data_dir: {path} holds no whole secret; remove it.")
    return value


def store_secret(settings: Settings) -> bytes:
    if settings.secret is not None:
        return settings.secret.get_secret_value().encode()[:64]
    return file_secret(settings.data_dir, "secret").encode()


def _store_memory(settings: Settings) -> int:
    """Bytes of memory for an embedded store that holds `max_bytes` of answers."""
    return int(settings.max_bytes * _STORE_OVERHEAD) + 64 * 1024 * 1024


@contextmanager
def embedded_store(settings: Settings) -> Iterator[tuple[str, EmbeddedValkey | None]]:
    """The store's URL, and the embedded Valkey that answers there if `redis_url` is not set."""
    if settings.redis_url:
        yield settings.redis_url, None
        return
    valkey = EmbeddedValkey(settings.data_dir / "valkey", _store_memory(settings))
    try:
        yield valkey.start(), valkey
    finally:
        valkey.stop()


def open_store(settings: Settings, url: str, *, fingerprint: bytes = NO_ENCODER) -> Store:
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
        stale_seconds=settings.stale_if_error,
        on_state=turned,
    )


def price_overrides(settings: Settings) -> Sequence[Override]:
    if settings.prices is None:
        return shipped_prices()
    try:
        return [*parse_prices(settings.prices.read_text("utf-8")), *shipped_prices()]
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"prices: {settings.prices} cannot be read.") from exc
