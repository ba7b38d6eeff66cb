"""Where a request goes: base paths joined, headers cleaned, the operation told by its path.

Pure: addresses come from configuration only, never from a body or a header.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from urllib.parse import parse_qsl, unquote_plus, urlencode, urlsplit

from ..tenancy import KEY_PARAMETERS, is_credential

__all__ = [
    "Headers",
    "backward",
    "forward",
    "keyless_query",
    "operation",
    "probe_path",
    "protocol",
    "redacted_query",
    "target",
]

Headers = list[tuple[bytes, bytes]]

_OPERATIONS = {
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
}

# What only one of them has. `/threads/<id>/messages` is OpenAI's, `/v1beta/openai/` speaks as it
# does, and names of fine-tuned models hold colons.
_ANTHROPIC = re.compile(rb"(?:^|/v\d[^/]*)/messages(?:/|$)")
_OPENAI = tuple(suffix.encode() for suffix in _OPERATIONS)
_GEMINI = re.compile(
    rb"(?:^|/)v1beta/(?!openai/)"
    rb"|/models/.+:(?:stream|batch|async)?(?:[gG]enerate|[eE]mbed|[cC]ount|[pP]redict)\w*$"
)

# RFC 9110 7.6.1, and what each connection states for itself.
_HOP_BY_HOP = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_NOT_FORWARDED = _HOP_BY_HOP | {
    *(b"host", b"expect", b"cache-control", b"pragma", b"content-length", b"x-priority")
}

# A path below the base URL that asks for the key and costs nothing, by upstream host. Hosts whose
# list of models is public, or closed to restricted keys, have none.
_PROBES = {"api.openai.com": "/models", "api.anthropic.com": "/v1/models"}


def operation(method: str, path: str) -> str | None:
    """Which cached operation this is; None passes through. Base paths may differ, suffixes not."""
    if method != "POST":
        return None
    for suffix, name in _OPERATIONS.items():
        if path.endswith(suffix):
            return name
    return None


def protocol(path: bytes, headers: Headers) -> str:
    """Whose words a request speaks: "anthropic", "gemini", or "openai" where nothing tells.

    `/v1/models` and the like are both OpenAI's and Anthropic's, which wants a header of its own.
    """
    if path.endswith(_OPENAI):
        return "openai"
    if _GEMINI.search(path):
        return "gemini"
    if _ANTHROPIC.search(path) or any(name == b"anthropic-version" for name, _ in headers):
        return "anthropic"
    return "openai"


def target(base: str, raw_path: bytes, query: bytes) -> str:
    """Upstream's URL for a request path as it came, percent signs and all.

    A path that already carries the base's own path is taken as it is; else a leading `/v1` gives
    way to the base's path, so that `http://proxy/v1/...` reaches `https://host/other/v1/...`.
    """
    parts = urlsplit(base)
    path = "/" + raw_path.decode("latin-1").removeprefix("/")  # nothing may lengthen the host
    if parts.path and not (path + "/").startswith(parts.path + "/"):
        path = parts.path + (path.removeprefix("/v1") if (path + "/").startswith("/v1/") else path)
    suffix = f"?{query.decode('latin-1')}" if query else ""
    return f"{parts.scheme}://{parts.netloc}{path}{suffix}"


def forward(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Request headers as upstream gets them: hop-by-hop ones and the cache's own stay here.

    A credential goes on whatever `Connection` says: upstream must judge the one that was told by.
    """
    headers = list(headers)
    named = {name for name in _named_by_connection(headers) if not is_credential(name)}
    dropped = _NOT_FORWARDED | named
    return [
        (name, value)
        for name, value in headers
        if name not in dropped and not name.startswith(b"x-cache-")
    ]


def backward(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    """Response headers as the client gets them, names in lower case."""
    lowered = [(name.lower(), value) for name, value in headers]
    dropped = _HOP_BY_HOP | _named_by_connection(lowered)
    return [(name, value) for name, value in lowered if name not in dropped]


def _named_by_connection(headers: Headers) -> set[bytes]:
    return {
        token.strip().lower()
        for name, value in headers
        if name == b"connection"
        for token in value.split(b",")
    }


def redacted_query(query: bytes) -> bytes:
    """The query string less keys and `alt`, in canonical order: it partitions."""
    if not query:
        return b""
    # Latin-1 both ways keeps every byte. Of a name given twice the order may count.
    pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, encoding="latin-1")
    kept = [(k, v) for k, v in pairs if k.lower() not in KEY_PARAMETERS and k != "alt"]
    return urlencode(sorted(kept, key=lambda pair: pair[0]), encoding="latin-1").encode()


def keyless_query(query: bytes) -> bytes:
    """The query string as it came, less keys."""
    pairs = query.split(b"&")
    names = [unquote_plus(pair.partition(b"=")[0].decode("latin-1")).lower() for pair in pairs]
    kept = [pair for pair, name in zip(pairs, names, strict=True) if name not in KEY_PARAMETERS]
    return b"&".join(kept)


def probe_path(base: str, configured: str) -> str:
    """Full URL of the free question that shows whether a key still counts; "" when unknown."""
    path = configured or _PROBES.get(urlsplit(base).hostname or "", "")
    return base + "/" + path.lstrip("/") if path else ""
