"""Who answers when a model cannot: chains of other models, by what went wrong.

Plain values and functions; the asking is done elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..canonical import dump
from ..errors import BadRequest
from .providers import Route, Router
from .routes import Headers

__all__ = ["Chain", "Trouble", "chain_for", "instead", "trouble"]

Trouble = Literal["timeout", "error"]


@dataclass(frozen=True, slots=True)
class Chain:
    """Models to ask instead, in this order, as a client would name them."""

    timeout: tuple[str, ...] = ()  # faster ones
    error: tuple[str, ...] = ()  # cheaper ones

    def after(self, what: Trouble) -> tuple[str, ...]:
        return self.timeout if what == "timeout" else self.error


def chain_for(route: Route, chains: Mapping[str, Chain]) -> Chain | None:
    """The chain of the model that a request was routed to, as `provider/model` or by bare name.

    Embeddings have none: the vectors of two models mean nothing to each other.
    """
    if not chains or route.path.endswith(b"/embeddings"):
        return None
    return chains.get(f"{route.provider.name}/{route.model}") or chains.get(route.model)


def trouble(status: int) -> Trouble | None:
    """What is wrong with an answer of this status; None when it is the model's own word, such as a
    refusal of the request or of the credential, which another model must not overrule."""
    if status in (408, 504):
        return "timeout"
    return "error" if status == 429 or status >= 500 else None


def instead(
    router: Router, asked: Route, headers: Headers, document: Mapping[str, Any], name: str
) -> Route | None:
    """Where the same request goes for another model; None when nobody of its protocol takes it.

    The client's credential was meant for the provider it asked: another one gets a key of ours, or
    none.
    """
    try:
        route, sent = router.route(asked.path, headers, {**document, "model": name})
    except BadRequest:
        return None
    provider = route.provider
    if provider.name != asked.provider.name and provider.judges:
        provider = replace(provider, judges=False)
    return replace(route, provider=provider, body=dump(sent), priority=asked.priority)
