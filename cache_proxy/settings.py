"""Settings: defaults < TOML file < environment < flags, read once, never seen by the core.

Each name is one and the same in `cache-proxy.toml`, as `CACHE_PROXY_<NAME>` and as `--name`.
Nothing here opens a socket or a store.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from .errors import ConfigError
from .guards import GUARDS
from .tenancy import is_credential

__all__ = [
    "DeadlineSettings",
    "FallbackSettings",
    "PrioritySettings",
    "ProviderSettings",
    "RetrySettings",
    "Settings",
    "TaskSettings",
    "TrimSettings",
    "load",
    "seconds",
    "variable",
]

_UNITS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}


def seconds(value: object) -> int:
    """`"7d"`, `"90m"`, `"3600"` or a number, as whole seconds."""
    match = re.fullmatch(r"\s*(\d+)\s*([smhdw]?)\s*", str(value))
    if match is None:
        raise ValueError("is a duration such as 30s, 15m, 24h or 7d")
    return int(match[1]) * _UNITS[match[2] or "s"]


def _listed(value: object) -> object:
    """A list, or its spelling with commas in an environment variable."""
    return (
        [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, str)
        else value
    )


Seconds = Annotated[int, BeforeValidator(seconds)]
Names = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_listed)]


Priority = Literal["critical", "normal", "best_effort"]
_PROVIDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}")
_KEY = re.compile(r"sha256:[0-9a-f]{64}|env:\w+")
_RATE = re.compile(r"[1-9]\d{0,8}/[smh]")
_HEADER = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")


def _base_url(value: str) -> str:
    """An address without a trailing slash."""
    parts = urlsplit(value)
    plain = parts.hostname and not parts.query and not parts.username
    if parts.scheme not in ("http", "https") or not plain:
        raise ValueError("is an http or https base URL without a query or a password")
    try:
        named = parts.port != 0
    except ValueError:
        named = False
    if not named:
        raise ValueError("names a port from 1 to 65535, or none")
    return value.rstrip("/")


class _Table(BaseModel):
    """A table of the TOML file: unknown names are mistakes."""

    model_config = {"extra": "forbid", "frozen": True, "hide_input_in_errors": True}


class ProviderSettings(_Table):
    """`[providers.<name>]`: what is left out is taken from the ready-made entry of that name."""

    base_url: str | None = None
    protocol: Literal["openai", "anthropic", "gemini"] | None = None
    api_key_env: str = ""
    """The variable that holds the provider's key; empty passes the client's own credential on."""
    key_header: str | None = None
    """Where the key goes, if not where the protocol has it: `api-key` for Azure."""
    models: Names | None = None
    """Globs of the models that go here."""
    max_connections: Annotated[int, Field(ge=1)] | None = None
    """Unset is the setting of that name."""
    headers: dict[str, SecretStr] = Field(default_factory=dict)
    """Sent with every request."""
    probe: str | None = None
    """As the setting of that name."""
    max_concurrency: Annotated[int, Field(ge=1)] | None = None
    """Requests at a time; the others queue by priority. Unset queues nobody."""
    rate: Annotated[str, Field(pattern=_RATE)] | None = None
    """Most requests in a second, minute or hour: `600/m`."""

    @field_validator("base_url")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return None if value is None else _base_url(value)

    @field_validator("headers")
    @classmethod
    def _headers(cls, value: dict[str, SecretStr]) -> dict[str, SecretStr]:
        for name, secret in value.items():
            text = secret.get_secret_value()
            if not _HEADER.fullmatch(name) or not text.isascii() or not text.isprintable():
                raise ValueError("are names and printable values of HTTP headers")
        return value


class RetrySettings(_Table):
    """`[retry]`."""

    attempts: Annotated[int, Field(ge=1, le=10)] = 3
    """At most, the first included; 1 retries nothing."""
    budget: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Retries as a share of the requests of the last ten seconds, three at least."""


class DeadlineSettings(_Table):
    """`[deadlines]`: unset ones are the client's own time-out, else `upstream_seconds`."""

    total_seconds: Annotated[float, Field(gt=0)] | None = None
    first_byte_seconds: Annotated[float, Field(gt=0)] | None = None
    idle_seconds: Annotated[float, Field(gt=0)] | None = None
    models: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Base seconds by glob of the model; 50 ms for each of `max_tokens` is added."""
    learn: bool = False
    """Tighten the limit of a model from how long its good answers took."""


class FallbackSettings(_Table):
    """`[fallback."<model>"]`: models to ask instead, in order, each as the client would name it."""

    timeout: Names = ()
    error: Names = ()


class TaskSettings(_Table):
    """`[tasks.<name>]`: what `model = "task/<name>"` stands for; the caller's own fields win."""

    model: Annotated[str, Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    priority: Literal["", Priority] = ""
    template: str = ""


class PrioritySettings(_Table):
    """`[priorities.<class>]`; what is left out keeps the class's own value."""

    target_ms: Annotated[int, Field(ge=1)] | None = None
    weight: Annotated[int, Field(ge=1, le=1_000)] | None = None


class TrimSettings(_Table):
    """`[trim]`."""

    enabled: bool = False
    reserve: Annotated[int, Field(gt=0)] = 4_096
    """Tokens kept for the answer of a request that names no `max_tokens`."""
    windows: dict[str, Annotated[int, Field(ge=1)]] = Field(default_factory=dict)
    """Tokens by glob of `model` or `provider/model`, before the packaged context windows."""


def _default_data_dir() -> Path:
    base = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    return Path(base).expanduser() / "cache-proxy"


class Settings(BaseSettings):
    """Every setting, with what happens when it is changed."""

    model_config = SettingsConfigDict(
        env_prefix="CACHE_PROXY_", extra="forbid", frozen=True, validate_default=True
    )

    upstream: str = "https://api.openai.com/v1"
    """Base URL that misses go to; with `providers`, of the models that match none of them."""
    providers: dict[str, ProviderSettings] = Field(default_factory=dict)
    """Named upstreams; a request goes to the first whose patterns match its model."""
    client_tokens: Names = ()
    """What clients must send as their key, as sha256:<hex> or env:<variable>; none asks for none.

    Needed to listen beyond loopback once a provider's key comes from the environment."""
    retry: RetrySettings = RetrySettings()
    """How often upstream is asked again, after failures that may pass."""
    deadlines: DeadlineSettings = DeadlineSettings()
    """How long an answer may take, by model and expected length."""
    fallback: dict[str, FallbackSettings] = Field(default_factory=dict)
    """Models to ask where one fails or is late."""
    stale_if_error: Annotated[Seconds, Field(ge=0, le=366 * 86_400)] = 0
    """How long past its expiry an answer may still be served when upstream fails; 0 never."""
    tasks: dict[str, TaskSettings] = Field(default_factory=dict)
    """Names that stand for a model and its parameters: `task/<name>`."""
    priorities: dict[Priority, PrioritySettings] = Field(default_factory=dict)
    """Latency target and weight in the queue of `critical`, `normal` and `best_effort`."""
    trim: TrimSettings = TrimSettings()
    """Leave out the oldest turns of conversations that the model's window cannot hold."""
    host: str = "127.0.0.1"
    """Address to listen on; anything wider lets other machines spend through this proxy."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8080
    """Port of the proxy; 0 takes a free one."""
    admin_host: str = "127.0.0.1"
    """Address of health, metrics and administration."""
    admin_port: Annotated[int, Field(ge=0, le=65535)] = 8081
    """Port of health, metrics and administration; 0 takes a free one."""
    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that share the port and the store; each holds the model and an index."""
    data_dir: Annotated[Path, Field(validate_default=False)] = Field(
        default_factory=_default_data_dir
    )
    """Where the embedded store, the secret, the admin token and exported models live."""
    redis_url: str = ""
    """A Redis or Valkey 7+ to use; empty starts the embedded Valkey in `data_dir`."""
    key_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,40}$")] = "cache-proxy"
    """First part of every key, so that a shared Redis can tell its users apart."""
    secret: SecretStr | None = None
    """Key of every MAC, 32 characters or more; unset makes one in `data_dir`.

    Sidecars that share a Redis need the same."""

    model: str = "all-MiniLM-L6-v2"
    """The encoder: the packaged one, a folder, a hub name, or `none` for exact hits only."""
    threshold: Annotated[float, Field(ge=0.5, le=1.0)] | None = None
    """Least cosine of a semantic hit; unset is the model's own (0.92 for the packaged one).

    A model that has none only shadows until it is set."""
    ttl: Annotated[Seconds, Field(ge=1, le=366 * 86_400)] = 7 * 86_400
    """How long an answer is kept, counted from its storing."""
    neighbours: Annotated[int, Field(ge=1, le=64)] = 8
    """How many near prompts are judged; more finds hits behind vetoed ones and costs reads."""
    guards_off: Names = ()
    """Guards to switch off, by name."""
    agreement: bool = True
    """Close neighbours that hold another answer stand in the way of a hit; off serves the best."""
    audit_share: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of semantic hits that are asked upstream as well and compared; 0 switches it off."""
    wrong_budget: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Share of wrong semantic hits beyond which the threshold tightens by itself."""
    judge_model: str = ""
    """A model of `upstream` that is asked whether two answers say the same; empty asks none."""
    max_temperature: Annotated[float, Field(ge=0)] = 1.0
    """Requests hotter than this want variety and are passed by."""
    time_bound: Literal["bypass", "cache"] = "bypass"
    """What to do with prompts that speak of today, now or the latest."""
    semantic_with_tools: bool = False
    """Match by meaning although the request declares tools."""
    store_tool_calls: bool = False
    """Keep answers that call tools."""
    question_marker: str = ""
    """In a last user text that has it (say `Question:`), what stands before must be equal and
    what follows may be similar."""
    masks: Names = ()
    """Regular expressions blanked out of system text in the key only, for nonces that change on
    every call."""
    shadow: bool = False
    """Look up and report, but always answer from upstream."""
    shadow_models: Names = ()
    """The same for requests of these models only; `*` stands for anything."""

    tenancy: str = "per-key"
    """Who shares answers: `per-key`, `header:<name>` (the app names its user), or `shared`."""
    tenants: dict[str, Names] = Field(default_factory=dict)
    """One tenant for several keys: name = ["sha256:<hex of the key>", "env:<variable>"]."""
    jwt_tenants: bool = False
    """Issuer, tenant and subject of a JWT are the tenant, instead of the token, which rotates."""
    end_user: Literal["partition", "ignore"] = "partition"
    """Whether `user`, `safety_identifier` and `metadata.user_id` keep answers apart."""
    acceptance: Literal["beside", "strict"] = "beside"
    """When a key was last accepted over 5 minutes ago: probe it beside the hit, or before it."""
    probe: str = ""
    """Path below `upstream` that answers 401 to a bad key and costs nothing; empty takes the
    provider's known one, if there is one."""

    max_entries: Annotated[int, Field(ge=1)] = 200_000
    """Most answers kept; beyond, those that expire soonest go."""
    max_bytes: Annotated[int, Field(ge=1_000_000)] = 1_073_741_824
    """Most bytes of answers kept."""
    max_answer_bytes: Annotated[int, Field(ge=1)] = 2_097_152
    """Answers larger than this are passed on and not kept."""
    max_body_bytes: Annotated[int, Field(ge=1)] = 33_554_432
    """Requests larger than this get 413."""
    body_seconds: Annotated[float, Field(gt=0)] = 30.0
    """A request body slower than this gets 408."""
    cache_ms: Annotated[int, Field(ge=1)] = 150
    """The cache's part of a request; later means a miss."""
    store_ms: Annotated[int, Field(ge=1)] = 50
    """One call to the store; later means the store is in trouble."""
    upstream_seconds: Annotated[float, Field(gt=0)] = 600.0
    """Longest silence of upstream when the client names no time-out of its own."""
    connect_seconds: Annotated[float, Field(gt=0)] = 5.0
    """Longest time to connect to upstream."""
    max_connections: Annotated[int, Field(ge=1)] = 1000
    """Connections to upstream; further requests wait for one."""
    prices: Path | None = None
    """A TOML file of prices that go before the packaged ones."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """`debug` prints one line a request; no level prints prompts or keys."""

    @field_validator("upstream")
    @classmethod
    def _http(cls, value: str) -> str:
        return _base_url(value)

    @field_validator("providers")
    @classmethod
    def _providers(cls, value: dict[str, ProviderSettings]) -> dict[str, ProviderSettings]:
        for name in value:
            if not _PROVIDER.fullmatch(name) or name in ("upstream", "task"):
                raise ValueError("are named by letters, digits, - and _, and not upstream or task")
        return value

    @field_validator("client_tokens")
    @classmethod
    def _client_tokens(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(_KEY.fullmatch(token) for token in value):
            raise ValueError("lists tokens as sha256:<hex> or env:<variable>")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: str) -> str:
        if value and urlsplit(value).scheme not in ("redis", "rediss", "unix"):
            raise ValueError("starts with redis://, rediss:// or unix://")
        return value

    @field_validator("guards_off")
    @classmethod
    def _known_guards(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := sorted(set(value) - set(GUARDS)):
            raise ValueError(f"knows no guard {unknown[0]!r}; there are {', '.join(GUARDS)}")
        return value

    @field_validator("tenancy")
    @classmethod
    def _tenancy(cls, value: str) -> str:
        if value not in ("per-key", "shared") and not re.fullmatch(r"header:[A-Za-z0-9-]+", value):
            raise ValueError("is per-key, shared or header:<name>")
        return value

    @field_validator("tenants")
    @classmethod
    def _tenants(cls, value: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for key in (key for keys in value.values() for key in keys):
            if not _KEY.fullmatch(key):
                raise ValueError("lists keys as sha256:<hex> or env:<variable>")
        return value

    @field_validator("masks")
    @classmethod
    def _masks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error:
                raise ValueError("holds something that is no regular expression") from None
        return value

    @field_validator("secret")
    @classmethod
    def _secret(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and len(value.get_secret_value()) < 32:
            raise ValueError("has at least 32 characters")
        return value

    @field_validator("data_dir")
    @classmethod
    def _expanded(cls, value: Path) -> Path:
        return value.expanduser().absolute()

    @model_validator(mode="after")
    def _guarded(self) -> Settings:
        keyed = any(
            table.api_key_env or any(is_credential(name.lower().encode()) for name in table.headers)
            for table in self.providers.values()
        )
        if self.jwt_tenants and (keyed or self.client_tokens):
            raise ValueError(
                "jwt_tenants: where a key of ours or client_tokens stand in, upstream does not see "
                "the client's token, so nobody would check it; use tenancy header:<name>"
            )
        if not self.client_tokens and not _is_loopback(self.host) and keyed:
            raise ValueError(
                "client_tokens: a provider's key is configured here, so whoever reaches "
                f"{self.host} could spend it; list client_tokens, or listen on loopback only"
            )
        return self

    def provider_keys(self) -> dict[str, str]:
        """Provider name to its key, of those whose key comes from the environment.

        Raises ConfigError that names the variable which is not set.
        """
        keys = {}
        for name, table in self.providers.items():
            if table.api_key_env:
                keys[name] = variable(f"providers.{name}.api_key_env", table.api_key_env)
        return keys

    def client_token_digests(self) -> frozenset[str]:
        """SHA-256 of each client token, in hex. Raises ConfigError as `provider_keys` does."""
        digests = set()
        for token in self.client_tokens:
            kind, _, value = token.partition(":")
            if kind == "env":
                value = hashlib.sha256(variable("client_tokens", value).encode()).hexdigest()
            digests.add(value)
        return frozenset(digests)

    def tenant_names(self) -> dict[str, str]:
        """SHA-256 of a key, in hex, to the tenant that it belongs to."""
        names: dict[str, str] = {}
        for name, keys in self.tenants.items():
            for key in keys:
                kind, _, value = key.partition(":")
                if kind == "sha256":
                    names[value] = name
                elif found := os.environ.get(value):
                    names[hashlib.sha256(found.encode()).hexdigest()] = name
        return names


def load(config: Path | None = None, **flags: object) -> Settings:
    """Settings from all four places; flags that are None were not given.

    `config` unset takes `cache-proxy.toml` in the working directory when there is one.
    Raises ConfigError with one sentence that names the setting.
    """
    path = config or Path(os.environ.get("CACHE_PROXY_CONFIG") or "cache-proxy.toml")
    required = config is not None or "CACHE_PROXY_CONFIG" in os.environ
    named = {name.upper() for name in os.environ}
    # What is handed over goes before the environment, so the file steps back where that speaks.
    values = {
        name: value
        for name, value in _toml(path, required).items()
        if f"CACHE_PROXY_{name.upper()}" not in named
    }
    values |= {name: value for name, value in flags.items() if value is not None}
    try:
        return Settings(**values)
    except ValidationError as exc:
        raise ConfigError(_sentence(exc)) from None
    except SettingsError as exc:
        raise ConfigError(f"environment: {exc}.") from None


def variable(setting: str, name: str, *, needed: bool = True) -> str:
    """A key from the environment, fit for a header; "" for one that is not set nor `needed`."""
    value = os.environ.get(name, "").strip()
    if not value and not needed:
        return ""
    if not value:
        raise ConfigError(f"{setting}: the variable {name} is not set.")
    if not value.isascii() or not value.isprintable():
        raise ConfigError(f"{setting}: the variable {name} holds something that is no key.")
    return value


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _toml(path: Path, required: bool) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if required:
            raise ConfigError(f"config: there is no file {path}.") from None
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as exc:
        raise ConfigError(f"config: {path} cannot be read as TOML: {exc}.") from None


_TABLES = frozenset({"providers", "retry", "deadlines", "fallback", "tasks", "priorities", "trim"})


def _sentence(exc: ValidationError) -> str:
    """The first complaint, as `name message.`; the value itself may be a secret and stays out."""
    first = exc.errors(include_input=False, include_url=False)[0]
    where = [str(part) for part in first["loc"] if part != "[key]"]
    if not where and first["type"] == "value_error":
        return first["msg"].removeprefix("Value error, ") + "."  # it names the setting itself
    name = ".".join(where[: 3 if where[0] in _TABLES else 1]) if where else "settings"
    if first["type"] == "extra_forbidden":
        return f"{name}: there is no such setting."
    message = first["msg"].removeprefix("Value error, ")
    return f"{name}: {message[0].lower()}{message[1:]}."
