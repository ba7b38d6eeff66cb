"""Reading a request: what must be equal, and a memory of readings that never mixes two up."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_proxy.errors import BadRequest
from cache_proxy.model import Bypass, Call
from cache_proxy.reading import Exchange, Reader
from cache_proxy.tenancy import Tenancy
from cache_proxy.upstream.providers import single

SECRET = b"s" * 32
BODY = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": "Where is it?"}]})
PLAIN: list[tuple[bytes, bytes]] = [
    (b"host", b"proxy"),
    (b"user-agent", b"app/1"),
    (b"accept", b"*/*"),
    (b"content-type", b"application/json"),
    (b"content-length", b"70"),
    (b"connection", b"keep-alive"),
    (b"authorization", b"Bearer sk-one"),
]


def reader(mode: str = "per-key", *, jwt: bool = False, **changes: Any) -> Reader:
    given: dict[str, Any] = {
        "tenancy": Tenancy(SECRET, mode, jwt=jwt),
        "router": single("http://up/v1"),
        "fingerprint": b"f" * 8,
        "ignore_end_user": False,
        "masks": (),
        "question_marker": "",
    }
    return Reader(**given | changes)


def exchange(**changes: Any) -> Exchange:
    made = Exchange("chat", b"/v1/chat/completions", b"", PLAIN, BODY, lambda: None)
    return replace(made, **changes)


def told(by: Reader, asked: Exchange) -> Call | Bypass | str:
    """A reading, or the sentence that refuses it."""
    try:
        return by.read(asked)
    except BadRequest as exc:
        return str(exc)


def call(by: Reader, **changes: Any) -> Call:
    found = by.read(exchange(**changes))
    assert isinstance(found, Call)
    return found


def body(**changes: Any) -> bytes:
    return orjson.dumps(orjson.loads(BODY) | changes)


def with_header(name: str, value: str) -> list[tuple[bytes, bytes]]:
    """The plain headers with this one set anew or added."""
    kept = [pair for pair in PLAIN if pair[0] != name.encode()]
    return [*kept, (name.encode(), value.encode("latin-1"))]


SEPARATE: list[tuple[str, dict[str, Any]]] = [
    ("key", {"headers": with_header("authorization", "Bearer sk-two")}),
    ("key's spelling", {"headers": with_header("authorization", "bearer sk-one")}),
    ("no key", {"headers": PLAIN[:-1]}),
    ("key in another header", {"headers": [*PLAIN[:-1], (b"api-key", b"Bearer sk-one")]}),
    ("second credential", {"headers": with_header("x-api-key", "k")}),
    ("key in the query", {"query": b"key=k"}),
    ("anthropic-version", {"headers": with_header("anthropic-version", "2023-06-01")}),
    ("anthropic-beta", {"headers": with_header("anthropic-beta", "x")}),
    ("OpenAI-Beta", {"headers": with_header("openai-beta", "x")}),
    ("OpenAI-Organization", {"headers": with_header("openai-organization", "org")}),
    ("OpenAI-Project", {"headers": with_header("openai-project", "p")}),
    ("x-goog-user-project", {"headers": with_header("x-goog-user-project", "p")}),
    ("namespace", {"headers": with_header("x-cache-namespace", "n")}),
    ("query", {"query": b"api-version=1"}),
    ("another query", {"query": b"api-version=2"}),
    ("query value that is no UTF-8", {"query": b"v=%ff"}),
    ("another that is none", {"query": b"v=%fe"}),
    ("repeated parameter", {"query": b"v=1&v=2"}),
    ("repeated in another order", {"query": b"v=2&v=1"}),
    ("path", {"path": b"/v1/deployments/a/chat/completions"}),
    ("path's percent signs", {"path": b"/v1/chat%2Fcompletions"}),
    ("operation", {"operation": "completions", "body": b'{"model":"m","prompt":"Where is it?"}'}),
    ("model", {"body": body(model="n")}),
    ("unknown field", {"body": body(brand_new=0)}),
    ("user", {"body": body(user="ann")}),
    ("safety_identifier", {"body": body(safety_identifier="ann")}),
    ("metadata.user_id", {"body": body(metadata={"user_id": "ann"})}),
]


def test_everything_that_could_matter_has_a_partition_of_its_own() -> None:
    """I2: one change at a time, and no two of these share, nor share with none."""
    partitions = {name: call(reader(), **changes).partition for name, changes in SEPARATE}
    partitions["none"] = call(reader()).partition
    assert len(set(partitions.values())) == len(SEPARATE) + 1


@pytest.mark.parametrize(
    "changes", [changes for _, changes in SEPARATE], ids=[n for n, _ in SEPARATE]
)
def test_a_reader_that_remembers_the_one_is_not_fooled_by_the_other(
    changes: dict[str, Any],
) -> None:
    """I2: the memory of recent readings takes no two of them for the same."""
    seasoned = reader()
    before = seasoned.read(exchange())
    assert seasoned.read(exchange(**changes)) == reader().read(exchange(**changes)) != before
    assert seasoned.read(exchange()) is before


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "other"),
        ("user-agent", "app/2"),
        ("accept", "text/event-stream"),
        ("content-type", "application/json; charset=utf-8"),
        ("x-request-id", "1"),
        ("x-stainless-retry-count", "2"),
        ("x-stainless-read-timeout", "9"),
        ("traceparent", "00-1-2-01"),
        ("cookie", "a=b"),
        ("x-forwarded-for", "10.0.0.1"),
        ("accept-language", "vi"),
        ("x-priority", "critical"),
    ],
)
def test_no_other_header_partitions(name: str, value: str) -> None:
    """What every client sends differently must not make every call a miss."""
    changed = call(reader(), headers=with_header(name, value))
    assert (changed.partition, changed.digest) == (call(reader()).partition, call(reader()).digest)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"query": b"alt=sse"}, {}),
        ({"query": b"a=1&b=2"}, {"query": b"b=2&a=1"}),
        ({"query": b"a=%31"}, {"query": b"a=1"}),
        ({"path": b"/chat/completions"}, {}),
        ({"body": BODY.replace(b'{"model":"m",', b'{ "model" : "m", ')}, {}),
        ({"body": body(metadata={"trace": 1}, stream=True)}, {}),
    ],
)
def test_spellings_of_one_request_share(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal by meaning is equal by name."""
    first, second = call(reader(), **one), call(reader(), **other)
    assert (first.partition, first.digest) == (second.partition, second.digest)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"router": single("http://elsewhere/v1")}, {}),
        ({"fingerprint": b"g" * 8}, {}),
        ({"tenancy": Tenancy(b"t" * 32)}, {}),
    ],
    ids=["upstream", "encoder", "secret"],
)
def test_another_configuration_reads_under_other_names(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    """I2: upstream, encoder and secret are part of every name."""
    first, second = call(reader(**one)), call(reader(**other))
    assert first.partition != second.partition
    assert first.digest != second.digest


def test_end_users_share_only_when_the_operator_says_so() -> None:
    """`end_user = "ignore"` takes all three names of a user out of the partition."""
    users: list[dict[str, Any]] = [
        {},
        {"user": "ann"},
        {"safety_identifier": "bob"},
        {"metadata": {"user_id": "eve"}},
    ]
    ignoring = {call(reader(ignore_end_user=True), body=body(**user)).digest for user in users}
    assert len(ignoring) == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"headers": with_header("content-encoding", "gzip")}, "encoded"),
        ({"headers": [*PLAIN, PLAIN[-1]]}, "identity"),
        ({"query": b"key=a&key=b"}, "identity"),
        ({"body": body(messages=[])}, "unreadable"),
        ({"body": body(stream="yes")}, "unreadable"),
        ({"body": body(metadata="text")}, "unreadable"),
    ],
)
def test_what_cannot_be_named_for_certain_goes_by(changes: dict[str, Any], reason: str) -> None:
    """I3: no caching, never a shared bucket."""
    assert reader().read(exchange(**changes)) == Bypass(reason)


@pytest.mark.parametrize("payload", [b"", b"[]", b"{", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff"])
def test_bytes_that_are_no_request_are_refused(payload: bytes) -> None:
    """A body that two parsers could read differently is nobody's cache key."""
    with pytest.raises(BadRequest):
        reader().read(exchange(body=payload))


# ---- the memory of recent readings

HEADERS = st.lists(
    st.sampled_from(
        [
            (b"authorization", b"Bearer a"),
            (b"authorization", b"Bearer b"),
            (b"authorization", b"Bearer e30.eyJpc3MiOiJpIiwic3ViIjoicyJ9.x"),
            (b"api-key", b"a"),
            (b"host", b"one"),
            (b"host", b"two"),
            (b"user-agent", b"one"),
            (b"user-agent", b"two"),
            (b"connection", b"x-user"),
            (b"connection", b"authorization"),
            (b"accept", b"one"),
            (b"content-type", b"one"),
            (b"x-user", b"one"),
            (b"x-user", b"two"),
            (b"x-user", b"twoapi-keya"),
            (b"openai-beta", b"one"),
            (b"x-cache-mode", b"exact"),
            (b"x-cache-mode", b"bad"),
            (b"cache-control", b"no-cache"),
            (b"cache-control", b"max-age=5"),
            (b"content-encoding", b"gzip"),
        ]
    ),
    max_size=3,
)
EXCHANGES = st.builds(
    exchange,
    operation=st.sampled_from(["chat", "completions"]),
    path=st.sampled_from([b"/v1/chat/completions", b"/v1/x/completions", b"/v1/completions"]),
    query=st.sampled_from([b"", b"key=a", b"key=b", b"v=1", b"v=1&v=2", b"v=2&v=1", b"alt=sse"]),
    headers=HEADERS,
    body=st.sampled_from(
        [
            BODY,
            BODY + b" ",
            body(model="n"),
            body(user="ann"),
            body(stream=True),
            body(prompt="Where is it?"),
            body(messages=[]),
            b"{",
        ]
    ),
)
MODES: list[Callable[[], Reader]] = [
    reader,
    lambda: reader("shared"),
    lambda: reader("header:X-User"),
    # Headers that tell nothing as a rule tell all here.
    lambda: reader("header:User-Agent"),
    lambda: reader("header:Host"),
    lambda: reader("header:Accept"),
    lambda: reader(jwt=True, masks=(re.compile("x"),), question_marker="Q:"),
]


@settings(max_examples=300)
@given(st.sampled_from(MODES), st.lists(EXCHANGES, min_size=2, max_size=12))
def test_remembering_never_changes_a_reading(
    make: Callable[[], Reader], asked: list[Exchange]
) -> None:
    """I2: whatever was read before, each exchange gets the reading that a new reader gives it."""
    seasoned = make()
    for one in (*asked, *asked):
        assert told(seasoned, one) == told(make(), one)


def test_two_users_told_apart_by_an_everyday_header_stay_apart() -> None:
    """I2: `header:User-Agent` and `header:Host` name tenants, so they are no noise there."""
    for name in ("user-agent", "host", "accept"):
        by = reader(f"header:{name}")
        one, other = (call(by, headers=with_header(name, user)) for user in ("ann", "bob"))
        assert one.partition != other.partition
        assert one.tenant != other.tenant


def test_the_memory_forgets_the_oldest_and_keeps_no_large_body() -> None:
    """I7: a cap in readings, and one on the bytes of each."""
    by = reader()
    first = call(by)
    assert call(by) is first
    large = body(model="x" * 10_000)
    assert call(by, body=large) == call(by, body=large)
    assert call(by, body=large) is not call(by, body=large)
    for number in range(1_100):
        by.read(exchange(body=body(seed=number)))
    assert call(by) is not first
    assert call(by) == first


def test_what_was_refused_or_passed_by_is_judged_again_each_time() -> None:
    """Only readings are remembered; a bad request never stands in for a good one."""
    by = reader()
    for _ in range(2):
        assert told(by, exchange(headers=with_header("x-cache-mode", "bad"))).startswith("X-Cache")
        assert by.read(exchange(headers=[*PLAIN, PLAIN[-1]])) == Bypass("identity")
    assert isinstance(by.read(exchange()), Call)
