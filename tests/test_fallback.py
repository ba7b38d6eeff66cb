"""What a fallback promises on paper: who is asked instead, with what, and with whose key."""

from __future__ import annotations

import orjson
import pytest

from cache_proxy.upstream.fallback import Chain, chain_for, instead, trouble
from cache_proxy.upstream.providers import Provider, Route, Router

CHAT = b"/v1/chat/completions"
MAIN = Provider("main", "https://main.test/v1", "openai", models=("gpt-*",))
SPARE = Provider("spare", "https://spare.test/v1", "openai", models=("spare-*",))
OWN = Provider(
    "own", "https://own.test/v1", "openai", key="sk-own", judges=False, models=("own-*",)
)
CLAUDE = Provider("claude", "https://claude.test", "anthropic", models=("claude-*",))
ROUTER = Router([MAIN, SPARE, OWN, CLAUDE])
ASKED = Route(MAIN, "openai", "gpt-4.1", CHAT, priority="critical")
DOCUMENT = {"model": "gpt-4.1", "messages": [{"role": "user", "content": "?"}], "seed": 7}
CREDENTIAL = (b"authorization", b"Bearer sk-client")


def to(name: str) -> Route | None:
    return instead(ROUTER, ASKED, [CREDENTIAL], DOCUMENT, name)


@pytest.mark.parametrize(
    ("statuses", "what"),
    [
        ((408, 504), "timeout"),
        ((429, 500, 502, 503, 529), "error"),
        ((200, 304, 400, 401, 403, 404, 409, 413, 422), None),
    ],
)
def test_only_what_is_not_the_models_own_word_sends_to_another(
    statuses: tuple[int, ...], what: str | None
) -> None:
    """A refused request or credential is not overruled by another model."""
    assert {trouble(status) for status in statuses} == {what}


def test_a_chain_is_chosen_by_what_went_wrong() -> None:
    chain = Chain(timeout=("quick",), error=("cheap", "other/cheap"))
    assert chain.after("timeout") == ("quick",)
    assert chain.after("error") == ("cheap", "other/cheap")


def test_a_chain_is_found_by_bare_or_by_full_name() -> None:
    """The full name first: it says more."""
    bare, full = Chain(error=("a",)), Chain(error=("b",))
    assert chain_for(ASKED, {"gpt-4.1": bare, "main/gpt-4.1": full}) is full
    assert chain_for(ASKED, {"gpt-4.1": bare, "spare/gpt-4.1": full}) is bare
    assert chain_for(ASKED, {"gpt-4.1-mini": bare}) is None
    assert chain_for(Route(MAIN, "openai", "gpt-4.1", b"/v1/embeddings"), {"gpt-4.1": bare}) is None


@pytest.mark.parametrize(
    ("name", "provider", "model"),
    [
        ("gpt-4.1-mini", "main", "gpt-4.1-mini"),
        ("spare-1", "spare", "spare-1"),
        ("spare/any", "spare", "any"),
        ("own/x", "own", "x"),
    ],
)
def test_the_same_request_goes_to_the_other_model(name: str, provider: str, model: str) -> None:
    """Only the model changes, under the name that its provider knows; the class stays."""
    route = to(name)
    assert route is not None
    assert (route.provider.name, route.model, route.priority) == (provider, model, "critical")
    assert orjson.loads(route.body or b"") == DOCUMENT | {"model": model}


@pytest.mark.parametrize(
    ("name", "sent"),
    [
        ("gpt-4.1-mini", [CREDENTIAL]),
        ("spare-1", []),
        ("own-1", [(b"authorization", b"Bearer sk-own")]),
    ],
)
def test_a_clients_key_goes_to_the_provider_it_asked_alone(
    name: str, sent: list[tuple[bytes, bytes]]
) -> None:
    """Another provider gets its own key or none, in headers and in the query."""
    route = to(name)
    assert route is not None
    assert route.provider.outgoing([CREDENTIAL]) == sent
    assert ("key=sk" in route.provider.url(CHAT, b"key=sk-client")) is (name == "gpt-4.1-mini")


def test_nobody_is_asked_who_does_not_speak_the_protocol() -> None:
    """A body is never translated."""
    assert to("claude/claude-sonnet") is None
