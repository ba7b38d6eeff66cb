"""Who a request goes to, what it is made to look like for them, and whose key they see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from typer.testing import CliRunner

from cache_proxy import cli
from cache_proxy import settings as configuration
from cache_proxy.clients import ClientTokens
from cache_proxy.errors import ConfigError, NoRoute
from cache_proxy.protocols.faults import fault
from cache_proxy.settings import Settings
from cache_proxy.upstream.providers import Provider, Router, ready_made, single
from cache_proxy.upstream.routes import keyless_query, protocol
from cache_proxy.wiring import router

CHAT = b"/v1/chat/completions"
SECRET = "sk-canary-hunter2"
CLIENT = [(b"authorization", b"Bearer sk-client"), (b"x-app", b"1")]


def openai(name: str, *models: str, **changes: Any) -> Provider:
    return Provider(name, f"https://{name}.example/v1", "openai", models=models, **changes)


GPT = openai("gpt", "gpt-*", "o?")
QWEN = openai("qwen", "Qwen*")
REST = openai("rest")
HOST = openai("host", "gpt/own")
CLAUDE = Provider("claude", "https://claude.example", "anthropic", models=("claude-*",))
GEMINI = Provider("gem", "https://gem.example", "gemini", models=("gemini-*",))
ALL = Router([GPT, QWEN, REST, CLAUDE, GEMINI, HOST])


def went(by: Router, model: object, path: bytes = CHAT) -> tuple[str, str, bytes]:
    """Provider, model and path of a request for this model."""
    route, _ = by.route(path, [], {"model": model})
    return route.provider.name, route.model, route.path


# ---- by model


@pytest.mark.parametrize(
    ("model", "provider", "bare"),
    [
        ("gpt-4o", "gpt", "gpt-4o"),
        ("GPT-4o", "gpt", "GPT-4o"),
        ("o3", "gpt", "o3"),
        ("o3-mini", "rest", "o3-mini"),
        ("qwen3-max", "qwen", "qwen3-max"),
        ("Qwen/Qwen3-8B", "qwen", "Qwen/Qwen3-8B"),
        ("qwen/gpt-4o", "qwen", "gpt-4o"),
        ("gpt/own", "host", "gpt/own"),  # a pattern with a slash knows the whole name
        ("rest/gpt-4o", "rest", "gpt-4o"),
        ("rest/meta/llama", "rest", "meta/llama"),
        ("meta/llama", "rest", "meta/llama"),
        ("llama", "rest", "llama"),
        ("", "rest", ""),
        (None, "rest", ""),
        (["gpt-4o"], "rest", ""),
        ("gpt/", "gpt", ""),
    ],
)
def test_a_pattern_goes_before_a_prefix_and_both_before_the_rest(
    model: object, provider: str, bare: str
) -> None:
    """The first pattern in the order of the file; then `provider/model`; then who has none."""
    assert went(ALL, model) == (provider, bare, CHAT)


def test_the_first_of_two_that_match_gets_it() -> None:
    """The order of the file is the order of the search."""
    assert went(Router([GPT, openai("other", "gpt-4*")]), "gpt-4o")[0] == "gpt"
    assert went(Router([openai("other", "gpt-4*"), GPT]), "gpt-4o")[0] == "other"


def test_what_matches_nobody_goes_to_upstream_then_to_who_has_no_patterns_then_to_the_first() -> (
    None
):
    """Three fallbacks in one order."""
    upstream = Provider("upstream", "https://up.example/v1")
    assert went(Router([GPT, REST], upstream), "llama")[0] == "upstream"
    assert went(Router([GPT, REST]), "llama")[0] == "rest"
    assert went(Router([CLAUDE, GPT, QWEN]), "llama")[0] == "gpt"


def test_a_body_is_rewritten_only_to_take_the_prefix_off() -> None:
    """Any other request stays byte for byte; in a rewritten one nothing but the model changes."""
    document = {"temperature": 0.5, "model": "rest/m", "messages": [{"role": "user"}], "n": 1}
    route, sent = ALL.route(CHAT, [], document)
    assert route.body == orjson.dumps({**document, "model": "m"})
    assert sent == {**document, "model": "m"}
    assert document["model"] == "rest/m"
    route, sent = ALL.route(CHAT, [], {"model": "gpt-4o"})
    assert (route.body, sent) == (None, {"model": "gpt-4o"})


def test_one_upstream_takes_everything_as_it_is() -> None:
    """No table, no change: whatever the model, the path and the protocol."""
    only = single("https://up.example/v1")
    for path in (CHAT, b"/v1/messages", b"/v1beta/models/x:generateContent", b"/gpt/v1/models"):
        for model in ("gpt/x", "task/x", ""):
            route, sent = only.route(path, CLIENT, {"model": model})
            assert (route.provider.base_url, route.path) == ("https://up.example/v1", path)
            assert (route.body, sent) == (None, {"model": model})
            assert route.provider.outgoing(CLIENT) == CLIENT


# ---- by path


@pytest.mark.parametrize(
    ("path", "provider", "rest"),
    [
        (b"/rest/v1/chat/completions", "rest", CHAT),
        (b"/rest/v1/x", "rest", b"/v1/x"),
        (b"/rest/openai/deployments/m/chat/completions", "rest", None),
        (b"/nobody/v1/chat/completions", "gpt", b"/nobody/v1/chat/completions"),
        (b"/rest/chat/completions", "gpt", b"/rest/chat/completions"),
        (b"/claude/v1/messages", "claude", b"/v1/messages"),
    ],
)
def test_a_path_may_name_the_provider(path: bytes, provider: str, rest: bytes | None) -> None:
    """`/<provider>/v1/...`; it goes before the model."""
    assert went(ALL, "gpt-4o", path) == (
        provider,
        "gpt-4o",
        rest if rest is not None else path.removeprefix(b"/rest"),
    )


@pytest.mark.parametrize(
    ("path", "headers", "spoken"),
    [
        (CHAT, [], "openai"),
        (CHAT, [(b"anthropic-version", b"2023-06-01")], "openai"),
        (b"/v1/responses", [], "openai"),
        (b"/v1/models", [], "openai"),
        (b"/v1/models", [(b"anthropic-version", b"2023-06-01")], "anthropic"),
        (b"/v1/models/ft:gpt-4o:org::id", [], "openai"),
        (b"/v1/threads/t_1/messages", [], "openai"),
        (b"/v1/messages", [], "anthropic"),
        (b"/api/v1/messages/count_tokens", [], "anthropic"),
        (b"/messages", [], "anthropic"),
        (b"/v1beta/models", [], "gemini"),
        (b"/v1beta/models/gemini-2.5-flash:generateContent", [], "gemini"),
        (b"/v1/models/gemini-2.5-flash:streamGenerateContent", [], "gemini"),
        (b"/v1beta/openai/chat/completions", [], "openai"),
        (b"/v1beta/openai/models", [], "openai"),
    ],
)
def test_the_path_tells_the_protocol(
    path: bytes, headers: list[tuple[bytes, bytes]], spoken: str
) -> None:
    """And a header where two protocols share a path."""
    assert protocol(path, headers) == spoken


def test_a_model_in_the_path_counts_as_one_in_the_body() -> None:
    """Gemini's, and Azure's deployments; a prefix is taken off there too."""
    path = b"/v1beta/models/gemini-2.5-flash:generateContent"
    assert ALL.route(path, [], {})[0].model == "gemini-2.5-flash"
    prefixed = b"/v1beta/models/gem/tuned:generateContent"
    route, _ = ALL.route(prefixed, [], {"contents": []})
    assert (route.provider, route.path) == (GEMINI, b"/v1beta/models/tuned:generateContent")
    for one in (b"/v1/models/gpt-4o", b"/v1/models/gpt%2Fgpt-4o", b"/v1/models/gpt/gpt-4o"):
        route, _ = ALL.route(one, [], None)
        assert (route.provider, route.path) == (GPT, b"/v1/models/gpt-4o")
    azure = b"/openai/deployments/gpt-4o/chat/completions"
    assert ALL.route(azure, [], {"messages": []})[0].provider is GPT


@pytest.mark.parametrize(
    ("path", "model", "said"),
    [
        (b"/v1/messages", "claude-x", "No configured provider speaks the anthropic protocol."),
        (CHAT, "gem/gemini-x", "The provider gem does not speak the openai protocol."),
        (b"/gem/v1/chat/completions", "m", "The provider gem does not speak this protocol."),
    ],
)
def test_what_nobody_speaks_has_no_route(path: bytes, model: str, said: str) -> None:
    """A local 404, and no guess."""
    with pytest.raises(NoRoute) as caught:
        Router([GPT, GEMINI]).route(path, [], {"model": model})
    assert (str(caught.value), caught.value.status) == (said, 404)


def test_each_protocol_has_its_own_shape_of_an_error() -> None:
    """So that each SDK shows the message."""
    assert orjson.loads(fault("openai", "No.", 404, "c"))["error"] == {
        "message": "No.",
        "type": "invalid_request_error",
        "param": None,
        "code": "c",
    }
    assert orjson.loads(fault("anthropic", "No.", 404, "c")) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "No."},
    }
    assert orjson.loads(fault("gemini", "No.", 404, "c")) == {
        "error": {"code": 404, "message": "No.", "status": "NOT_FOUND"}
    }
    assert orjson.loads(fault("anthropic", "No.", 502, "c"))["error"]["type"] == "api_error"
    assert orjson.loads(fault("gemini", "No.", 502, "c"))["error"]["status"] == "INTERNAL"


# ---- keys


def test_a_provider_with_a_key_of_its_own_sees_no_clients_key() -> None:
    """Every credential of the client stays here, in headers and query, and ours takes its place."""
    headers = [
        (b"authorization", b"Bearer sk-client"),
        (b"x-api-key", b"sk-client"),
        (b"api-key", b"sk-client"),
        (b"x-goog-api-key", b"sk-client"),
        (b"x-app", b"1"),
    ]
    put_in = {
        "openai": (b"authorization", b"Bearer sk-ours"),
        "anthropic": (b"x-api-key", b"sk-ours"),
        "gemini": (b"x-goog-api-key", b"sk-ours"),
    }
    for spoken, pair in put_in.items():
        ours = Provider("p", "https://p.example", spoken, key="sk-ours", judges=False)
        assert ours.outgoing(headers) == [(b"x-app", b"1"), pair]
        assert (
            ours.url(b"/v1/x", b"key=sk&a=%20b&Api%2dKey=sk&c") == "https://p.example/v1/x?a=%20b&c"
        )
    azure = Provider(
        "a", "https://a.example", "openai", key="k", key_header="api-key", judges=False
    )
    assert azure.outgoing(headers) == [(b"x-app", b"1"), (b"api-key", b"k")]


def test_a_provider_without_one_gets_the_clients_as_it_came() -> None:
    """It judges the client itself."""
    assert GPT.outgoing(CLIENT) == CLIENT
    assert GPT.url(b"/v1/x", b"key=sk") == "https://gpt.example/v1/x?key=sk"


def test_client_tokens_stay_here_even_where_there_is_no_key_to_put_in_their_place() -> None:
    """A local model has no use for them."""
    local = Provider("local", "http://127.0.0.1:1/v1", "openai", judges=False)
    assert local.outgoing(CLIENT) == [(b"x-app", b"1")]


def test_configured_headers_replace_the_clients() -> None:
    """One of each name goes out."""
    extra = openai("x", headers=((b"x-app", b"2"), (b"openai-project", b"p")))
    assert extra.outgoing(CLIENT) == [CLIENT[0], (b"x-app", b"2"), (b"openai-project", b"p")]


def test_a_cookie_goes_only_where_the_clients_key_goes() -> None:
    """I3: it may be a session of another app on the same host."""
    cookie = (b"cookie", b"session=1")
    assert cookie in GPT.outgoing([*CLIENT, cookie])
    ours = Provider("p", "https://p.example", "openai", key="sk-ours", judges=False)
    assert cookie not in ours.outgoing([*CLIENT, cookie])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "host = '0.0.0.0'\n[providers.x]\nbase_url = 'http://x/v1'\n"
            "headers = { Authorization = 'Bearer sk-x' }",
            "client_tokens",
        ),
        (
            "jwt_tenants = true\n[providers.x]\nbase_url = 'http://x/v1'\napi_key_env = 'HOME'",
            "jwt_tenants",
        ),
    ],
)
def test_a_key_of_ours_needs_somebody_who_checks_the_client(
    load: Any, text: str, said: str
) -> None:
    """I3: where upstream does not judge the client, nothing the client says of itself counts."""
    with pytest.raises(ConfigError, match=said):
        load(text)


def test_no_key_shows_in_a_printed_provider() -> None:
    """I9: neither our key nor a configured header, which may hold one."""
    shy = Provider("p", "https://p.example", key=SECRET, headers=((b"x", SECRET.encode()),))
    assert SECRET not in repr(shy) + str(shy) + repr(ALL.route(CHAT, [], {})) + f"{[shy]}"


def test_only_keys_leave_the_query() -> None:
    """The other parameters stay as they were spelt."""
    assert keyless_query(b"") == b""
    assert keyless_query(b"a=1&key=s&b=%41+") == b"a=1&b=%41+"
    assert keyless_query(b"%6bey=s") == b""


TOKENS = {"one": "sk-app-one", "two": "sk-app-two"}


@pytest.mark.parametrize(
    ("headers", "query", "admitted"),
    [
        ([(b"authorization", b"Bearer sk-app-one")], b"", True),
        ([(b"authorization", b"bearer  sk-app-two")], b"", True),
        ([(b"x-api-key", b"sk-app-two")], b"", True),
        ([(b"x-goog-api-key", b"sk-app-one")], b"", True),
        ([], b"key=sk-app-one", True),
        ([], b"", False),
        ([(b"authorization", b"Bearer sk-app")], b"", False),
        ([(b"authorization", b"Bearer sk-app-one2")], b"", False),
        ([(b"x-other", b"sk-app-one")], b"", False),
        ([(b"authorization", b"Bearer " + b"a" * 64)], b"", False),
    ],
)
def test_only_a_client_token_opens_the_door(
    headers: list[tuple[bytes, bytes]], query: bytes, admitted: bool
) -> None:
    """In whichever place the client's SDK puts its key."""
    settings = configuration.load(client_tokens=[f"sha256:{d}" for d in digests()])
    assert ClientTokens(settings.client_token_digests()).admit(headers, query) is admitted
    assert ClientTokens(frozenset()).admit(headers, query)


def digests() -> list[str]:
    from hashlib import sha256

    return [sha256(token.encode()).hexdigest() for token in TOKENS.values()]


# ---- from the settings


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings from a TOML text."""
    monkeypatch.chdir(tmp_path)

    def loaded(text: str, **flags: Any) -> Settings:
        (tmp_path / "cache-proxy.toml").write_text(text, "utf-8")
        return configuration.load(**flags)

    return loaded


def test_an_empty_table_takes_the_ready_made_entry(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each value of its own replaces one of the entry."""
    monkeypatch.setenv("A_KEY", SECRET)
    made = router(
        load(
            "max_connections = 7\n[providers.deepseek]\n[providers.anthropic]\n"
            "api_key_env = 'A_KEY'\nmodels = ['c-*']\nmax_connections = 3\nrate = '600/m'\n"
            "headers = { 'X-Team' = 'one' }\n"
        )
    )
    deepseek, anthropic = made.providers
    assert deepseek.base_url == ready_made()["deepseek"]["base_url"]
    assert (deepseek.models, deepseek.max_connections) == (("deepseek-*",), 7)
    assert (deepseek.judges, deepseek.key, deepseek.rate) == (True, "", None)
    assert (anthropic.protocol, anthropic.models) == ("anthropic", ("c-*",))
    assert (anthropic.max_connections, anthropic.rate) == (3, 10.0)
    assert anthropic.outgoing(CLIENT) == [
        (b"x-app", b"1"),
        (b"x-team", b"one"),
        (b"x-api-key", SECRET.encode()),
    ]
    assert anthropic.probe == "https://api.anthropic.com/v1/models"


def test_all_ready_made_entries_can_be_taken_as_they_are(load: Any) -> None:
    """Nine kinds of provider; only Azure's address is each customer's own."""
    names = set(ready_made())
    wanted = {"openai", "anthropic", "gemini", "deepseek", "dashscope", "openrouter", "azure"}
    assert names >= wanted | {"ollama", "vllm"}
    own = "base_url = 'https://team.openai.azure.com/openai/v1'\n"
    text = "".join(f"[providers.{n}]\n{own if n == 'azure' else ''}" for n in sorted(names))
    made = router(load(text))
    found = {
        model: made.route(CHAT, [], {"model": model})[0].provider.name
        for model in ("gpt-4.1", "o4-mini", "deepseek-chat", "qwen3-max", "gemini-2.5-flash")
    }
    assert found == {
        "gpt-4.1": "openai",
        "o4-mini": "openai",
        "deepseek-chat": "deepseek",
        "qwen3-max": "dashscope",
        "gemini-2.5-flash": "gemini-openai",
    }
    azure = next(p for p in made.providers if p.name == "azure")
    assert azure.url(CHAT, b"") == "https://team.openai.azure.com/openai/v1/chat/completions"


def test_upstream_counts_beside_named_providers_only_where_it_is_set(load: Any) -> None:
    """Else its default would get what matches nobody."""
    assert [p.name for p in router(load("[providers.ollama]")).providers] == ["ollama"]
    both = router(load("upstream = 'http://up/v1'\n[providers.ollama]"))
    assert [p.name for p in both.providers] == ["ollama", "upstream"]
    assert [p.name for p in router(load("")).providers] == [""]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[providers.azure]", r"^providers.azure.base_url: is needed"),
        ("[providers.mine]", r"^providers.mine.base_url: is needed"),
        ("[providers.openai]\napi_key_env = 'NOT_SET'", r"^providers.openai.api_key_env: the var"),
    ],
)
def test_what_is_missing_stops_at_start(load: Any, text: str, said: str) -> None:
    """One sentence that names the setting."""
    with pytest.raises(ConfigError, match=said):
        router(load(text))


def test_serve_stops_before_it_starts_a_worker(load: Any, tmp_path: Path) -> None:
    """A worker that cannot start would be started again for ever."""
    load("")
    for text, said in (
        ("[providers.openai]\napi_key_env = 'NOT_SET'\n", "providers.openai.api_key_env: "),
        ("client_tokens = ['env:NOT_SET']", "client_tokens: "),
    ):
        (tmp_path / "cache-proxy.toml").write_text(f"workers = 2\n{text}", "utf-8")
        result = CliRunner().invoke(cli.app, ["serve", "--port", "0"])
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert result.stderr.startswith(f"cache-proxy: {said}")


def test_a_listed_model_is_told_under_a_name_that_leads_back_to_it() -> None:
    """Bare where the bare name goes there, else with its provider before it."""
    assert ALL.told(GPT, "gpt-4o") == "gpt-4o"
    assert ALL.told(REST, "llama") == "llama"
    assert ALL.told(GPT, "llama") == "gpt/llama"
    assert ALL.told(REST, "gpt-4o") == "rest/gpt-4o"
    for provider, model in ((GPT, "llama"), (REST, "gpt-4o"), (QWEN, "a/b")):
        assert went(ALL, ALL.told(provider, model))[:2] == (provider.name, model)
