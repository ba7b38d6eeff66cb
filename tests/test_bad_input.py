"""What bad input promises: a clear refusal or upstream's own word, never a 5xx of ours.

Bodies come from seeded dice, framings from a table; the sidecar is a process of its own, so that
whatever it says in a panic would stand on its stderr.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.conftest import World, WorldMaker
from tests.rawhttp import Line, chat, post
from tests.scripted import Reply, Seen, echo, scripted_upstream
from tests.served import Served

pytestmark = pytest.mark.live

BODIES = 20_000
LINES = 16
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
GOOD = orjson.dumps(
    {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "fine"},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
    }
)
BAD = b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":null}}'


def terse(seen: Seen) -> Reply:
    """Cheap: says yes or no by turns, and looks at nothing."""
    ok = seen.number % 2
    return Reply(status=200 if ok else 400, parts=(GOOD if ok else BAD,))


# Bodies -----------------------------------------------------------------------------------------

ODD: Sequence[Any] = (
    *(None, True, False, 0, -1, 1e308, 2**63, -(2**64), 10**30, 0.1, "", " ", "x", "\x00"),
    *(
        "é",
        "e\u0301",
        "\u202e",
        "😀" * 20,
        "\ufeff",
        [],
        {},
        [[]],
        [{}],
        {"": ""},
        [None],
        ["a", 1],
    ),
    *([{"type": "text"}], [{"type": "text", "text": None}], {"type": "image_url"}, "a" * 5_000),
)
FIELDS = (
    *("model", "messages", "stream", "stream_options", "temperature", "n", "tools", "tool_choice"),
    *("response_format", "user", "metadata", "seed", "stop", "logprobs", "max_tokens", "input"),
    *("prompt", "suffix", "echo", "best_of", "encoding_format", "dimensions", "web_search_options"),
    *("modalities", "prediction", "functions", "store", "service_tier", "parallel_tool_calls"),
)


def sound(dice: random.Random) -> dict[str, Any]:
    """A body to spoil; few different ones, so that some are hits."""
    text = f"Question number {dice.randrange(50)}"
    return {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": text},
        ],
        "prompt": text,
        "input": [text, "more"],
    }


def wire(document: Any) -> bytes:
    """JSON as Python writes it, where orjson would refuse: wide numbers and the like."""
    import json

    return json.dumps(document, ensure_ascii=False).encode("utf-8", "surrogatepass")


def cut(dice: random.Random) -> bytes:
    whole = wire(sound(dice))
    return whole[: dice.randrange(len(whole))]


def flipped(dice: random.Random) -> bytes:
    whole = bytearray(wire(sound(dice)))
    for _ in range(dice.randrange(1, 4)):
        whole[dice.randrange(len(whole))] ^= 1 << dice.randrange(8)
    return bytes(whole)


def wrong_field(dice: random.Random) -> bytes:
    return wire(sound(dice) | {dice.choice(FIELDS): dice.choice(ODD)})


def wrong_fields(dice: random.Random) -> bytes:
    return wire(sound(dice) | {name: dice.choice(ODD) for name in dice.sample(FIELDS, 6)})


def missing_field(dice: random.Random) -> bytes:
    body = sound(dice)
    for name in dice.sample(sorted(body), dice.randrange(1, 4)):
        del body[name]
    return wire(body)


def wrong_message(dice: random.Random) -> bytes:
    body = sound(dice)
    names = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal")
    body["messages"].append(
        {"role": "user", "content": "x"} | {dice.choice(names): dice.choice(ODD)}
    )
    return wire(body)


def wrong_messages(dice: random.Random) -> bytes:
    return wire(sound(dice) | {"messages": [dice.choice(ODD) for _ in range(dice.randrange(5))]})


def wrong_part(dice: random.Random) -> bytes:
    part = {
        dice.choice(
            ("type", "text", "image_url", "input_audio", "file", "cache_control")
        ): dice.choice(ODD)
    }
    content = [{"type": "text", "text": "look"} | part, dice.choice(ODD)]
    return wire(sound(dice) | {"messages": [{"role": "user", "content": content}]})


def wrong_tool(dice: random.Random) -> bytes:
    tool = {"type": "function", "function": dice.choice(ODD)}
    return wire(sound(dice) | {"tools": [tool, dice.choice(ODD)], "tool_choice": dice.choice(ODD)})


def wrong_root(dice: random.Random) -> bytes:
    return wire(dice.choice(ODD))


def twice(dice: random.Random) -> bytes:
    name = dice.choice(FIELDS)
    pair = f'"{name}":{dice.choice(["1", "null", "[]", chr(34) * 2])},'.encode()
    return b"{" + pair + b'"a":1,' + pair + wire(sound(dice))[1:]


def deep(dice: random.Random) -> bytes:
    levels = dice.choice((50, 120, 250, 256, 1_000, 5_000))
    middle = dice.choice((b"[" * levels + b"]" * levels, b'{"a":' * levels + b"1" + b"}" * levels))
    return b'{"model":"m","messages":[{"role":"user","content":"x"}],"deep":' + middle + b"}"


def unclosed(dice: random.Random) -> bytes:
    return dice.choice((b"[", b'{"a":', b'["')) * dice.randrange(1, 20_000)


def literal(*literals: bytes) -> Callable[[random.Random], bytes]:
    """A field whose value is spelt like one of these."""

    def spelt(dice: random.Random) -> bytes:
        name = dice.choice(FIELDS).encode()
        value = dice.choice(literals)
        return b'{"' + name + b'":' + value + b',"model":"m","zz":1}'

    return spelt


def recoded(*codings: str) -> Callable[[random.Random], bytes]:
    def coded(dice: random.Random) -> bytes:
        return wire(sound(dice)).decode().encode(dice.choice(codings))

    return coded


def prefixed(*prefixes: bytes) -> Callable[[random.Random], bytes]:
    return lambda dice: dice.choice(prefixes) + wire(sound(dice))


def suffixed(*suffixes: bytes) -> Callable[[random.Random], bytes]:
    return lambda dice: wire(sound(dice)) + dice.choice(suffixes)


def noise(dice: random.Random) -> bytes:
    return dice.randbytes(dice.randrange(200))


def bad_utf8(dice: random.Random) -> bytes:
    spoilt = dice.choice((b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\x80"))
    return wire(sound(dice)).replace(b"Question", spoilt)


def form(dice: random.Random) -> bytes:
    return b"model=gpt-4o-mini&prompt=hello&n=" + str(dice.randrange(9)).encode()


def long_text(dice: random.Random) -> bytes:
    return chat(
        dice.choice(("a", "é ", "word ", "\n", "😀", "漢字", "\u200d")) * dice.randrange(3_000)
    )


def odd_text(dice: random.Random) -> bytes:
    points = (
        range(32),
        range(0x300, 0x370),
        range(0x200B, 0x2070),
        range(0xE000, 0xE100),
        range(0x1F000, 0x1F300),
    )
    return chat("".join(chr(dice.choice(dice.choice(points))) for _ in range(dice.randrange(60))))


def many_messages(dice: random.Random) -> bytes:
    turns = [
        {"role": dice.choice(("user", "assistant", "tool", "", "root")), "content": str(n)}
        for n in range(dice.randrange(400))
    ]
    return wire(sound(dice) | {"messages": turns})


def many_inputs(dice: random.Random) -> bytes:
    return wire(sound(dice) | {"input": [dice.choice(ODD) for _ in range(dice.randrange(50))]})


def token_inputs(dice: random.Random) -> bytes:
    value = [[dice.choice((1, -1, 2**70, "a", None)) for _ in range(4)] for _ in range(3)]
    return wire(sound(dice) | {"input": value, "prompt": value})


def long_keys(dice: random.Random) -> bytes:
    return wire(sound(dice) | {dice.choice("kéx\x00") * dice.randrange(3_000): dice.choice(ODD)})


def many_keys(dice: random.Random) -> bytes:
    return wire(sound(dice) | {f"k{n}": dice.choice(ODD) for n in range(dice.randrange(60))})


KINDS: Sequence[Callable[[random.Random], bytes]] = (
    *(cut, flipped, wrong_field, wrong_fields, missing_field, wrong_message, wrong_messages),
    *(wrong_part, wrong_tool, wrong_root, twice, deep, unclosed, noise, bad_utf8, form, long_text),
    *(odd_text, many_messages, many_inputs, token_inputs, long_keys, many_keys),
    lambda dice: b"",
    lambda dice: b" \n\t" * dice.randrange(100),
    lambda dice: b"\x00" * dice.randrange(1, 100),
    literal(b"NaN", b"Infinity", b"-Infinity", b"nan"),
    literal(b"1e999", b"-1e999", b"1" * 5_000, b"0." + b"1" * 5_000, b"1e-999"),
    literal(b"01", b"+1", b".5", b"1.", b"0x10", b"--1", b"1_000"),
    literal(
        rb'"\ud800"', rb'"\udfff x"', rb'"\ud83d\ud83d"', rb'"\u0000"', rb'"\uZZZZ"', rb'"\x41"'
    ),
    literal(b"'a'", b"undefined", b"None", b"True", b"/* c */ 1", b"[1,]", b'{"a":1,}', b"@@"),
    literal(b'"\n"', b'"\t"', b'"', b'"\\"', b'"\\q"'),
    recoded("utf-16", "utf-16-le", "utf-32", "utf-7", "cp037"),
    prefixed(b"\xef\xbb\xbf", b"\xff\xfe", b"//x\n", b")]}',\n", b"data: "),
    suffixed(b"{}", b"\x00", b",", b"]", b"\nnull", b"GET / HTTP/1.1\r\n\r\n"),
)


BATCH = 20  # requests on their way at once on one connection


async def pour(
    base: str, bodies: Sequence[tuple[str, bytes]], key: str = "sk-raw"
) -> tuple[Counter[int], list[tuple[int, bytes]]]:
    """All bodies over one keep-alive connection: statuses, and those answered with 5xx."""
    statuses: Counter[int] = Counter()
    failed = []
    async with asyncio.timeout(200), Line(base) as line:
        for start in range(0, len(bodies), BATCH):
            batch = bodies[start : start + BATCH]
            line.send(b"".join(post(body, path=path, key=key) for path, body in batch))
            for _, body in batch:
                head = await line.reader.readuntil(b"\r\n\r\n")
                status = int(head[9:12])
                length = re.search(rb"\r\ncontent-length: (\d+)\r\n", head)
                if length is None:
                    await line._chunks()
                else:
                    await line.reader.readexactly(int(length[1]))
                statuses[status] += 1
                if status >= 500:
                    failed.append((status, body[:200]))
    return statuses, failed


def drawn(number: int, seed: int) -> list[tuple[str, bytes]]:
    dice = random.Random(seed)
    paths = (PATHS[0], *PATHS)  # chat twice as often
    return [(dice.choice(paths), KINDS[n % len(KINDS)](dice)) for n in range(number)]


def test_the_menu_is_long_enough() -> None:
    assert len(KINDS) >= 30


async def test_twenty_thousand_bad_bodies_are_refused_or_upstreams_to_judge(tmp_path: Path) -> None:
    """No 5xx, no dropped line, no traceback; and a good question is answered after it all."""
    async with scripted_upstream() as upstream:
        upstream.script = terse
        served = Served(tmp_path / "data", upstream.base_url, "--model", "none")
        async with served:
            results = await asyncio.gather(
                *[pour(served.base, drawn(BODIES // LINES, seed)) for seed in range(LINES)]
            )
            assert [failed for _, failed in results if failed] == []
            statuses = sum((found for found, _ in results), Counter())
            assert statuses.total() == BODIES
            assert set(statuses) == {200, 400}
            assert statuses[400] > BODIES // 3
            assert statuses[200] > BODIES // 20
            upstream.script = echo
            async with Line(served.base) as line:
                line.send(post(chat("Still there?"), key="sk-good"))
                assert b"<Still there?>" in (await line.answer()).body
        assert served.err == ""


async def test_bad_bodies_do_no_more_harm_where_the_model_reads_them(world: World) -> None:
    """The same menu with encoder and index at work."""
    world.upstream.script = terse
    results = await asyncio.gather(
        *[pour(world.base, drawn(100, seed), key=f"sk-{seed}") for seed in range(1_000, 1_008)]
    )
    assert [failed for _, failed in results if failed] == []
    counted = await world.stats()
    kinds = sum(counted["hits"].values()) + counted["misses"] + counted["errors"]
    assert counted["requests"] == kinds + sum(counted["bypasses"].values()) == 800
    world.upstream.script = echo
    good = [await world.ask("What is the capital of France?") for _ in range(2)]
    assert [answered.kind for answered in good] == ["MISS", "HIT"]


# Framings ---------------------------------------------------------------------------------------

# Whatever the bytes after a bad framing are, they must never be answered as a request of their own.
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
H = b"Host: a\r\n"
P = b"POST /v1/chat/completions HTTP/1.1\r\n"
B = chat("framing")
N = b"%d" % len(B)
CL = b"Content-Length: "
TE = b"Transfer-Encoding: "

REFUSED: dict[str, bytes] = {
    "length and chunked": P + H + CL + b"5\r\n" + TE + b"chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": P + H + TE + b"chunked\r\n" + CL + b"5\r\n\r\n0\r\n\r\n",
    "two lengths": P + H + CL + N + b"\r\n" + CL + b"1\r\n\r\n" + B,
    "two equal lengths": P + H + (CL + N + b"\r\n") * 2 + b"\r\n" + B,
    "list of lengths": P + H + CL + N + b", " + N + b"\r\n\r\n" + B,
    "negative length": P + H + CL + b"-1\r\n\r\n" + B,
    "signed length": P + H + CL + b"+" + N + b"\r\n\r\n" + B,
    "hex length": P + H + CL + b"0x10\r\n\r\n" + B,
    "empty length": P + H + CL + b"\r\n\r\n" + B,
    "length in words": P + H + CL + b"ten\r\n\r\n" + B,
    "length with a space": P + H + CL + b"1 0\r\n\r\n" + B,
    "length beyond 64 bits": P + H + CL + b"99999999999999999999999\r\n\r\n" + B,
    "chunked twice": P + H + TE + b"chunked\r\n" + TE + b"chunked\r\n\r\n0\r\n\r\n",
    "chunked, then something": P + H + TE + b"chunked, identity\r\n\r\n0\r\n\r\n",
    "unknown coding": P + H + TE + b"xchunked\r\n\r\n0\r\n\r\n",
    "coding with a tab": P + H + TE + b"\x0bchunked\r\n\r\n0\r\n\r\n",
    "space before the colon": P + H + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "length, space before the colon": P + H + b"Content-Length : 3\r\n\r\nabc",
    "chunk size no number": P + H + TE + b"chunked\r\n\r\nxyz\r\n",
    "chunk size negative": P + H + TE + b"chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
    "chunk size too long": P + H + TE + b"chunked\r\n\r\nfffffffffffffffff\r\nhello\r\n",
    "chunk longer than it says": P + H + TE + b"chunked\r\n\r\n2\r\nhello\r\n0\r\n\r\n",
    "chunk without an end of line": P + H + TE + b"chunked\r\n\r\n5\r\nhelloX0\r\n\r\n",
    "folded header": P + H + b"X-A: b\r\n c\r\n" + CL + b"0\r\n\r\n",
    "bare CR in a value": P + H + b"X-A: b\rc\r\n" + CL + b"0\r\n\r\n",
    "NUL in a value": P + H + b"X-A: b\x00c\r\n" + CL + b"0\r\n\r\n",
    "NUL in a name": P + H + b"X\x00A: b\r\n" + CL + b"0\r\n\r\n",
    "header without a colon": P + H + b"nonsense\r\n" + CL + b"0\r\n\r\n",
    "header without a name": P + H + b": nonsense\r\n" + CL + b"0\r\n\r\n",
    "space in a header's name": P + H + b"X A: b\r\n" + CL + b"0\r\n\r\n",
    "no host": P + CL + N + b"\r\n\r\n" + B,
    "two hosts": P + H + b"Host: b\r\n" + CL + N + b"\r\n\r\n" + B,
    "two hosts on a pass-through": b"GET /v1/models HTTP/1.1\r\n" + H + b"Host: b\r\n\r\n",
    "200 kB header": P + H + b"X-A: " + b"a" * 200_000 + b"\r\n" + CL + b"0\r\n\r\n",
    "10,000 headers": P + H + b"X-A: b\r\n" * 10_000 + CL + b"0\r\n\r\n",
    "no version": b"POST /v1/chat/completions\r\n" + H + b"\r\n",
    "version nonsense": b"GET /v1/models HTTP/x.y\r\n" + H + b"\r\n",
    "version 9": b"GET /v1/models HTTP/9.9\r\n" + H + b"\r\n",
    "method nonsense": b"G\x00T /v1/models HTTP/1.1\r\n" + H + b"\r\n",
    "unknown method": b"FROB /v1/models HTTP/1.1\r\n" + H + b"\r\n",
    "space in the target": b"GET /v1/mo dels HTTP/1.1\r\n" + H + b"\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 40 + b"\r\n\r\n",
    "noise": b"\x00\xff\xfe\r\n\r\n\r\n\r\n",
}
# Odd, and either refused or forwarded as one request.
ONE_REQUEST: dict[str, bytes] = {
    "lines end in a bare LF": b"GET /v1/models HTTP/1.1\nHost: a\nConnection: close\n\n",
    "absolute target": b"GET http://evil.example/v1/models HTTP/1.1\r\n"
    + H
    + b"Connection: close\r\n\r\n",
    "absolute target, a path of ours": b"POST http://evil.example/v1/chat/completions HTTP/1.1\r\n"
    + H
    + b"Connection: close\r\n"
    + CL
    + N
    + b"\r\n\r\n"
    + B,
    "asterisk": b"OPTIONS * HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n",
    "authority form": b"CONNECT evil.example:443 HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n",
    "target with @": b"GET /@evil.example/v1/models HTTP/1.1\r\n"
    + H
    + b"Connection: close\r\n\r\n",
    "target with //": b"GET //evil.example/v1/models HTTP/1.1\r\n"
    + H
    + b"Connection: close\r\n\r\n",
    "target with dots": b"GET /v1/../../etc/passwd HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n",
    "percent signs": b"GET /v1/%2e%2e/%00%0d%0aX: HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n",
    "empty lines first": b"\r\n\r\nGET /v1/models HTTP/1.1\r\n" + H + b"Connection: close\r\n\r\n",
    "chunk extensions": P
    + H
    + b"Connection: close\r\n"
    + TE
    + b"chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n",
    "trailers": P
    + H
    + b"Connection: close\r\n"
    + TE
    + b"chunked\r\n\r\n2\r\n{}\r\n0\r\nHost: b\r\n\r\n",
    "upgrade to h2c": b"GET /v1/models HTTP/1.1\r\n"
    + H
    + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
    "upgrade to websocket": b"GET /v1/realtime HTTP/1.1\r\n"
    + H
    + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
    "latin-1 in a value": b"GET /v1/models HTTP/1.1\r\n"
    + H
    + b"X-A: \xe9\xff\r\nConnection: close\r\n\r\n",
    "connection names a credential": b"GET /v1/models HTTP/1.1\r\n"
    + H
    + b"Authorization: Bearer x\r\nConnection: close, authorization\r\n\r\n",
}


def answers_in(raw: bytes) -> list[int]:
    """The status of each response on the wire."""
    return [int(part[:3]) for part in raw.split(b"HTTP/1.1 ")[1:]]


async def said(world: World, request: bytes, seconds: float = 60.0) -> bytes:
    """All that comes back on one connection; what is still open after a while is hung up on."""
    async with Line(world.base) as line:
        line.send(request)
        found = b""
        try:
            async with asyncio.timeout(seconds):
                while more := await line.reader.read(65_536):
                    found += more
        except (TimeoutError, ConnectionError):
            pass
        return found


async def test_a_bad_framing_is_refused_and_nothing_is_smuggled_behind_it(world: World) -> None:
    """One 4xx at most, upstream hears of none, and what stands behind is never a request."""
    for name, request in REFUSED.items():
        raw = await said(world, request + SMUGGLED, 0.5)
        statuses = answers_in(raw)
        assert len(statuses) <= 1, (name, raw)
        assert all(400 <= status < 500 for status in statuses), (name, raw)
        assert [seen.path for seen in world.upstream.seen] == [], name
    assert (await world.ask("Fine again?")).status == 200


async def test_an_odd_framing_is_at_most_one_request_to_the_one_upstream(world: World) -> None:
    """I10: no address is taken from a request, however it is written."""
    for name, request in ONE_REQUEST.items():
        before = world.upstream.calls
        raw = await said(world, request + SMUGGLED, 0.5)
        statuses = answers_in(raw)
        assert len(statuses) <= 1, (name, raw)
        assert all(status < 500 for status in statuses), (name, raw)
        seen = world.upstream.seen[before:]
        assert len(seen) <= 1, name
        assert not any("smuggled" in one.path for one in seen), name
        for one in seen:
            assert one.headers["host"] == f"127.0.0.1:{world.upstream.port}", name
    assert (await world.ask("Fine again?")).status == 200


def test_the_framings_are_many() -> None:
    assert len(REFUSED) >= 40
    assert len(ONE_REQUEST) >= 15


async def test_a_body_over_the_limit_is_413_however_it_comes(make_world: WorldMaker) -> None:
    """I7: by its length before it is read, in chunks as soon as it is too long; upstream hears
    nothing, and the connection is closed."""
    big = b"x" * 50_000
    chunks = b"".join(b"%x\r\n%b\r\n" % (10_000, b"y" * 10_000) for _ in range(5))
    head = P + H + b"Content-Type: application/json\r\n"
    async with make_world(max_body_bytes=20_000) as world:
        for request in (
            head + CL + b"%d\r\n\r\n" % len(big) + big,
            head + CL + b"%d\r\n\r\n" % len(big),  # and none of it comes
            head + TE + b"chunked\r\n\r\n" + chunks + b"0\r\n\r\n",
            head + TE + b"chunked\r\n\r\n" + chunks,  # and no end of it
        ):
            raw = await said(world, request)
            assert answers_in(raw) == [413], raw[:200]
            assert b'"code":"invalid_request"' in raw
        assert world.upstream.calls == 0
        fits = post(chat("a" * 15_000))
        async with Line(world.base) as line:
            line.send(fits)
            assert (await line.answer()).status == 200


@pytest.mark.parametrize("begun", [b"", b'{"model":'], ids=["no byte", "some bytes"])
async def test_a_body_that_does_not_come_is_408(make_world: WorldMaker, begun: bytes) -> None:
    """Neither server nor parser times a body; we do."""
    async with make_world(body_seconds=0.3) as world:
        for framing in (CL + b"100\r\n\r\n" + begun, TE + b"chunked\r\n\r\n"):
            raw = await said(world, P + H + framing)
            assert answers_in(raw) == [408], raw[:200]
        assert world.upstream.calls == 0
        counted = await world.stats()
        assert (counted["requests"], counted["errors"]) == (2, 2)


async def test_a_body_that_drips_is_408_too(make_world: WorldMaker) -> None:
    """The limit is on the whole body: a byte now and then buys no time."""
    async with make_world(body_seconds=0.5) as world, Line(world.base) as line:
        line.send(P + H + CL + b"1000\r\n\r\n")

        async def drip() -> None:
            while True:
                line.send(b" ")
                await asyncio.sleep(0.05)

        dripping = asyncio.create_task(drip())
        told = await line.answer()
        dripping.cancel()
        assert told.status == 408
