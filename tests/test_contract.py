"""The contract with clients: headers in, headers out, bytes, and what is kept.

Real sockets throughout. Where a byte matters the test speaks raw HTTP/1.1 on both sides, so that no
client library tidies up what the proxy should have left alone.
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import itertools
import re
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlsplit

import orjson
import pytest

from cache_proxy.directives import directives
from cache_proxy.errors import BadRequest, UpstreamUnavailable
from tests.conftest import Answered, World, WorldMaker
from tests.scripted import Reply, Seen, completion, echo, scripted_upstream, streamed, whole
from tests.stopwatch import awake

pytestmark = pytest.mark.live

FRANCE = "What is the capital of France?"
FRANCE_REWORDED = "What's the capital city of France?"
FRANCE_RELATED = "What is the population of France?"
JSON = {"content-type": "application/json", "authorization": "Bearer sk-one"}
SSE = (("content-type", "text/event-stream"),)


# Raw HTTP ----------------------------------------------------------------------------------------


@dataclass
class Wire:
    """A bare upstream: writes down each head and body as they came, answers with given bytes."""

    reply: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi"
    heads: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    port: int = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def line(self) -> bytes:
        return self.heads[-1].partition(b"\r\n")[0]

    def values(self, name: bytes) -> list[bytes]:
        """All values of a header in the latest request."""
        pairs = [line.split(b": ", 1) for line in self.heads[-1].split(b"\r\n")[1:] if line]
        return [value for key, value in pairs if key.lower() == name]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.heads.append(head.removesuffix(b"\r\n\r\n"))
                self.bodies.append(await _body(head.lower(), reader))
                writer.write(self.reply)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


async def _body(head: bytes, reader: asyncio.StreamReader) -> bytes:
    if length := re.search(rb"\r\ncontent-length: *(\d+)", head):
        return await reader.readexactly(int(length[1]))
    body = b""
    if b"\r\ntransfer-encoding: chunked" in head:
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
        await reader.readline()
    return body


@asynccontextmanager
async def wire() -> AsyncIterator[Wire]:
    upstream = Wire()
    server = await asyncio.start_server(upstream.serve, "127.0.0.1", 0)
    upstream.port = server.sockets[0].getsockname()[1]
    try:
        yield upstream
    finally:
        server.close()


async def spoken(world: World, request: bytes) -> tuple[bytes, bytes]:
    """One raw request on a connection of its own; the answer's head and all that follows it."""
    url = urlsplit(world.base)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    writer.write(request)
    await writer.drain()
    answer = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    head, _, rest = answer.partition(b"\r\n\r\n")
    return head, rest


def raw(method: bytes, target: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    lines = [method + b" " + target + b" HTTP/1.1", b"Host: app", b"Connection: close", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# What callers may ask ----------------------------------------------------------------------------


async def test_none_of_the_caches_own_headers_goes_upstream(make_world: WorldMaker) -> None:
    """Upstream sees a request as if there were no cache."""
    own = {
        "cache-control": "no-cache, max-age=5",
        "x-cache-mode": "exact",
        "x-cache-threshold": "0.95",
        "x-cache-ttl": "60",
        "x-cache-namespace": "team-a",
        "x-cache-tags": "faq, doc:42",
        "x-cache-something-new": "1",
    }
    kept = {"x-stainless-lang": "python", "openai-organization": "org-1", "user-agent": "an app"}
    async with make_world(model="none") as world:
        await world.ask(FRANCE, headers=own | kept)
        await world.ask("Another", headers=own | {"cache-control": "no-store"} | kept)
        await world.send("GET", "/v1/models", headers=own | kept)

        for seen in world.upstream.seen:
            assert not [name for name in seen.headers if name.startswith("x-cache")]
            assert kept.items() <= seen.headers.items()
        for seen in world.upstream.seen[:2]:
            assert "cache-control" not in seen.headers
            assert seen.headers["authorization"] == "Bearer sk-one"
            assert seen.headers["host"] == f"127.0.0.1:{world.upstream.port}"


async def test_no_cache_asks_anew_and_keeps_the_new_answer(world: World) -> None:
    """`Cache-Control: no-cache` does not read, but does store: the next caller gets the new one."""
    await world.ask(FRANCE)
    fresh = await world.ask(FRANCE, headers={"cache-control": "no-cache"})
    again = await world.ask(FRANCE)

    assert world.kinds == ["miss", "refresh", "hit"]
    assert fresh.reason == "no_cache"
    assert again.text == fresh.text
    assert world.upstream.calls == 2


async def test_no_store_neither_reads_nor_keeps(world: World) -> None:
    """`Cache-Control: no-store` leaves no trace, and sees none."""
    unread = await world.ask("What is a prime number?", headers={"cache-control": "no-store"})
    await world.ask("What is a prime number?")
    past = await world.ask("What is a prime number?", headers={"cache-control": "No-Store"})

    assert world.kinds == ["bypass", "miss", "bypass"]
    assert unread.reason == past.reason == "no_store"
    assert world.upstream.calls == 3


async def test_age_grows_and_max_age_bounds_it(world: World) -> None:
    """An answer older than `max-age` is not served, exactly or by meaning; `Age` says how old."""
    await world.ask(FRANCE)
    young = await world.ask(FRANCE, headers={"cache-control": "max-age=60"})
    assert (young.kind, young.headers["age"]) == ("HIT", "0")

    async def aged() -> bool:
        return int((await world.ask(FRANCE)).headers["age"]) >= 2

    await world.until(aged)
    by_meaning = await world.ask(FRANCE_REWORDED, headers={"cache-control": "max-age=1"})
    assert (by_meaning.kind, by_meaning.reason) == ("MISS", "max_age")
    exact = await world.ask(FRANCE, headers={"cache-control": "max-age=1", "x-cache-mode": "exact"})
    assert exact.kind == "MISS"
    renewed = await world.ask(FRANCE, headers={"cache-control": "max-age=1"})
    assert (renewed.kind, renewed.text) == ("HIT", exact.text)


async def test_only_if_cached_never_goes_upstream(world: World) -> None:
    """504 in OpenAI's shape on a miss, with the word that stops SDKs from trying again."""
    nothing = await world.ask(FRANCE, headers={"cache-control": "only-if-cached"})
    assert nothing.status == 504
    assert nothing.headers["x-should-retry"] == "false"
    assert nothing.json["error"].keys() == {"message", "type", "param", "code"}
    assert world.upstream.calls == 0

    await world.ask(FRANCE)
    exact = await world.ask(FRANCE, headers={"cache-control": "only-if-cached"})
    similar = await world.ask(FRANCE_REWORDED, headers={"cache-control": "only-if-cached"})
    assert (exact.tier, similar.tier) == ("exact", "semantic")
    assert world.upstream.calls == 1


async def test_modes_switch_the_tiers(world: World) -> None:
    """`off` is no cache, `exact` no meaning, `semantic` both, `shadow` only tells."""
    stored = await world.ask(FRANCE)

    async def mode(name: str, text: str) -> Answered:
        return await world.ask(text, headers={"x-cache-mode": name})

    off = await mode("off", FRANCE)
    assert (off.kind, off.reason) == ("BYPASS", "off")
    assert (await mode("Semantic", FRANCE_REWORDED)).tier == "semantic"
    exact, closed = await mode("exact", FRANCE), await mode("exact", FRANCE_REWORDED)
    assert (exact.tier, closed.kind, closed.reason) == ("exact", "MISS", "mode")
    shadow = await mode("shadow", FRANCE)
    assert (shadow.kind, shadow.reason) == ("SHADOW", "shadow")
    assert "age" not in shadow.headers
    assert shadow.text != stored.text  # it is upstream's


async def test_a_threshold_can_only_tighten(world: World) -> None:
    """A caller may ask for closer matches than the operator, never for looser ones."""
    await world.ask(FRANCE)
    loosened = await world.ask(FRANCE_RELATED, headers={"x-cache-threshold": "0.5"})
    assert (loosened.kind, loosened.reason) == ("MISS", "below_threshold")
    assert float(loosened.headers["x-cache-similarity"]) > 0.5
    assert loosened.headers["x-cache-threshold"] == "0.9200"

    tight = await world.ask(FRANCE_REWORDED, headers={"x-cache-threshold": "0.9999"})
    assert (tight.kind, tight.reason) == ("MISS", "below_threshold")
    assert tight.headers["x-cache-threshold"] == "0.9999"
    assert (await world.ask(FRANCE, headers={"x-cache-threshold": "1"})).tier == "exact"


async def test_a_lifetime_can_only_be_shortened(make_world: WorldMaker) -> None:
    """`X-Cache-TTL` below the operator's counts, above it does not; what is over is over."""

    def left(answered: Answered) -> int:
        return int(re.search(r"ttl=(\d+)", answered.headers["cache-status"])[1])  # type: ignore[index]

    async with make_world(model="none", ttl="1h") as world:
        for text, asked, at_most in (("one", "60", 60), ("two", "999999", 3_600)):
            await world.ask(text, headers={"x-cache-ttl": asked})
            assert at_most - 30 <= left(await world.ask(text)) <= at_most

        await world.ask("three", headers={"x-cache-ttl": "1"})
        before = awake()

        async def gone() -> bool:
            return (await world.ask("three")).kind == "MISS"

        await world.until(gone)
        assert awake() - before < 4


async def test_namespaces_part_what_is_otherwise_equal(world: World) -> None:
    """I2: neither an exact repeat nor a paraphrase crosses from one namespace into another."""
    await world.ask(FRANCE, headers={"x-cache-namespace": "a"})
    for headers in ({"x-cache-namespace": "b"}, {"x-cache-namespace": "A"}, {}):
        assert (await world.ask(FRANCE, headers=headers)).kind == "MISS"
        reworded = await world.ask(
            FRANCE_REWORDED, headers=headers | {"cache-control": "only-if-cached"}
        )
        assert reworded.status == 200  # its own namespace's, stored just now
    assert (await world.ask(FRANCE, headers={"x-cache-namespace": "a"})).kind == "HIT"
    assert world.upstream.calls == 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("x-cache-mode", "sometimes"),
        ("x-cache-threshold", "1.5"),
        ("x-cache-threshold", "nan"),
        ("x-cache-threshold", "high"),
        ("x-cache-ttl", "0"),
        ("x-cache-ttl", "-5"),
        ("x-cache-ttl", "7d"),
        ("x-cache-namespace", "n" * 201),
        ("x-cache-tags", ",".join(f"t{n}" for n in range(33))),
    ],
)
def test_a_directive_that_cannot_be_obeyed_is_refused_by_name(name: str, value: str) -> None:
    """A wrong directive is an error that names itself, not a guess."""
    with pytest.raises(BadRequest, match=f"(?i){name}"):
        directives([(name.encode(), value.encode())])


async def test_a_refusal_of_ours_is_not_worth_a_retry(make_world: WorldMaker) -> None:
    """400 in OpenAI's shape, `x-should-retry: false`, upstream not asked, counted as an error."""
    async with make_world(model="none") as world:
        bad_header = await world.ask(FRANCE, headers={"x-cache-mode": "sometimes"})
        bad_body = await world.send("POST", "/v1/chat/completions", b"{", JSON)
        for refused in (bad_header, bad_body):
            assert refused.status == 400
            assert refused.json["error"]["type"] == "invalid_request_error"
            assert refused.headers["x-should-retry"] == "false"
        assert world.upstream.calls == 0
        assert (await world.stats())["errors"] == 2


# What callers are told ---------------------------------------------------------------------------


async def test_a_hit_says_what_it_is(world: World) -> None:
    """RFC 9211's `Cache-Status`, `Age`, and this cache's own headers, all telling one story."""
    await world.ask(FRANCE)
    exact, similar = await world.ask(FRANCE), await world.ask(FRANCE_REWORDED)

    for answered, tier in ((exact, "exact"), (similar, "semantic")):
        told = answered.headers
        assert answered.kind == "HIT"
        assert answered.tier == tier
        assert re.fullmatch(r"\d+", told["age"])
        status = re.fullmatch(
            r'cache-proxy; hit; ttl=(\d+); detail="(\w+) sim=([\d.]+) thr=([\d.]+)"',
            told["cache-status"],
        )
        assert status
        assert 604_700 <= int(status[1]) <= 604_800
        assert status[2] == tier
        assert abs(float(status[3]) - float(told["x-cache-similarity"])) < 0.001
        assert float(status[4]) == float(told["x-cache-threshold"]) == 0.92
        assert float(told["x-cache-similarity"]) >= 0.92
        assert re.fullmatch(r"[0-9a-f]{40}", told["x-cache-entry"])
        assert told["cache-control"] == "private, no-store"  # nothing downstream may keep a match
        assert "x-cache-reason" not in told
    assert exact.headers["x-cache-similarity"] == "1.0000"
    assert exact.headers["x-cache-entry"] == similar.headers["x-cache-entry"]


async def test_what_a_hit_saved_is_what_its_answer_cost(world: World) -> None:
    """`X-Cache-Saved-USD` is the stored answer's own usage at the published price."""
    await world.ask(FRANCE, model="gpt-4o-mini")
    hit = await world.ask(FRANCE, model="gpt-4o-mini")
    usage = world.upstream.seen[0].usage
    dollars = (usage["prompt_tokens"] * 0.15 + usage["completion_tokens"] * 0.60) / 1e6
    assert float(hit.headers["x-cache-saved-usd"]) == pytest.approx(dollars, rel=0.001)

    await world.ask(FRANCE, model="my-own-finetune")
    unpriced = await world.ask(FRANCE, model="my-own-finetune")
    assert unpriced.kind == "HIT"
    assert "x-cache-saved-usd" not in unpriced.headers  # unknown is not zero


async def test_a_miss_and_a_bypass_say_why(world: World) -> None:
    """`X-Cache-Reason` names the reason, `Cache-Status` puts it in RFC 9211's words."""
    for answered, kind, forwarded, reason in (
        (await world.ask(FRANCE), "MISS", "miss", "unaccepted"),
        (await world.ask("Name a colour of the rainbow."), "MISS", "miss", "below_threshold"),
        (await world.ask("Warm?", temperature=1.9), "BYPASS", "bypass", "temperature"),
        (await world.ask("What happened today?"), "BYPASS", "bypass", "time_bound"),
        (await world.send("GET", "/v1/models"), "BYPASS", "bypass", "passthrough"),
    ):
        told = answered.headers
        assert (answered.kind, answered.reason) == (kind, reason)
        assert told["cache-status"] == (
            f'cache-proxy; fwd={forwarded}; fwd-status=200; detail="{reason}"'
        )
        assert not {"age", "x-cache-tier", "x-cache-entry", "x-cache-saved-usd"} & told.keys()


async def test_a_veto_names_its_guard(world: World) -> None:
    """A near text that must not share an answer is a miss that says which guard spoke."""
    await world.ask("How do I turn on dark mode?")
    other = await world.ask("How do I turn off dark mode?")
    assert (other.kind, other.reason) == ("MISS", "guard")
    assert other.headers["x-cache-veto"]
    assert float(other.headers["x-cache-similarity"]) >= 0.85


async def test_who_shares_a_call_is_told_so(make_world: WorldMaker) -> None:
    """`X-Cache-Collapsed: 1` and RFC 9211's `collapsed` for all but the one that went upstream."""
    async with make_world(model="none") as world:
        await world.ask("anything, so that the key is known to be good")
        world.upstream.script = lambda seen: replace(echo(seen), delay=0.3)
        answers = await asyncio.gather(*(world.ask(FRANCE) for _ in range(3)))

        shared = [a for a in answers if a.headers.get("x-cache-collapsed") == "1"]
        assert len(shared) == 2
        assert all(a.kind == "MISS" for a in answers)
        for answered in answers:
            assert ("; collapsed;" in answered.headers["cache-status"]) is (answered in shared)
        assert {a.body for a in answers} == {answers[0].body}
        assert world.upstream.calls == 2


async def test_an_answer_of_our_own_claims_no_forwarding(make_world: WorldMaker) -> None:
    """RFC 9211 2: a cache says nothing in `Cache-Status` of an answer that it made up itself."""
    async with make_world(model="none") as world:
        refused = await world.ask(FRANCE, headers={"x-cache-mode": "sometimes"})
        nothing = await world.ask(FRANCE, headers={"cache-control": "only-if-cached"})
        for answered in (refused, nothing):
            assert "cache-status" not in answered.headers
        assert nothing.reason == "unaccepted"


async def test_upstreams_headers_pass_on_a_miss_and_are_never_replayed(world: World) -> None:
    """I4: cookies, limits and request ids belong to one call; nor do they forbid storing."""
    once = (
        ("content-type", "application/json"),
        ("set-cookie", "__cf_bm=abc; path=/"),
        ("set-cookie", "_cfuvid=def"),
        ("cache-control", "no-cache, no-store, private"),
        ("x-ratelimit-remaining-requests", "41"),
        ("x-request-id", "req_1"),
        ("openai-processing-ms", "212"),
        ("retry-after", "7"),
        ("x-cache", "Hit from a CDN"),
        ("x-cache-hits", "9"),
    )

    def script(seen: Seen) -> Reply:
        return Reply(parts=whole("said", seen).parts, headers=once)

    world.upstream.script = script
    miss = await world.ask(FRANCE)
    hits = [await world.ask(FRANCE), await world.ask(FRANCE, stream=True)]

    for name, value in once[3:8]:
        assert miss.headers[name] == value
    assert miss.kind == "MISS"  # a CDN's word for it does not count
    assert "x-cache-hits" not in miss.headers
    for hit in hits:
        assert hit.kind == "HIT"
        assert not {name for name, _ in once[1:8] if name != "cache-control"} & hit.headers.keys()
        assert hit.headers["cache-control"] == "private, no-store"


async def test_upstreams_cookies_reach_their_own_caller_and_go_nowhere_else(
    make_world: WorldMaker,
) -> None:
    """I10 and tenancy: what upstream sets for one caller is never sent with another's request."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        upstream.reply = (
            b"HTTP/1.1 200 OK\r\nset-cookie: session=alice\r\nset-cookie: two=2; path=/\r\n"
            b"content-length: 2\r\n\r\nhi"
        )
        head, _ = await spoken(world, raw(b"GET", b"/v1/files", b"Authorization: Bearer sk-a"))
        assert head.count(b"set-cookie: ") == 2
        await spoken(world, raw(b"GET", b"/v1/files", b"Authorization: Bearer sk-b"))
        assert upstream.values(b"cookie") == []
        await spoken(world, raw(b"GET", b"/v1/files", b"Cookie: mine=1; also=2"))
        assert upstream.values(b"cookie") == [b"mine=1; also=2"]


async def test_a_hit_has_an_id_and_a_date_of_its_own(make_world: WorldMaker) -> None:
    """A stored answer comes as a new completion: SDKs and logs key on the id."""
    async with make_world(model="none") as world:
        miss = await world.ask(FRANCE)
        hits = [await world.ask(FRANCE) for _ in range(2)]
        stream = await world.ask(FRANCE, stream=True)
        events = [orjson.loads(e[6:]) for e in stream.body.split(b"\n\n") if e[:7] == b"data: {"]

        ids = [miss.json["id"], *(hit.json["id"] for hit in hits), events[0]["id"]]
        assert len(set(ids)) == 4
        assert all(name.startswith("chatcmpl-") for name in ids)
        assert len({event["id"] for event in events}) == 1
        for created in (*(hit.json["created"] for hit in hits), events[0]["created"]):
            assert abs(created - time.time()) < 60
        assert hits[0].json | {"id": "", "created": 0} == miss.json | {"id": "", "created": 0}


# Purging -----------------------------------------------------------------------------------------


async def test_a_purge_takes_what_it_names_and_nothing_else(world: World) -> None:
    """By tag, entry, namespace, model, age and everything: gone at once, exactly and by meaning."""
    rows: list[tuple[str, dict[str, str], str]] = [
        ("What is the boiling point of water?", {"x-cache-tags": "doc:42, faq"}, "gpt-4o-mini"),
        ("Who wrote the play Hamlet?", {"x-cache-tags": "faq"}, "gpt-4o-mini"),
        ("How many legs does a spider have?", {"x-cache-namespace": "team-a"}, "gpt-4o-mini"),
        ("Which planet is the largest?", {}, "gpt-4.1-nano"),
        ("What does the word ubiquitous mean?", {}, "gpt-4o-mini"),
    ]

    async def ask(n: int) -> Answered:
        text, headers, model = rows[n]
        return await world.ask(text, headers=headers, model=model)

    async def purge(**what: Any) -> Answered:
        token = {"authorization": f"Bearer {world.token}", "content-type": "application/json"}
        return await world.send("POST", "/purge", orjson.dumps(what), token, base=world.admin)

    async def held() -> list[int]:
        """Which rows are served; nothing is asked of upstream, so nothing is stored anew."""
        found = []
        for n, (text, headers, model) in enumerate(rows):
            asked = headers | {"cache-control": "only-if-cached"}
            if (await world.ask(text, headers=asked, model=model)).status == 200:
                found.append(n)
        return found

    for n in range(len(rows)):
        await ask(n)
    assert await held() == [0, 1, 2, 3, 4]
    assert (await purge(tag="doc:42")).json["deleted"] == 1
    assert await held() == [1, 2, 3, 4]
    assert (await purge(namespace="team-a")).json["deleted"] == 1
    assert await held() == [1, 3, 4]
    assert (await purge(model="gpt-4.1-nano")).json["deleted"] == 1
    assert await held() == [1, 4]
    entry = (await ask(4)).headers["x-cache-entry"]
    assert (await purge(entry=entry)).json["deleted"] == 1
    assert await held() == [1]
    assert (await purge(older_than_seconds=3_600)).json["deleted"] == 0
    assert await held() == [1]

    await world.until(lambda: _aged(world, rows[1][0]))
    assert (await purge(older_than_seconds=0)).json["deleted"] == 1
    assert await held() == []

    await ask(0)
    await ask(2)
    assert (await purge(all=True)).json["deleted"] == 2
    assert await held() == []
    reworded = await world.ask(
        "What's the boiling point of water?", headers={"cache-control": "only-if-cached"}
    )
    assert reworded.status == 504
    assert [(await ask(0)).kind for _ in range(2)] == ["MISS", "HIT"]  # storing goes on


async def _aged(world: World, text: str) -> bool:
    return int((await world.ask(text, headers={"x-cache-tags": "faq"})).headers["age"]) >= 1


async def test_a_purge_needs_the_token_and_a_target(make_world: WorldMaker) -> None:
    """Nothing is purged by accident or by a stranger, nor through the proxy's own port."""
    async with make_world(model="none") as world:
        await world.ask(FRANCE)
        token = {"authorization": f"Bearer {world.token}", "content-type": "application/json"}
        stranger = {"authorization": "Bearer sk-one", "content-type": "application/json"}
        for body, headers, status in (
            ({"all": True}, stranger, 401),
            ({}, token, 422),
            ({"all": True, "tag": "x"}, token, 422),
            ({"entry": "../../x"}, token, 422),
            ({"tags": "x"}, token, 422),
        ):
            answered = await world.send(
                "POST", "/purge", orjson.dumps(body), headers, base=world.admin
            )
            assert answered.status == status
        await world.send("POST", "/purge", b'{"all":true}', token)  # passed on like any path
        assert world.upstream.seen[-1].path.endswith("/purge")
        assert (await world.ask(FRANCE)).kind == "HIT"


# Bytes -------------------------------------------------------------------------------------------

WHOLE = (
    b'{ "id":"chatcmpl-x",\r\n  "object" : "chat.completion", "created":1.7e9, "model":"m",\n'
    b'\t"choices":[{"index":0,"message":{"role":"assistant","content":"caf\\u00e9 \xc3\xa9"},'
    b'"finish_reason":"stop","x":1.50}],"usage":{"prompt_tokens":1,"completion_tokens":2}}\n\n'
)


async def test_a_whole_answer_is_passed_on_byte_for_byte(make_world: WorldMaker) -> None:
    """A miss is upstream's answer: spacing, escapes, numbers and unknown members untouched."""
    async with make_world(model="none") as world:
        world.upstream.script = lambda seen: Reply(parts=(WHOLE,))
        assert (await world.ask(FRANCE)).body == WHOLE
        hit = await world.ask(FRANCE)
        assert hit.kind == "HIT"
        assert hit.text == "café é"
        assert hit.json["choices"][0]["x"] == 1.5


def chunk(delta: dict[str, Any], finish: str | None = None, **members: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    base = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return orjson.dumps(base | {"choices": [choice]} | members)


USAGE = orjson.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "choices": [],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
)


def written(line: bytes, *, usage: bytes | None) -> bytes:
    """One stream in an unusual hand: comments, event names, ids, spaces left out, split data."""
    first, second = chunk({"role": "assistant", "content": "one "}), chunk({"content": "two"})
    half = second.index(b'"choices"')
    events = [
        [b": OPENROUTER PROCESSING"],
        [b"event: completion.chunk", b"id: 7", b"data:" + first],
        [b"data: " + second[:half], b"data: " + second[half:]],
        [b":", b"retry: 3000"],
        [b"data: " + chunk({}, "stop")],
        *([[b"data: " + usage]] if usage is not None else []),
        [b"data: [DONE]"],
    ]
    return b"".join(line.join(event) + line + line for event in events)


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
async def test_a_stream_is_passed_on_byte_for_byte(make_world: WorldMaker, line: bytes) -> None:
    """Whatever upstream's hand and however the network cuts it, only the usage chunk that the
    proxy asked for and the client did not is taken out; and the answer is kept."""
    full, less = written(line, usage=USAGE), written(line, usage=None)

    async with make_world(model="none") as world:
        for size in (1, 7, len(full)):

            def script(seen: Seen, size: int = size) -> Reply:
                parts = tuple(full[at : at + size] for at in range(0, len(full), size))
                return Reply(parts=(*parts, b""), headers=SSE)

            world.upstream.script = script
            plain = await world.ask(f"count by {size}", stream=True)
            assert plain.kind == "MISS"
            assert plain.body == less
            asked = await world.ask(
                f"count with usage by {size}", stream=True, stream_options={"include_usage": True}
            )
            assert asked.body == full
            for text in (f"count by {size}", f"count with usage by {size}"):
                hit = await world.ask(text)
                assert (hit.kind, hit.text) == ("HIT", "one two")
                assert hit.json["usage"]["total_tokens"] == 3


async def test_a_usage_that_rides_with_text_stays(make_world: WorldMaker) -> None:
    """Only a chunk that carries nothing else is taken out: some providers repeat usage in each."""
    running = {"usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    stream = b"".join(
        b"data: " + event + b"\n\n"
        for event in (
            chunk({"content": 'the "usage" chunk'}, **running),
            chunk({}, "stop", **running),
            b"[DONE]",
        )
    )
    async with make_world(model="none") as world:
        world.upstream.script = lambda seen: Reply(parts=(stream, b""), headers=SSE)
        assert (await world.ask(FRANCE, stream=True)).body == stream
        assert (await world.ask(FRANCE)).json["usage"]["completion_tokens"] == 1


async def test_an_answer_may_speak_of_the_end_of_a_stream(make_world: WorldMaker) -> None:
    """I4: the terminal event ends a stream, its name in an answer's text does not."""
    said = "A stream ends with\ndata: [DONE]\n\nand then the connection closes."

    def script(seen: Seen) -> Reply:
        parts = [chunk({"role": "assistant", "content": said}), chunk({}, "stop"), USAGE, b"[DONE]"]
        return Reply(parts=tuple(b"data: " + p + b"\n\n" for p in parts), headers=SSE, pause=0.02)

    async with make_world(model="none") as world:
        world.upstream.script = script
        assert (await world.ask(FRANCE, stream=True)).text == said
        hit = await world.ask(FRANCE)
        assert (hit.kind, hit.text) == ("HIT", said)
        assert (await world.stats())["tokens_spent"] == {"input": 1, "output": 2}


async def test_an_event_of_any_size_gets_through(make_world: WorldMaker) -> None:
    """A stream that carries an image in one event is too large to keep, not too large to pass."""
    image = b'data: {"choices":[],"image":"' + b"A" * 5_000_000 + b'"}\n\n'
    stream = b"data: " + chunk({"content": "look"}) + b"\n\n" + image + b"data: [DONE]\n\n"
    async with make_world(model="none") as world:
        parts = tuple(stream[at : at + 100_000] for at in range(0, len(stream), 100_000))
        world.upstream.script = lambda seen: Reply(parts=parts, headers=SSE)
        for _ in range(2):
            answered = await world.ask(FRANCE, stream=True)
            assert (answered.kind, answered.body == stream) == ("MISS", True)


async def test_a_provider_that_refuses_to_tell_usage_is_asked_without(
    make_world: WorldMaker,
) -> None:
    """422 for the field that the proxy added: asked once more without, and remembered."""

    def strict(seen: Seen) -> Reply:
        if "stream_options" in seen.json:
            text = b'{"detail":[{"loc":["body","stream_options"],"msg":"extra fields"}]}'
            return Reply(422, parts=(text,))
        return streamed("as you like", seen)

    async with make_world(model="none") as world:
        world.upstream.script = strict
        first = await world.ask("one", stream=True)
        assert (first.status, first.text) == (200, "as you like")
        assert ["stream_options" in seen.json for seen in world.upstream.seen] == [True, False]
        assert (await world.ask("two", stream=True)).text == "as you like"
        assert ["stream_options" in s.json for s in world.upstream.seen[2:]] == [False]
        assert (await world.ask("one")).kind == "HIT"
        own = await world.ask("three", stream=True, stream_options={"include_usage": True})
        assert own.status == 422  # what the client asked itself is its own affair


async def test_a_refusal_for_another_reason_is_passed_on_at_once(make_world: WorldMaker) -> None:
    """A 400 or 422 that does not speak of the added field is upstream's answer, and the last."""
    async with make_world(model="none") as world:
        for status in (400, 422):
            body = b'{"error":{"message":"max_tokens is too large"}}'
            world.upstream.script = lambda seen, s=status, b=body: Reply(s, parts=(b,))
            before = world.upstream.calls
            refused = await world.ask(f"too much {status}", stream=True)
            assert (refused.status, refused.body) == (status, body)
            assert world.upstream.calls == before + 1


async def test_the_clients_bytes_reach_upstream(make_world: WorldMaker) -> None:
    """A body is never rewritten: spacing, escapes, order and unknown fields arrive as sent; a
    stream's gains one member at its front and loses nothing."""
    plain = (
        b'{"model": "m",\n "messages":[{"role":"user","content":"caf\\u00e9 \xc3\xa9"}],"z":1.50}'
    )
    stream = plain[:-1] + b', "stream" : true }'
    async with make_world(model="none") as world:
        await world.send("POST", "/v1/chat/completions", plain, JSON)
        assert world.upstream.seen[-1].body == plain
        await world.send("POST", "/v1/chat/completions?v=2", stream, JSON)
        added = b'"stream_options":{"include_usage":true},'
        assert world.upstream.seen[-1].body == stream[:1] + added + stream[1:]


# Everything else ---------------------------------------------------------------------------------


async def test_other_paths_pass_whatever_the_method(make_world: WorldMaker) -> None:
    """What is not cached is untouched: method, path, query, body, status, headers and answer."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        upstream.reply = (
            b"HTTP/1.1 418 Short and stout\r\ncontent-length: 4\r\nx-pot: tea\r\n\r\n\x00\xff\r\n"
        )
        for method in (b"GET", b"POST", b"PUT", b"PATCH", b"DELETE", b"OPTIONS"):
            body = bytes(range(256)) if method.startswith(b"P") else b""
            length = (b"Content-Length: %d" % len(body),) if body else ()
            path = b"/v1/batches?limit=2&after=b%20c"
            head, answer = await spoken(world, raw(method, path, b"X-A: 1", *length, body=body))
            assert upstream.line == method + b" " + path + b" HTTP/1.1"
            assert upstream.values(b"x-a") == [b"1"]
            assert upstream.bodies[-1] == body
            assert head.startswith(b"HTTP/1.1 418")
            assert b"\r\nx-pot: tea" in head
            assert b"\r\nx-cache: BYPASS" in head
            assert answer == b"\x00\xff\r\n"


async def test_head_has_a_length_and_no_body(make_world: WorldMaker) -> None:
    """HEAD passes as HEAD: the length is upstream's, and nothing follows."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        upstream.reply = b"HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"
        head, answer = await spoken(world, raw(b"HEAD", b"/v1/files/f"))
        assert upstream.line == b"HEAD /v1/files/f HTTP/1.1"
        assert b"\r\ncontent-length: 1234" in head
        assert answer == b""


async def test_no_content_stays_no_content(make_world: WorldMaker) -> None:
    """204 and 304 have no body, and the connection is not left waiting for one."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        for status in (b"204 No Content", b"304 Not Modified"):
            upstream.reply = b"HTTP/1.1 " + status + b'\r\netag: "x"\r\n\r\n'
            head, answer = await spoken(world, raw(b"GET", b"/v1/files/f"))
            assert head.startswith(b"HTTP/1.1 " + status[:3])
            assert b'\r\netag: "x"' in head
            assert answer in (b"", b"0\r\n\r\n")


TARGETS = [
    b"/v1/files/a%2Fb%20c?name=x%20y&name=z&q=a+b",
    b"/v1/files/%E4%BD%A0%E5%A5%BD",
    b"/v1//files//x/",
    b"/v1/files/x;v=1,2'(a)!*$&@:=",
    b"/v1/files?q=a%2Bb%26c%3D&empty=&flag",
]
ODD_TARGETS = [
    b"/v1/%7Euser/%41",
    b"/v1/files?sig=%7e%41",
    b"/v1/files/%e4",
    b"/v1/a/../files",
    b"/v1/%2e%2e/files",
    b"/v1/files?a[]=1&b={}|",
    b"/v1/files?q=100%",
]


@pytest.mark.parametrize(
    "targets",
    [
        TARGETS,
        ODD_TARGETS,
    ],
    ids=["usual", "odd"],
)
async def test_a_path_arrives_as_it_was_spelt(make_world: WorldMaker, targets: list[bytes]) -> None:
    """Percent signs, doubled slashes and order are the client's: signatures are made over them."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        for path in targets:
            await spoken(world, raw(b"GET", path))
            assert upstream.line == b"GET " + path + b" HTTP/1.1"


async def test_request_headers_arrive_one_by_one(make_world: WorldMaker) -> None:
    """A header given twice arrives twice, and its bytes are the client's."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        sent = (b"X-A: 1", b"X-A: 2", b"X-Name: \xc3\xa9", b"X-Old: caf\xe9")
        await spoken(world, raw(b"GET", b"/v1/files", *sent))
        assert upstream.values(b"x-a") == [b"1", b"2"]
        assert upstream.values(b"x-name") == [b"\xc3\xa9"]


async def test_response_headers_arrive_one_by_one(make_world: WorldMaker) -> None:
    """A header that upstream gives twice arrives twice, and its bytes are upstream's."""
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        upstream.reply = (
            b"HTTP/1.1 200 OK\r\nLink: <a>\r\nLink: <b>\r\nX-Name: \xc3\xa9\r\nX-Old: caf\xe9\r\n"
            b"Keep-Alive: timeout=5\r\nConnection: x-hop\r\nX-Hop: 1\r\ncontent-length: 2\r\n\r\nhi"
        )
        head, _ = await spoken(world, raw(b"GET", b"/v1/files"))
        lines = head.lower().split(b"\r\n")
        assert [line for line in lines if line.startswith(b"link")] == [b"link: <a>", b"link: <b>"]
        assert b"x-name: \xc3\xa9" in lines
        assert b"x-old: caf\xe9" in lines
        assert not [line for line in lines if line.startswith((b"keep-alive", b"x-hop"))]


async def test_a_coded_answer_is_left_coded(make_world: WorldMaker) -> None:
    """gzip passes as gzip, with the client's own Accept-Encoding asked of upstream."""
    packed = gzip.compress(b"x" * 1_000)
    async with wire() as upstream, make_world(upstream=upstream.base_url, model="none") as world:
        upstream.reply = (
            b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
        ) + packed
        head, answer = await spoken(
            world, raw(b"GET", b"/v1/files/f/content", b"Accept-Encoding: gzip, br")
        )
        assert upstream.values(b"accept-encoding") == [b"gzip, br"]
        assert b"\r\ncontent-encoding: gzip" in head
        assert answer == packed
        await spoken(world, raw(b"GET", b"/v1/files/f/content"))
        assert upstream.values(b"accept-encoding") == []


async def test_a_large_upload_and_download_arrive_whole(make_world: WorldMaker) -> None:
    """Several MB of multipart binary each way, in chunks of no announced length."""
    blob = bytes(range(256)) * 12_000  # 3 MB
    boundary = b"--b\r\ncontent-disposition: form-data; name=file\r\n\r\n"
    upload = boundary + blob + b"\r\n--b--\r\n"

    async def parts() -> AsyncIterator[bytes]:
        for at in range(0, len(upload), 50_000):
            yield upload[at : at + 50_000]

    async with make_world(model="none") as world:
        out = tuple(blob[at : at + 60_000] for at in range(0, len(blob), 60_000))
        world.upstream.script = lambda seen: Reply(
            parts=out, headers=(("content-type", "application/octet-stream"),)
        )
        headers = [(b"content-type", b"multipart/form-data; boundary=b")]
        response = await world.client.send(
            "POST",
            world.base + "/files",
            headers,
            parts(),
            read_seconds=60,
        )
        answer = b"".join([part async for part in response.chunks()])
        await response.close()
        seen = world.upstream.seen[-1]
        assert seen.body == upload
        assert seen.headers["content-type"] == "multipart/form-data; boundary=b"
        assert hashlib.sha256(answer).digest() == hashlib.sha256(blob).digest()


async def test_bytes_flow_both_ways_as_they_come(make_world: WorldMaker) -> None:
    """Nothing is gathered on the way: upstream has the first half of an upload before the client
    sends the second, and the client has the first half of an answer before upstream ends it."""
    got, go = asyncio.Queue[bytes](), asyncio.Event()

    async def upstream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await got.put(await reader.readexactly(4))
        await got.put(await reader.readexactly(4))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nbody")
        await go.wait()
        writer.write(b"tail")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(upstream, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with make_world(upstream=f"http://127.0.0.1:{port}/v1", model="none") as world:
        url = urlsplit(world.base)
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        async with asyncio.timeout(60):
            writer.write(raw(b"POST", b"/v1/audio/transcriptions", b"Content-Length: 8"))
            writer.write(b"half")
            assert await got.get() == b"half"
            writer.write(b"rest")
            assert await got.get() == b"rest"
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(4) == b"body"
            go.set()
            assert await reader.read() == b"tail"
        writer.close()
    server.close()


# Base paths --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "paths", "arrives"),
    [
        ("/v1", ("/v1/chat/completions", "/chat/completions"), "/v1/chat/completions"),
        (
            "/api/v1",
            ("/v1/chat/completions", "/api/v1/chat/completions"),
            "/api/v1/chat/completions",
        ),
        (
            "/compatible-mode/v1",
            ("/compatible-mode/v1/chat/completions", "/v1/chat/completions"),
            "/compatible-mode/v1/chat/completions",
        ),
        ("", ("/v1/chat/completions",), "/v1/chat/completions"),
        (
            "/openai",
            ("/openai/deployments/m/chat/completions?api-version=2024-10-21",),
            "/openai/deployments/m/chat/completions",
        ),
        (
            "",
            ("/openai/deployments/m/chat/completions?api-version=2024-10-21",),
            "/openai/deployments/m/chat/completions",
        ),
    ],
)
async def test_base_paths_are_spelt_as_the_provider_spells_them(
    make_world: WorldMaker, base: str, paths: tuple[str, ...], arrives: str
) -> None:
    """One question under every spelling of the same operation: one call upstream, then hits."""
    body = b'{"messages":[{"role":"user","content":"Where am I?"}],"model":"m"}'
    async with scripted_upstream() as upstream:
        root = upstream.base_url.removesuffix("/v1")
        async with make_world(model="none", upstream=root + base) as world:
            asked = [await world.send("POST", path, body, JSON) for path in (*paths, *paths)]
        kinds = [answered.kind for answered in asked]
        assert kinds == ["MISS"] + ["HIT"] * (2 * len(paths) - 1)
        seen = upstream.seen[0]
        assert seen.path == arrives
        assert seen.query == paths[0].partition("?")[2].encode()


async def test_azures_query_and_deployment_partition(make_world: WorldMaker) -> None:
    """I2: another API version or deployment is another question; the key in the URL is not."""
    body = b'{"messages":[{"role":"user","content":"Where am I?"}]}'
    path = "/openai/deployments/{}/chat/completions?api-version={}"
    async with scripted_upstream() as upstream:
        root = upstream.base_url.removesuffix("/v1")
        async with make_world(model="none", upstream=root) as world:
            headers = {"content-type": "application/json", "api-key": "azure-one"}
            kinds = [
                (await world.send("POST", path.format(*pair), body, headers)).kind
                for pair in (("m", "1"), ("m", "1"), ("m", "2"), ("n", "1"), ("m", "2"))
            ]
    assert kinds == ["MISS", "HIT", "MISS", "MISS", "HIT"]


# What is kept (I4) -------------------------------------------------------------------------------

Script = Callable[[Seen], Reply]


def _changed(message: dict[str, Any] | None = None, **changes: Any) -> Script:
    """A whole answer whose one choice is changed."""

    def script(seen: Seen) -> Reply:
        body = completion("a fine answer", seen)
        body["choices"][0]["message"] |= message or {}
        body["choices"][0] |= changes
        return Reply(parts=(orjson.dumps(body),))

    return script


def _whole(status: int = 200, headers: tuple[tuple[str, str], ...] = (), **changes: Any) -> Script:
    def script(seen: Seen) -> Reply:
        body = orjson.dumps(completion("a fine answer", seen) | changes)
        if ("content-encoding", "gzip") in headers:
            body = gzip.compress(body)
        return Reply(status, (body,), (("content-type", "application/json"), *headers))

    return script


def _raw(body: bytes) -> Script:
    return lambda seen: Reply(parts=(body,))


def _events(*events: bytes, done: bool = True) -> Script:
    parts = [b"data: " + event + b"\n\n" for event in events]
    if done:
        parts.append(b"data: [DONE]\n\n")
    return lambda seen: Reply(parts=(*parts, b""), headers=SSE)


CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TEXT = chunk({"role": "assistant", "content": "a fine answer"})

BAD: dict[str, tuple[bool, Script]] = {
    "status 201": (False, _whole(201)),
    "status 500": (False, _whole(500)),
    "status 429": (False, _whole(429)),
    "an error object in a 200": (False, _whole(error={"message": "overloaded", "code": 529})),
    "cut at the length limit": (False, _changed(finish_reason="length")),
    "filtered": (False, _changed(finish_reason="content_filter")),
    "no finish reason": (False, _changed(finish_reason=None)),
    "an unknown finish reason": (False, _changed(finish_reason="whatever")),
    "an error as the finish reason": (False, _changed(finish_reason="error")),
    "empty text": (False, _changed(message={"content": ""})),
    "no text": (False, _changed(message={"content": None})),
    "blank text": (False, _changed(message={"content": " \n"})),
    "a refusal": (False, _changed(message={"content": None, "refusal": "I cannot."})),
    "a tool call": (
        False,
        _changed(message={"content": None, "tool_calls": [CALL]}, finish_reason="tool_calls"),
    ),
    "a tool call that says stop": (False, _changed(message={"tool_calls": [CALL]})),
    "no choices": (False, _whole(choices=[])),
    "no JSON": (False, _raw(b"<html>busy</html>")),
    "half a JSON": (False, _raw(WHOLE[:120])),
    "nothing at all": (False, _raw(b"")),
    "gzip": (False, _whole(headers=(("content-encoding", "gzip"),))),
    "a stream cut at the length limit": (True, _events(TEXT, chunk({}, "length"))),
    "a stream filtered": (True, _events(TEXT, chunk({}, "content_filter"))),
    "a stream without a finish": (True, _events(TEXT)),
    "a stream without its end": (True, _events(TEXT, chunk({}, "stop"), done=False)),
    "a stream with an error": (
        True,
        _events(TEXT, b'{"error":{"message":"x"}}', chunk({}, "stop")),
    ),
    "a stream of no text": (True, _events(chunk({"role": "assistant"}), chunk({}, "stop"))),
    "a stream that refuses": (True, _events(TEXT, chunk({"refusal": "No."}), chunk({}, "stop"))),
    "a stream with a tool call": (
        True,
        _events(chunk({"tool_calls": [{"index": 0, **CALL}]}), chunk({}, "tool_calls")),
    ),
    "a stream with no JSON in it": (True, _events(TEXT, b"{oops", chunk({}, "stop"))),
}
GOOD: dict[str, tuple[bool, Script]] = {
    "a whole answer": (False, _whole()),
    "eos": (False, _changed(finish_reason="eos")),
    "a stream": (True, _events(TEXT, chunk({}, "stop"))),
    "a whole answer to a stream": (True, _whole()),
}


async def test_only_complete_good_answers_are_kept(make_world: WorldMaker) -> None:
    """I4: each of these reaches the client as it is, and upstream is asked again; a good answer
    in the same hands is kept."""
    sent: dict[int, bytes] = {}

    def noted(script: Script) -> Script:
        def noting(seen: Seen) -> Reply:
            reply = script(seen)
            sent[seen.number] = b"".join(reply.parts)
            return reply

        return noting

    async with make_world(model="none") as world:
        await world.ask("so that the key is known to be good")
        for name, (stream, script) in (BAD | GOOD).items():
            world.upstream.script = noted(script)
            before = world.upstream.calls
            first = await world.ask(name, stream=stream)
            second = await world.ask(name, stream=stream)
            asked = world.upstream.calls - before
            assert (name, asked) == (name, 2 if name in BAD else 1)
            if name in BAD:
                assert (name, second.kind) == (name, "MISS")
            assert (name, first.body) == (name, sent[before + 1])


async def test_a_filter_or_refusal_in_one_of_several_choices_keeps_all_out(
    make_world: WorldMaker,
) -> None:
    """I4: every choice must have finished well, and as many as were asked for must be there."""

    def choices(*words: str) -> Script:
        def script(seen: Seen) -> Reply:
            body = completion("x", seen)
            base = body["choices"][0]
            body["choices"] = [
                base | {"index": n, "finish_reason": word} for n, word in enumerate(words)
            ]
            return Reply(parts=(orjson.dumps(body),))

        return script

    async with make_world(model="none") as world:
        for words, kept in (
            (("stop", "length"), False),
            (("stop", "content_filter"), False),
            (("stop",), False),
            (("stop", "stop", "stop"), False),
            (("stop", "stop"), True),
        ):
            world.upstream.script = choices(*words)
            text = "two, please: " + " ".join(words)
            await world.ask(text, n=2)
            assert ((await world.ask(text, n=2)).kind == "HIT") is kept


async def test_an_answer_too_large_to_keep_is_passed_on(make_world: WorldMaker) -> None:
    """I7: beyond the cap an answer is upstream's alone."""
    async with make_world(model="none", max_answer_bytes=2_000) as world:
        for words, kept in ((50, True), (5_000, False)):
            text = "word " * words
            world.upstream.script = lambda seen, text=text: whole(text, seen)
            asked = f"{words} words"
            assert (await world.ask(asked)).text == text
            assert ((await world.ask(asked)).kind == "HIT") is kept


async def test_a_stream_cut_anywhere_is_never_kept(make_world: WorldMaker) -> None:
    """I4, I5: at every byte of a short stream, by a dropped line and by a tidy but early end; the
    client gets what came, then sees the cut, and the next one asks upstream anew."""
    sample = b"".join(
        b"data: " + event + b"\n\n"
        for event in (b'{"choices":[{"index":0,"delta":{"content":"ab"},"finish_reason":"stop"}]}',)
    )
    sample += b"data: [DONE]\n\n"
    now: dict[str, Any] = {"at": len(sample), "cut": False}

    def script(seen: Seen) -> Reply:
        return Reply(parts=(sample[: now["at"]], b""), headers=SSE, cut=now["cut"])

    async with make_world(model="none") as world:
        world.upstream.script = script
        asked = {"stream_options": {"include_usage": True}, "stream": True}
        await world.ask("so that the key is known to be good", **asked)
        for now["cut"], now["at"] in itertools.product((True, False), range(len(sample) + 1)):
            arrived = now["at"] == len(sample)  # even if the line drops after the last byte
            before = world.upstream.calls
            seen_cuts = 0
            for _ in range(2):
                try:
                    got = await world.ask(f"{now}", **asked)
                    assert arrived or got.body == sample[: now["at"]]
                except UpstreamUnavailable:
                    seen_cuts += 1
            assert (now, world.upstream.calls - before) == (now, 1 if arrived else 2)
            assert arrived or seen_cuts == (2 if now["cut"] else 0)


async def test_tool_calls_are_kept_where_the_operator_wants_them(make_world: WorldMaker) -> None:
    """I4's one opt-in, for whole answers and streams."""
    async with make_world(model="none", store_tool_calls=True) as world:
        for name in ("a tool call", "a stream with a tool call"):
            stream, world.upstream.script = BAD[name]
            first = await world.ask(name, stream=stream)
            assert first.kind == "MISS"
            hit = await world.ask(name)
            assert hit.kind == "HIT"
            assert hit.json["choices"][0]["message"]["tool_calls"] == [CALL]
            assert hit.json["choices"][0]["finish_reason"] == "tool_calls"


async def test_a_shadow_request_leaves_what_it_finds_as_good_as_it_was(world: World) -> None:
    """What is stored anew in the place of an exact match has its vector again."""
    await world.ask(FRANCE)
    digest = bytes.fromhex((await world.ask(FRANCE)).headers["x-cache-entry"])
    (before,) = await world.sidecar.memory.store.fetch([digest])
    await world.ask(FRANCE, headers={"X-Cache-Mode": "shadow"})

    async def again() -> bool:
        (found,) = await world.sidecar.memory.store.fetch([digest])
        return found is not None and before is not None and found[0].body != before[0].body

    await world.until(again)
    (after,) = await world.sidecar.memory.store.fetch([digest])
    assert before is not None
    assert after is not None
    assert len(after[1]) == len(before[1]) > 0
