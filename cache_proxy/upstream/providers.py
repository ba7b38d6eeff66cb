"""Who a request goes to: named providers, and the choice among them by path and by model.

Pure. Addresses and keys come from configuration only; a request chooses among them and adds none.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any
from urllib.parse import quote, unquote

from .. import canonical
from ..errors import NoRoute
from ..tenancy import is_credential
from .fair_queue import class_of
from .routes import Headers, keyless_query, protocol, target
from .tasks import Tasks, asks, written
from .trim import Trimmer

__all__ = ["Provider", "Route", "Router", "ready_made", "single"]

Document = dict[str, Any]

_KEY_HEADERS = {"anthropic": "x-api-key", "gemini": "x-goog-api-key"}
# `/deepseek/v1/chat/completions`: the first segment names the provider, the rest is its path.
_PREFIXED = re.compile(rb"/([A-Za-z0-9_-]+)(/(?:v\d[^/]*|openai)(?:/.*)?)")
_MODEL_IN_PATH = re.compile(rb"/models/(?P<m>.+?)(?::\w+)?$|/deployments/(?P<d>[^/]+)/")


@dataclass(frozen=True, slots=True)
class Provider:
    """One upstream. The only one that no table names is called "", and speaks any protocol."""

    name: str
    base_url: str
    protocol: str = ""  # "openai", "anthropic" or "gemini"; "" takes all of them
    key: str = field(default="", repr=False)  # our own; "" where the client's is passed on
    key_header: str = ""  # "" is the protocol's own
    judges: bool = True  # it gets, and so judges, the client's own credential
    models: tuple[str, ...] = ()  # globs
    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), repr=False)
    probe: str = ""  # full URL of the free question that shows whether a client's key still counts
    max_connections: int = 1_000
    max_concurrency: int | None = None
    rate: float | None = None  # calls a second

    @property
    def limited(self) -> bool:
        """Whether requests may have to queue for it."""
        return self.max_concurrency is not None or self.rate is not None

    def speaks(self, wanted: str) -> bool:
        return self.protocol in ("", wanted)

    def serves(self, model: str, *, addressed: bool = False) -> bool:
        """Whether one of its patterns names this model.

        Of an `addressed` one, which looks like `provider/model`, only patterns with a slash of
        their own are asked: `gemini-*` says nothing of `gemini-openai/gemini-2.5-pro`.
        """
        return any(
            fnmatchcase(model.lower(), glob.lower())
            for glob in self.models
            if not addressed or "/" in glob
        )

    def url(self, path: bytes, query: bytes) -> str:
        """Where a request with this path and query goes."""
        return target(self.base_url, path, query if self.judges else keyless_query(query))

    def outgoing(self, headers: Headers) -> Headers:
        """The client's headers as this provider gets them: with its own key, if it has one."""
        if self.judges and not self.headers:
            return headers
        own = {name for name, _ in self.headers}
        kept = [
            (name, value)
            for name, value in headers
            if name not in own and (self.judges or not (is_credential(name) or name == b"cookie"))
        ]
        return [*kept, *self.headers, *self._credential()]

    def _credential(self) -> Headers:
        if not self.key:
            return []
        name = self.key_header or _KEY_HEADERS.get(self.protocol, "authorization")
        value = f"Bearer {self.key}" if name == "authorization" else self.key
        return [(name.encode(), value.encode())]


@dataclass(frozen=True, slots=True)
class Route:
    """What would be sent, and to whom."""

    provider: Provider
    protocol: str
    model: str  # as the provider knows it; "" when the request names none
    path: bytes
    body: bytes | None = None  # None: as it came
    priority: str = ""
    trimmed: tuple[int, int] = (0, 0)  # messages and tokens left out


class Router:
    """The configured providers, in the order of the file; `default` takes what matches no pattern.

    Without a `default` that is the first provider without patterns, else the first of all.
    `classed`: every request has a priority class, whoever it goes to.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        default: Provider | None = None,
        *,
        tasks: Tasks | None = None,
        trimmer: Trimmer | None = None,
        classed: bool = False,
    ) -> None:
        self.providers = (*providers, default) if default is not None else tuple(providers)
        self._default = default
        self._tasks = tasks
        self._trimmer = trimmer
        self._classed = classed
        self._names = {provider.name: provider for provider in self.providers if provider.name}

    def route(
        self, path: bytes, headers: Headers, document: Document | None
    ) -> tuple[Route, Document | None]:
        """Where a request goes, and its body's document as it is to be sent.

        `document` None is a body that is no JSON, or is not read: it goes by its path alone.
        Raises BadRequest, of which NoRoute is one.
        """
        task, sent = None, document
        if document is not None and self._tasks is not None:
            task = self._tasks.named(_text(document.get("model")))
            sent = document if task is None else written(task, document, path)
        route, sent = self._routed(path, headers, sent)
        trimmed = (0, 0)
        if (
            sent is not None
            and self._trimmer is not None
            and route.path.endswith(b"/chat/completions")
        ):
            sent, trimmed = self._trimmer.fit(sent, route.provider.name, route.model)
        if priority := self._class(headers, route.provider, task.priority if task else ""):
            route = replace(route, priority=priority)
        if sent is None or sent is document:
            return route, document
        return replace(route, body=canonical.dump(sent), trimmed=trimmed), sent

    def _class(self, headers: Headers, provider: Provider, of_task: str) -> str:
        """The priority class: the client's word, else its task's, else normal where it matters."""
        for name, value in headers:
            if name == b"x-priority":
                return class_of(value)
        return of_task or ("normal" if self._classed or provider.limited else "")

    def _routed(
        self, path: bytes, headers: Headers, document: Document | None
    ) -> tuple[Route, Document | None]:
        """By path and model alone; the document under the model's bare name."""
        pinned, path = self._pinned(path)
        spoken = protocol(path, headers)
        named = _text(document.get("model")) if document is not None else ""
        model = named or _model_in(path)[1]
        if pinned is not None:
            if not pinned.speaks(spoken):
                raise NoRoute(f"The provider {pinned.name} does not speak this protocol.")
            return Route(pinned, spoken, model, path), document
        provider, bare = self._choice(spoken, model)
        if bare == model:
            return Route(provider, spoken, model, path), document
        if document is None or not named:
            before, _, after = _model_in(path)
            path = before + quote(bare, safe="/:@").encode() + after
            return Route(provider, spoken, bare, path), document
        sent = {**document, "model": bare}
        return Route(provider, spoken, bare, path), sent

    def by_model(self, path: bytes, headers: Headers) -> bool:
        """Whether the model has a say in where a request of this path goes."""
        pinned, path = self._pinned(path)
        return pinned is None and len(self._speaking(protocol(path, headers))) > 1

    def by_body(self, path: bytes, headers: Headers) -> bool:
        """Whether a request of this path must be read to know what would be sent."""
        return self.by_model(path, headers) or (self._tasks is not None and asks(path))

    def listing(self, path: bytes, headers: Headers) -> Sequence[Provider]:
        """Those whose models a request for the list of all of them is about."""
        pinned, path = self._pinned(path)
        return self._speaking(protocol(path, headers)) if pinned is None else (pinned,)

    def told(self, provider: Provider, model: str) -> str:
        """The name under which a client reaches this model of this provider."""
        chosen, bare = self._choice(provider.protocol or "openai", model)
        return model if chosen is provider and bare == model else f"{provider.name}/{model}"

    def _choice(self, spoken: str, model: str) -> tuple[Provider, str]:
        """By pattern, then by prefix, then whoever takes the rest; and the model's bare name."""
        speaking = self._speaking(spoken)
        if not speaking:
            raise NoRoute(
                f"No configured provider speaks the {spoken} protocol.", code="no_provider"
            )
        prefix, slash, bare = model.partition("/")
        addressed = bool(slash) and prefix in self._names
        for provider in speaking:
            if model and provider.serves(model, addressed=addressed):
                return provider, model
        if addressed:
            provider = self._names[prefix]
            if not provider.speaks(spoken):
                raise NoRoute(f"The provider {prefix} does not speak the {spoken} protocol.")
            return provider, bare
        if self._default is not None and self._default.speaks(spoken):
            return self._default, model
        return next((p for p in speaking if not p.models), speaking[0]), model

    def _pinned(self, path: bytes) -> tuple[Provider | None, bytes]:
        """The provider that the path names, and the path without it."""
        if self._names and (match := _PREFIXED.fullmatch(path)):
            provider = self._names.get(match[1].decode())
            if provider is not None:
                return provider, match[2]
        return None, path

    def _speaking(self, spoken: str) -> Sequence[Provider]:
        return [provider for provider in self.providers if provider.speaks(spoken)]


def single(base_url: str) -> Router:
    """Everything goes to one upstream."""
    return Router([Provider("", base_url)])


def ready_made() -> dict[str, dict[str, Any]]:
    """The packaged entries by name, as they stand in `providers.toml`."""
    return tomllib.loads(files(__package__).joinpath("providers.toml").read_text("utf-8"))


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _model_in(path: bytes) -> tuple[bytes, str, bytes]:
    """A path as what stands before the model that it names, the model, and what follows it."""
    match = _MODEL_IN_PATH.search(path)
    if match is None:
        return path, "", b""
    start, end = match.span("m" if match["m"] else "d")
    return path[:start], unquote(path[start:end].decode("latin-1")), path[end:]
