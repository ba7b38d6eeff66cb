"""The event splitter: no byte is lost, changed or moved, however the stream was cut."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.protocols.sse import Splitter, SseTooLarge, data, event_name

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.one_of(
    st.sampled_from([b"data: {}", b"data:x", b"data", b": ping", b"event: done", b"id: 1", b"odd"]),
    st.text('aé漢🙂:{}" ', max_size=12).map(lambda text: b"data: " + text.encode()),
)
STREAMS = st.lists(st.tuples(st.one_of(LINES, st.just(b"")), LINE_ENDS), max_size=30).map(
    lambda lines: b"".join(line + end for line, end in lines)
)


def cut(stream: bytes, sizes: list[int]) -> list[bytes]:
    chunks, at = [], 0
    for size in sizes:
        chunks.append(stream[at : at + size])
        at += size
    return [*chunks, stream[at:]]


def split(stream: bytes, sizes: list[int]) -> tuple[list[bytes], bytes]:
    splitter = Splitter()
    events = [event for chunk in cut(stream, sizes) for event in splitter.feed(chunk)]
    return events + splitter.close(), splitter.rest


@given(STREAMS, st.lists(st.integers(0, 7), max_size=60), st.binary(max_size=9))
def test_events_and_rest_are_the_stream(stream: bytes, sizes: list[int], tail: bytes) -> None:
    """Cut anywhere, also inside a character or a CRLF, the bytes add up and the events agree."""
    events, rest = split(stream + tail, sizes)
    assert b"".join(events) + rest == stream + tail
    assert (events, rest) == split(stream + tail, [])


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_every_line_end_ends_events(end: bytes) -> None:
    """LF, CRLF and CR mean the same."""
    first = b"event: a" + end + b"data: 1" + end + b"data: 2" + end + end
    second = b": comment" + end + end
    events, rest = split(first + second + b"data: unfinished" + end, [])
    assert events == [first, second]
    assert [data(event) for event in events] == [b"1\n2", None]
    assert [event_name(event) for event in events] == [b"a", None]
    assert rest == b"data: unfinished" + end


def test_a_last_event_that_ends_in_cr_is_whole_when_the_stream_ends() -> None:
    """An LF might have followed; at the end it no longer can."""
    splitter = Splitter()
    assert splitter.feed(b"data: a\r\rdata: b\r\r") == [b"data: a\r\r"]
    assert splitter.close() == [b"data: b\r\r"]
    assert splitter.rest == b""


def test_an_event_is_handed_out_as_soon_as_it_is_whole() -> None:
    """The common LF and CRLF streams are never held back for the next event."""
    for event in (b"data: x\n\n", b"data: x\r\n\r\n"):
        assert Splitter().feed(event) == [event]


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (b"data: a\n\n", b"a"),
        (b"data:a\n\n", b"a"),
        (b"data:  a\n\n", b" a"),
        (b"data\n\n", b""),
        (b"data: a\n", b"a"),
        (b"data: a\ndata: b\n\n", b"a\nb"),
        (b"data: a\rdata: b\r\r", b"a\nb"),
        (b"data: a:b\n\n", b"a:b"),
        (b"database: a\n\n", None),
        (b" data: a\n\n", None),
        (b"\xef\xbb\xbfdata: a\n\n", b"a"),
        (b": data: a\n\n", None),
        (b"\n", None),
        ("data: é\u2028x\n\n".encode(), "é\u2028x".encode()),
    ],
)
def test_data_follows_the_standard(event: bytes, expected: bytes | None) -> None:
    """Fields are split as the event-stream standard says; only CR, LF and CRLF end lines."""
    assert data(event) == expected


def test_an_event_beyond_the_cap_is_refused_and_nothing_is_lost() -> None:
    """An endless line ends in `SseTooLarge`, with every byte still there to pass on."""
    splitter = Splitter(max_event_bytes=100)
    assert splitter.feed(b"data: ok\n\n") == [b"data: ok\n\n"]
    for _ in range(4):
        assert splitter.feed(b"data: " + b"x" * 19) == []
    with pytest.raises(SseTooLarge):
        splitter.feed(b"x")
    assert splitter.rest == (b"data: " + b"x" * 19) * 4 + b"x"


def test_a_whole_event_beyond_the_cap_is_refused_too() -> None:
    """Arriving in one piece does not lift the cap; events before it are still handed out."""
    splitter = Splitter(max_event_bytes=20)
    assert splitter.feed(b"data: a\n\ndata: " + b"x" * 30 + b"\n\n") == [b"data: a\n\n"]
    with pytest.raises(SseTooLarge):
        splitter.feed(b"")
