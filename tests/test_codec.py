"""What the store's bytes promise: they come back whole, or not at all."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache_proxy.codec import HEAD_BYTES, Corrupt, head_length, pack, unpack, unpack_head
from cache_proxy.model import Entry, Selector, Usage
from cache_proxy.purges import Purges, Rule, pack_rule, thin, unpack_rule

KEY = b"k" * 32
ENTRY = Entry(
    digest=b"d" * 20,
    partition=b"p" * 20,
    fingerprint=b"f" * 8,
    epoch=7,
    created=1_700_000_000,
    expires=1_700_600_000,
    text="Thời tiết hôm nay thế nào?",
    model="gpt-4.1-mini",
    provider="openai",
    tenant="ab" * 20,
    namespace="",
    tags=("faq", "doc:42"),
    usage=Usage(12, 200, 3, 4),
    cost=123_456,
    body=b'{"choices":[]}',
    gist='0123456789abcdef["thời tiết",["vi"]]',
)
VECTOR = bytes(range(256)) * 3

words = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
counts = st.integers(0, 2**63 - 1)
entries = st.builds(
    Entry,
    digest=st.binary(min_size=20, max_size=20),
    partition=st.binary(min_size=20, max_size=20),
    fingerprint=st.binary(min_size=8, max_size=8),
    epoch=counts,
    created=counts,
    expires=counts,
    text=words,
    model=words,
    provider=words,
    tenant=words,
    namespace=words,
    tags=st.lists(words, max_size=4).map(tuple),
    usage=st.none() | st.builds(Usage, counts, counts, counts, counts),
    cost=st.none() | counts,
    body=st.binary(max_size=200),
    gist=words,
)


@settings(max_examples=200, deadline=None)
@given(entry=entries, vector=st.binary(max_size=64))
def test_any_entry_comes_back_as_it_was(entry: Entry, vector: bytes) -> None:
    """Whatever was packed is unpacked to an equal entry and the same vector."""
    assert unpack(pack(entry, vector, KEY), KEY) == (entry, vector)


@pytest.mark.parametrize("vector", [b"", VECTOR])
def test_the_head_can_be_read_without_the_body(vector: bytes) -> None:
    """A rebuild reads header and vector alone, and learns from any header how much that is."""
    value = pack(ENTRY, vector, KEY)
    need = head_length(value[:HEAD_BYTES])
    head = unpack_head(value[:need], KEY)
    assert need == HEAD_BYTES + len(vector)
    assert (head.digest, head.partition, head.fingerprint) == (b"d" * 20, b"p" * 20, b"f" * 8)
    assert (head.epoch, head.expires, head.vector) == (7, 1_700_600_000, vector)


def test_a_flipped_bit_anywhere_is_noticed() -> None:
    """One bit of damage at any place makes the value no entry; in the head, no head either."""
    value = pack(ENTRY, VECTOR, KEY)
    head = HEAD_BYTES + len(VECTOR)
    for place in range(len(value)):
        hurt = bytearray(value)
        hurt[place] ^= 1 << random.Random(place).randrange(8)
        with pytest.raises(Corrupt):
            unpack(bytes(hurt), KEY)
        # The length of the body and the sum over it are the body's affair.
        if place < head and not HEAD_BYTES - 16 <= place < HEAD_BYTES:
            with pytest.raises(Corrupt):
                unpack_head(bytes(hurt[:head]), KEY)


@pytest.mark.parametrize(
    "hurt",
    [
        lambda value: b"",
        lambda value: value[: HEAD_BYTES - 1],
        lambda value: value[:-1],
        lambda value: value + b"x",
        lambda value: b"XXX" + value[3:],
        lambda value: value[:3] + b"\x01" + value[4:],
        lambda value: value * 2,
        lambda value: bytes(len(value)),
        lambda value: b"\x80\x04N." + value,
    ],
    ids=["empty", "headless", "cut", "padded", "magic", "schema", "twice", "zeros", "pickle"],
)
def test_bytes_that_are_not_an_entry_are_refused(hurt) -> None:  # type: ignore[no-untyped-def]
    """Cut, padded, foreign or of another schema: Corrupt, and never any other exception."""
    with pytest.raises(Corrupt):
        unpack(hurt(pack(ENTRY, VECTOR, KEY)), KEY)


def test_an_entry_made_with_another_secret_is_refused() -> None:
    """Who can write to the store but lacks the secret cannot plant an answer or a vector."""
    value = pack(ENTRY, VECTOR, b"other" * 6)
    with pytest.raises(Corrupt):
        unpack(value, KEY)
    with pytest.raises(Corrupt):
        unpack_head(value, KEY)


@pytest.mark.parametrize(
    "change",
    [
        {"digest": b"short"},
        {"partition": b""},
        {"fingerprint": b"f" * 9},
        {"text": "\ud800"},
        {"epoch": -1},
        {"cost": 2**70},
    ],
)
def test_what_could_not_be_read_back_is_not_packed(change: dict[str, object]) -> None:
    """Wrong widths, broken text and numbers out of range are refused before they are stored."""
    with pytest.raises(Corrupt):
        pack(replace(ENTRY, **change), b"", KEY)  # type: ignore[arg-type]


SELECTORS = [
    Selector(),
    Selector(digest=b"d" * 20),
    Selector(tag="faq", namespace="", model="gpt-4.1-mini"),
    Selector(created_before=1_700_000_001),
]


@pytest.mark.parametrize("selector", SELECTORS)
def test_a_rule_comes_back_as_it_was(selector: Selector) -> None:
    """Purge rules survive their JSON form."""
    rule = Rule(8, 1_700_000_000, selector)
    assert unpack_rule(8, pack_rule(rule)) == rule


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b"nope", b'{"at":1,"digest":null,"new":1}'])
def test_a_rule_that_cannot_be_read_purges_everything(data: bytes) -> None:
    """Damage to a purge rule costs misses and never brings an entry back."""
    assert Purges([unpack_rule(8, data)]).mean(ENTRY)


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize(("epoch", "gone"), [(6, False), (7, False), (8, True)])
def test_a_purge_means_only_requests_that_began_before_it(
    selector: Selector, epoch: int, gone: bool
) -> None:
    """An entry of epoch 7 falls to purge 8 and to none before."""
    assert Purges([Rule(epoch, 0, selector)]).mean(ENTRY) is gone


def test_a_purge_that_does_not_match_hides_no_older_one() -> None:
    """All purges since the entry's epoch are asked, not only the newest."""
    rules = [Rule(10, 0, Selector(tag="other")), Rule(9, 0, Selector(tag="faq"))]
    assert Purges(rules).mean(ENTRY)
    assert not Purges(rules[:1]).mean(ENTRY)


def test_rules_that_no_longer_matter_are_dropped() -> None:
    """Too old for any entry to be left, made again later, or below a purge of everything."""
    old, one, all_, two = (
        Rule(1, 10, Selector(tag="a")),
        Rule(2, 100, Selector(tag="b")),
        Rule(3, 100, Selector()),
        Rule(4, 100, Selector(tag="c")),
    )
    assert thin([two, old, one], 50, 10) == [two, one]
    assert thin([one, all_, two], 50, 10) == [two, all_]
    assert thin([one, two, again := Rule(5, 100, Selector(tag="b"))], 50, 10) == [again, two]


def test_too_many_rules_become_one_that_purges_more() -> None:
    """The number of rules is bounded, and what was purged stays purged."""
    rules = [Rule(epoch, 100, Selector(tag=f"t{epoch}")) for epoch in range(1, 12)]
    kept = thin(rules, 0, 10)
    assert len(kept) <= 10
    for rule in rules:
        victim = replace(ENTRY, epoch=rule.epoch - 1, tags=(rule.selector.tag or "",))
        assert Purges(kept).mean(victim)
    assert not Purges(kept).mean(replace(ENTRY, epoch=11))
