"""What callers may ask of the cache by header: more caution, never less."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_proxy.directives import directives
from cache_proxy.errors import BadRequest
from cache_proxy.model import Directives

PLAIN = Directives()


def read(*headers: tuple[str, str]) -> Directives:
    return directives([(name.encode(), value.encode("latin-1")) for name, value in headers])


def control(value: str) -> Directives:
    return read(("cache-control", value))


def test_a_request_that_asks_nothing_gets_the_defaults() -> None:
    """Other headers say nothing to the cache."""
    assert read() == read(("authorization", "Bearer k"), ("pragma", "no-cache")) == PLAIN


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", PLAIN),
        ("no-cache", Directives(no_cache=True)),
        ("No-Cache", Directives(no_cache=True)),
        ("no-store", Directives(no_store=True)),
        ("only-if-cached", Directives(only_if_cached=True)),
        ("no-cache, no-store", Directives(no_cache=True, no_store=True)),
        (" no-cache ,max-age=9", Directives(no_cache=True, max_age=9)),
        ('no-cache="x"', Directives(no_cache=True)),
        ("max-age=0", Directives(max_age=0)),
        ("max-age=60", Directives(max_age=60)),
        ('max-age="60"', Directives(max_age=60)),
        ("max-age", Directives(max_age=0)),
        ("max-age=", Directives(max_age=0)),
        ("max-age=-1", Directives(max_age=0)),
        ("max-age=1.5", Directives(max_age=0)),
        ("max-age=99999999999", Directives(max_age=0)),
        ("max-age=\xb2", Directives(max_age=0)),
        ("max-stale=9, min-fresh=1, no-transform, public, x=y", PLAIN),
        ("xno-cache", PLAIN),
        (",,,", PLAIN),
    ],
)
def test_cache_control_as_the_standard_has_it(value: str, expected: Directives) -> None:
    """RFC 9111 5.2.1: names in any case, unknown ones ignored, a nonsense age is no age."""
    assert control(value) == expected


def test_two_cache_control_lines_are_one_list() -> None:
    """A list may be spread over several fields."""
    both = read(("cache-control", "no-cache"), ("cache-control", "max-age=5"))
    assert both == Directives(no_cache=True, max_age=5)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("mode", "off", Directives(mode="off")),
        ("mode", "exact", Directives(mode="exact")),
        ("mode", "semantic", PLAIN),
        ("mode", " Shadow ", Directives(mode="shadow")),
        ("threshold", "0.95", Directives(threshold=0.95)),
        ("threshold", "0", Directives(threshold=0.0)),
        ("threshold", "1", Directives(threshold=1.0)),
        ("ttl", "1", Directives(ttl=1)),
        ("ttl", "9999999999", Directives(ttl=9_999_999_999)),
        ("namespace", "team a", Directives(namespace="team a")),
        ("namespace", "", PLAIN),
        ("namespace", "n" * 200, Directives(namespace="n" * 200)),
        ("tags", "doc:42, faq", Directives(tags=("doc:42", "faq"))),
        ("tags", "a,,b, a ,", Directives(tags=("a", "b"))),
        ("tags", "", PLAIN),
        ("tags", ",".join(map(str, range(32))), Directives(tags=tuple(map(str, range(32))))),
        ("not-ours", "anything", PLAIN),
    ],
)
def test_our_own_headers(name: str, value: str, expected: Directives) -> None:
    """Each says one thing; a name of that prefix which is not ours says nothing."""
    assert read((f"x-cache-{name}", value)) == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Mode", "on"),
        ("Mode", ""),
        ("Threshold", "-0.1"),
        ("Threshold", "1.01"),
        ("Threshold", "nan"),
        ("Threshold", "inf"),
        ("Threshold", "high"),
        ("Threshold", ""),
        ("TTL", "0"),
        ("TTL", "-5"),
        ("TTL", "7d"),
        ("TTL", "1e3"),
        ("TTL", "99999999999"),
        ("TTL", ""),
        ("Namespace", "n" * 201),
        ("Tags", ",".join(map(str, range(33)))),
        ("Tags", "t" * 201),
    ],
)
def test_a_bad_value_is_refused_in_a_sentence_that_names_the_header(name: str, value: str) -> None:
    """What was asked and not understood is not half obeyed; the value is not quoted back."""
    with pytest.raises(BadRequest, match=f"X-Cache-{name} ") as caught:
        read((f"x-cache-{name.lower()}", value))
    assert str(caught.value).endswith(".")
    assert value not in str(caught.value) or len(value) < 3


HEADERS = st.tuples(
    st.sampled_from(
        [
            *(b"cache-control", b"x-cache-mode", b"x-cache-threshold", b"x-cache-ttl"),
            *(b"x-cache-namespace", b"x-cache-tags", b"x-cache-other", b"x-other"),
        ]
    ),
    st.binary(max_size=20),
)


@given(st.lists(HEADERS, max_size=5))
def test_no_bytes_make_the_reading_fail_in_another_way(headers: list[tuple[bytes, bytes]]) -> None:
    """Any bytes are read or refused, and what was read lies within its bounds."""
    try:
        asked = directives(headers)
    except BadRequest:
        return
    assert asked.threshold is None or 0 <= asked.threshold <= 1
    assert asked.ttl is None or asked.ttl > 0
    assert asked.max_age is None or asked.max_age >= 0
    asked.namespace.encode()
