"""Embeddings: a batch is taken apart, asked for in part, and put together in the caller's order."""

from __future__ import annotations

import base64
import json
from typing import Any

import httpx
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.model import Usage
from cache_proxy.protocols import embeddings_api as api
from cache_proxy.protocols.openai_request import Unreadable


def answer(vectors: list[Any], tokens: int = 7, **changes: Any) -> bytes:
    data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    document = {"object": "list", "data": data, "model": "m-1", "usage": usage, **changes}
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("given_input", "items", "single"),
    [
        ("a", (b'"a"',), True),
        (["a"], (b'"a"',), False),
        (["a", "b", "a"], (b'"a"', b'"b"', b'"a"'), False),
        ([1, 2], (b"[1,2]",), True),
        ([[1, 2], [3]], (b"[1,2]", b"[3]"), False),
        (" a ", (b'" a "',), True),
        ("e\u0301", ('"e\u0301"'.encode(),), True),
    ],
)
def test_inputs_become_items(given_input: Any, items: tuple[bytes, ...], single: bool) -> None:
    """Every shape of input is a row of items, exact to the byte."""
    request = api.parse({"model": "m", "input": given_input})
    assert (request.items, request.single) == (items, single)


@pytest.mark.parametrize(
    "given_input",
    [
        *(None, [], {}, 1, [1, "a"], [True], [1.0], [["a"]], [[]], ["a", None]),
        ["a"] * (api.MOST_INPUTS + 1),
    ],
)
def test_odd_inputs_are_left_alone(given_input: Any) -> None:
    """I3: what cannot be read is not guessed."""
    with pytest.raises(Unreadable):
        api.parse({"model": "m", "input": given_input})


def test_fields_that_shape_the_vector_are_in_rest_and_users_are_not() -> None:
    """I2: dimensions and encoding partition by equality; the end user stands apart."""
    plain = api.parse({"model": "m", "input": "a"})
    for changes in ({"dimensions": 3}, {"encoding_format": "base64"}, {"model": "n"}, {"new": 1}):
        assert api.parse({"model": "m", "input": "a", **changes}).rest != plain.rest
    named = api.parse({"model": "m", "input": "b", "user": "u"})
    assert named.rest == plain.rest
    assert named.end_user != plain.end_user


def test_a_batch_of_100_with_90_known_asks_for_10() -> None:
    """The answer comes back in the order of the request, each index right."""
    texts = [f"text {n}" for n in range(100)]
    document = {"model": "m", "input": texts, "dimensions": 2}
    body = orjson.dumps(document)
    request = api.parse(document)
    known = {n: b"[%d.5,0.0]" % n for n in range(100) if n % 10}
    missing = [n for n in range(100) if n not in known]
    asked = orjson.loads(api.ask(document, body, missing))
    assert asked == {"model": "m", "input": [texts[n] for n in missing], "dimensions": 2}

    fresh = api.split(answer([[n + 0.5, 0.0] for n in missing]), len(missing))
    assert fresh is not None
    pieces = known | dict(zip(missing, fresh.pieces, strict=True))
    joined = orjson.loads(
        api.join(fresh.model, [pieces[n] for n in range(len(request.items))], Usage(input=100))
    )
    assert [item["index"] for item in joined["data"]] == list(range(100))
    assert [item["embedding"] for item in joined["data"]] == [[n + 0.5, 0.0] for n in range(100)]
    assert joined["usage"] == {"prompt_tokens": 100, "total_tokens": 100}


def test_a_wholly_unknown_batch_goes_up_as_it_came() -> None:
    """Byte for byte, when there is nothing to leave out."""
    body = b'{ "input": ["a", "b"], "model": "m" }'
    assert api.ask(orjson.loads(body), body, [0, 1]) is body


@pytest.mark.parametrize("vector", ["[-0.00230, 1e-7,3]", '"AACAPwAAAEA="'])
def test_vectors_are_kept_as_they_were_written(vector: str) -> None:
    """Digits, exponents and base64 text are not touched."""
    body = b'{"data":[{"index":0,"embedding" : %b}],"model":"m"}' % vector.encode()
    taken = api.split(body, 1)
    assert taken is not None
    assert taken.pieces == (vector.encode(),)
    assert vector.encode() in api.join("m", taken.pieces, None)


def test_an_answer_out_of_order_is_put_in_order() -> None:
    """The index decides, not the place."""
    data = [{"index": 1, "embedding": [1]}, {"index": 0, "embedding": [0]}]
    taken = api.split(answer([], data=data), 2)
    assert taken is not None
    assert taken.pieces == (b"[0]", b"[1]")
    assert taken.usage == Usage(input=7)


@pytest.mark.parametrize(
    ("body", "n"),
    [
        (b"", 1),
        (b"[]", 1),
        (b'{"error":{}}', 1),
        (answer([[1.0]]), 2),
        (answer([[1.0], [2.0]]), 1),
        (answer([[]]), 1),
        (answer([[None]]), 1),
        (answer([None]), 1),
        (answer([""]), 1),
        (answer([[1.0]], error={"message": "no"}), 1),
        (answer([], data=[{"index": 5, "embedding": [1.0]}]), 1),
        (answer([], data=[{"index": 0, "embedding": [1.0]}] * 2), 2),
        (answer([], data=[{"index": 0, "embedding": [1.0], "sparse": {"1": 2}}]), 1),
        (answer([[1.0]]).replace(b"1.0", b"NaN"), 1),
        (answer([[1.0]], embedding=[9.0]).replace(b'"embedding": [1', b'"\\u0065mbedding": [1'), 1),
    ],
)
def test_an_answer_that_does_not_fit_is_not_taken_apart(body: bytes, n: int) -> None:
    """I4: in doubt nothing is stored."""
    assert api.split(body, n) is None


@given(st.integers(0, 10_000), st.lists(st.integers(0, 500), min_size=1, max_size=30))
def test_apportioned_tokens_add_up(total: int, lengths: list[int]) -> None:
    """No token is invented and none is lost; longer inputs never get fewer, but for rounding."""
    shares = api.apportion(total, lengths)
    assert sum(shares) == total
    assert min(shares) >= 0
    assert len(shares) == len(lengths)
    longest, shortest = lengths.index(max(lengths)), lengths.index(min(lengths))
    assert shares[longest] >= shares[shortest] - 1


@pytest.mark.parametrize("base64_wanted", [True, False])
def test_the_openai_sdk_reads_a_joined_answer(base64_wanted: bool) -> None:
    """In floats and in base64, which the SDK asks for by itself."""
    raw = base64.b64encode(b"\x00\x00\x80?\x00\x00\x00@").decode()
    piece = orjson.dumps(raw) if base64_wanted else b"[1.0,2.0]"
    body = api.join("m-1", [piece, piece], Usage(input=4))
    transport = httpx.MockTransport(
        lambda _: httpx.Response(200, content=body, headers={"content-type": "application/json"})
    )
    client = openai.OpenAI(
        api_key="k", base_url="http://up/v1", http_client=httpx.Client(transport=transport)
    )
    options: dict[str, Any] = {} if base64_wanted else {"encoding_format": "float"}
    got = client.embeddings.create(model="m", input=["a", "b"], **options)
    assert [item.embedding for item in got.data] == [[1.0, 2.0], [1.0, 2.0]]
    assert got.usage.prompt_tokens == 4
