"""Where a request goes: the host by configuration alone, and headers as far as they may go."""

from __future__ import annotations

import random
from itertools import combinations
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_proxy.upstream.routes import (
    backward,
    forward,
    operation,
    probe_path,
    redacted_query,
    target,
)

Pairs = list[tuple[bytes, bytes]]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v1/chat/completions", "chat"),
        ("/chat/completions", "chat"),
        ("/api/v1/chat/completions", "chat"),
        ("/compatible-mode/v1/chat/completions", "chat"),
        ("/openai/deployments/gpt-4o/chat/completions", "chat"),
        ("/v1/completions", "completions"),
        ("/v1/embeddings", "embeddings"),
        ("/openai/deployments/e/embeddings", "embeddings"),
        ("/v1/chat/completions/", None),
        ("/v1/chat/completions/chatcmpl-1", None),
        ("/v1/Chat/Completions", None),
        ("/v1/mycompletions", None),
        ("/v1/responses", None),
        ("/v1/messages", None),
        ("/v1/models", None),
        ("/", None),
        ("", None),
    ],
)
def test_the_operation_is_told_by_the_paths_end(path: str, expected: str | None) -> None:
    """Base paths differ between providers, suffixes do not; only POST is cached."""
    assert operation("POST", path) == expected
    for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "post"):
        assert operation(method, path) is None


@pytest.mark.parametrize(
    ("base", "path", "query", "expected"),
    [
        ("https://h/v1", "/v1/models", "", "https://h/v1/models"),
        ("https://h/v1", "/models", "", "https://h/v1/models"),
        ("https://h/v1", "/v1", "", "https://h/v1"),
        ("https://h/v1", "/v10/models", "", "https://h/v1/v10/models"),
        ("https://h/v1", "/", "", "https://h/v1/"),
        ("https://h", "/v1/models", "", "https://h/v1/models"),
        ("https://h", "/models", "", "https://h/models"),
        ("https://h/api/v1", "/v1/models", "", "https://h/api/v1/models"),
        ("https://h/api/v1", "/api/v1/models", "", "https://h/api/v1/models"),
        ("https://h/api/v3", "/v1/chat/completions", "", "https://h/api/v3/chat/completions"),
        ("https://h:8443/v1", "/v1/a%2Fb%20c", "", "https://h:8443/v1/a%2Fb%20c"),
        ("https://h/v1", "/v1/models", "a=1&b=%20", "https://h/v1/models?a=1&b=%20"),
        (
            "https://h",
            "/openai/deployments/d/x",
            "api-version=1",
            "https://h/openai/deployments/d/x?api-version=1",
        ),
        # Paths that would lengthen or replace the host, were they put right behind it.
        ("https://h", "@evil/x", "", "https://h/@evil/x"),
        ("https://h", ".evil/x", "", "https://h/.evil/x"),
        ("https://h", ":99/x", "", "https://h/:99/x"),
        ("https://h", "*", "", "https://h/*"),
        ("https://h", "", "", "https://h/"),
        ("https://h", "//evil/x", "", "https://h//evil/x"),
        ("https://h/v1", "//evil/x", "", "https://h/v1//evil/x"),
        ("https://h/v1", "http://evil/x", "", "https://h/v1/http://evil/x"),
    ],
)
def test_a_path_is_put_below_the_base(base: str, path: str, query: str, expected: str) -> None:
    """The base's own path is not doubled, and a leading /v1 gives way to it."""
    assert target(base, path.encode(), query.encode()) == expected


PATHS = st.binary(max_size=30) | st.lists(
    st.sampled_from([b"/", b"//", b"v1", b"..", b"@evil", b":80", b"\\", b"http:", b"*", b"%2f"]),
    max_size=6,
).map(b"".join)


@given(
    st.sampled_from(["https://h.example", "http://h.example:81", "https://h.example/api/v1"]),
    PATHS.filter(lambda path: not {b"?", b"#"} & {bytes([byte]) for byte in path}),
    st.sampled_from([b"", b"a=1", b"@evil", b"x=http://evil/"]),
)
@example("https://h.example", b"@evil", b"")
@example("https://h.example", b".evil.example/x", b"")
def test_no_path_leads_to_another_host(base: str, path: bytes, query: bytes) -> None:
    """I10: whatever the request line says, the scheme and the host are the configured ones."""
    url = target(base, path, query)
    origin = "{0.scheme}://{0.netloc}".format(urlsplit(base))
    assert url.startswith((origin + "/",))
    assert (
        url[len(origin) :].partition("?")[0].encode("latin-1").endswith(path.removeprefix(b"/v1"))
    )


FORWARDED: Pairs = [
    (b"authorization", b"Bearer k"),
    (b"content-type", b"application/json"),
    (b"openai-organization", b"org"),
    (b"x-request-id", b"1"),
    (b"x-stainless-lang", b"python"),
    (b"user-agent", b"app"),
    (b"accept-encoding", b"gzip"),
    (b"x-cachet", b"not ours"),
]
HELD_BACK: Pairs = [
    (b"host", b"proxy"),
    (b"connection", b"keep-alive, X-Hop"),
    (b"x-hop", b"1"),
    (b"keep-alive", b"timeout=5"),
    (b"proxy-authorization", b"Basic x"),
    (b"proxy-authenticate", b"Basic"),
    (b"proxy-connection", b"keep-alive"),
    (b"te", b"trailers"),
    (b"trailer", b"x"),
    (b"transfer-encoding", b"chunked"),
    (b"upgrade", b"h2c"),
    (b"expect", b"100-continue"),
    (b"content-length", b"5"),
    (b"cache-control", b"no-cache"),
    (b"pragma", b"no-cache"),
    (b"x-cache-mode", b"exact"),
    (b"x-cache-namespace", b"n"),
    (b"x-cache-threshold", b"0.99"),
    (b"x-cache-ttl", b"60"),
    (b"x-cache-tags", b"faq"),
    (b"x-cache-anything", b"1"),
]


def test_what_concerns_the_hop_or_the_cache_stays_here() -> None:
    """The rest goes on in its order, byte for byte."""
    dice = random.Random(7)
    for _ in range(50):
        held = [(dice.uniform(-1, 9), pair) for pair in HELD_BACK]
        mixed = sorted([*enumerate(FORWARDED), *held])
        assert forward(pair for _, pair in mixed) == FORWARDED
    assert forward(HELD_BACK) == []


@pytest.mark.parametrize("name", [b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key"])
def test_connection_cannot_take_the_credential_away(name: bytes) -> None:
    """I3: upstream judges the very credential that the caller was told by.

    Else a forged token, named in `Connection`, would reach upstream as no token at all; and where
    that is welcome too, the forgery would count as accepted.
    """
    assert (name, b"k") in forward([(name, b"k"), (b"connection", b"close, " + name.upper())])


def test_the_answers_own_hop_stays_here_too() -> None:
    """Names come in any case, and what `Connection` names is dropped in any."""
    answer = [
        (b"Content-Type", b"application/json"),
        (b"Set-Cookie", b"a=1"),
        (b"Set-Cookie", b"b=2"),
        (b"Connection", b"Close, X-Hop"),
        (b"X-Hop", b"1"),
        (b"Transfer-Encoding", b"chunked"),
        (b"Keep-Alive", b"timeout=5"),
        (b"Content-Length", b"3"),
        (b"Retry-After", b"1"),
    ]
    assert backward(answer) == [
        (b"content-type", b"application/json"),
        (b"set-cookie", b"a=1"),
        (b"set-cookie", b"b=2"),
        (b"content-length", b"3"),
        (b"retry-after", b"1"),
    ]


NAMES = st.sampled_from([name for name, _ in FORWARDED + HELD_BACK])


@given(st.lists(st.tuples(NAMES, st.binary(max_size=8)), max_size=8))
def test_nothing_is_added_or_rewritten_on_the_way_out(headers: Pairs) -> None:
    """What goes on is a part of what came, in its order, and never a cache header."""
    rest = iter(headers)
    assert all(pair in rest for pair in forward(headers))
    assert not any(name.startswith(b"x-cache-") for name, _ in forward(headers))


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"", b""),
        (b"key=secret", b""),
        (b"KEY=secret&Api_Key=s&api-key=t", b""),
        (b"%6bey=secret", b""),
        (b"alt=sse", b""),
        (b"a=1&key=secret&b=2", b"a=1&b=2"),
        (b"b=2&a=1", b"a=1&b=2"),
        (b"a=%31", b"a=1"),
        (b"a=", b"a="),
        (b"a=x+y", b"a=x+y"),
        (b"a=x%20y", b"a=x+y"),
        (b"keys=1", b"keys=1"),
        (b"ALT=sse", b"ALT=sse"),
        # The sign for a kelvin is no k.
        ("\u212aey=1".encode(), b"%E2%84%AAey=1"),
    ],
)
def test_keys_never_stand_in_a_redacted_query(query: bytes, expected: bytes) -> None:
    """I9: and what is left has one spelling."""
    assert redacted_query(query) == expected


def test_queries_that_differ_stay_different() -> None:
    """I2: raw bytes and the order of a repeated name count."""
    queries = [b"a=%ff", b"a=%fe", b"a=%ef%bf%bd", b"a=?", b"a=1&a=2", b"a=2&a=1", b"a=1%262"]
    queries += [
        b"a=1;b=2",
        b"a=1&b=2",
        b"a=1%26b=2",
        b"A=1",
        b"a=%00",
        b"a=\xff\xff",
        b"a=+",
        b"a=%2B",
    ]
    for one, other in combinations(queries, 2):
        assert redacted_query(one) != redacted_query(other), (one, other)


@given(
    st.lists(st.tuples(st.sampled_from(["a", "b", "key", "alt"]), st.text(max_size=4)), max_size=5)
)
def test_a_secret_is_gone_however_it_is_written(pairs: list[tuple[str, str]]) -> None:
    """I9: no parameter that carries a key leaves a trace."""
    joined = "&".join(f"{name}={value}" for name, value in pairs).encode("utf-8", "surrogatepass")
    kept = redacted_query(joined + b"&key=sk-canary&API_KEY=sk-canary")
    assert b"canary" not in kept


@pytest.mark.parametrize(
    ("base", "configured", "expected"),
    [
        ("https://api.openai.com/v1", "", "https://api.openai.com/v1/models"),
        ("https://api.anthropic.com", "", "https://api.anthropic.com/v1/models"),
        ("https://api.openai.com.evil.example/v1", "", ""),
        ("http://127.0.0.1:8000/v1", "", ""),
        ("http://127.0.0.1:8000/v1", "/me", "http://127.0.0.1:8000/v1/me"),
        ("http://127.0.0.1:8000/v1", "me", "http://127.0.0.1:8000/v1/me"),
        ("https://api.openai.com/v1", "/me", "https://api.openai.com/v1/me"),
        ("http://h/v1", "//evil/x", "http://h/v1/evil/x"),
    ],
)
def test_the_free_question_is_known_for_some_hosts_only(
    base: str, configured: str, expected: str
) -> None:
    """Where a list of models is public, asking for it would prove nothing."""
    assert probe_path(base, configured) == expected
