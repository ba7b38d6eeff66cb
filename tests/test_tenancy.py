"""Who is asking: no two credentials are one tenant, and what is ambiguous is nobody."""

from __future__ import annotations

import base64
import hashlib
from typing import Any
from urllib.parse import quote_from_bytes

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cache_proxy.tenancy import Caller, Tenancy

SECRET = b"s" * 32
Pairs = list[tuple[bytes, bytes]]


def caller(*headers: tuple[bytes, bytes], query: bytes = b"", **how: Any) -> Caller | None:
    return Tenancy(SECRET, **how).caller(headers, query)


def known(*headers: tuple[bytes, bytes], query: bytes = b"", **how: Any) -> Caller:
    found = caller(*headers, query=query, **how)
    assert found is not None
    return found


def bearer(key: bytes) -> tuple[bytes, bytes]:
    return b"authorization", b"Bearer " + key


SPELLINGS: list[tuple[Pairs, bytes]] = [
    ([], b""),
    ([(b"authorization", b"")], b""),
    ([(b"authorization", b"k")], b""),
    ([(b"authorization", b"Bearer k")], b""),
    ([(b"authorization", b"bearer k")], b""),
    ([(b"authorization", b"BEARER k")], b""),
    ([(b"authorization", b"Bearer  k")], b""),
    ([(b"authorization", b"Bearer\tk")], b""),
    ([(b"authorization", b"Bearer k ")], b""),
    ([(b"authorization", b"Bearer K")], b""),
    ([(b"authorization", b"Bearer \xc3\xa9")], b""),
    ([(b"authorization", b"Bearer e\xcc\x81")], b""),
    ([(b"authorization", b"Basic k")], b""),
    ([(b"api-key", b"k")], b""),
    ([(b"x-api-key", b"k")], b""),
    ([(b"x-goog-api-key", b"k")], b""),
    ([], b"key=k"),
    ([], b"key=K"),
    ([], b"key=k%20"),
    ([], b"key="),
    ([(b"authorization", b"Bearer k"), (b"api-key", b"k")], b""),
    ([(b"authorization", b"Bearer k")], b"key=k"),
    ([(b"api-key", b"k"), (b"x-api-key", b"k")], b""),
]


def test_every_spelling_of_a_credential_is_a_tenant_of_its_own() -> None:
    """I2, I3: what upstream might read differently is not taken for the same."""
    callers = [known(*headers, query=query) for headers, query in SPELLINGS]

    assert len({found.tenant for found in callers}) == len(SPELLINGS)
    assert len({found.token for found in callers}) == len(SPELLINGS)


@pytest.mark.parametrize(
    ("headers", "query"),
    [
        ([bearer(b"a"), bearer(b"b")], b""),
        ([bearer(b"a"), bearer(b"a")], b""),
        ([(b"api-key", b"a"), (b"api-key", b"b")], b""),
        ([(b"x-goog-api-key", b"a"), (b"x-goog-api-key", b"")], b""),
        ([], b"key=a&key=b"),
        ([], b"key=a&key=a"),
        ([], b"key=a&api_key=a"),
        ([], b"key=a&x=1&API-KEY=b"),
        ([], b"key=a&%6bey=b"),
        ([bearer(b"a")], b"key=&key="),
    ],
)
def test_one_name_given_twice_is_nobody(headers: Pairs, query: bytes) -> None:
    """I3: which of two keys upstream would take is not guessed, in any mode."""
    assert caller(*headers, query=query) is None
    assert caller(*headers, query=query, mode="shared") is None
    assert caller(*headers, (b"x-user", b"u"), query=query, mode="header:x-user") is None
    assert caller(*headers, query=query, jwt=True, names={"0" * 64: "acme"}) is None


def test_the_order_of_credentials_and_what_stands_beside_them_do_not_matter() -> None:
    """The same credentials are the same caller."""
    one, other = bearer(b"a"), (b"api-key", b"b")
    assert known(one, other) == known(other, one)
    assert known(one, (b"user-agent", b"x"), query=b"alt=sse") == known(one)
    assert known(query=b"key=a&x=1") == known(query=b"x=2&key=a") == known(query=b"%6Bey=a")


# Bytes that a careless joining of fields would stumble over, in names' and values' places.
PIECES = st.sampled_from(
    [
        *(bytes([byte]) for byte in b"ab\x1e\x1f\x00=&%+ ?\xff"),
        *(b"", b"api-key", b"x-api-key", b"user", b"name", b"jwt", b"1:"),
        *("你".encode(), "佡".encode()),
    ]
)
VALUES = st.lists(PIECES, max_size=5).map(b"".join)
NAMES = [b"api-key", b"authorization", b"x-api-key", b"x-goog-api-key", b"?"]
CREDENTIALS = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3)


def sent(credentials: dict[bytes, bytes], **how: Any) -> Caller:
    headers = [pair for pair in credentials.items() if pair[0] != b"?"]
    key = credentials.get(b"?")
    query = b"" if key is None else b"key=" + quote_from_bytes(key, safe="").encode()
    return known(*headers, query=query, **how)


@given(CREDENTIALS, CREDENTIALS)
@example({b"?": b"a\x1ex-api-key\x1fb"}, {b"?": b"a", b"x-api-key": b"b"})
@example({b"?": b"\xff"}, {b"?": b"\xfe"})
@example({b"?": "你".encode()}, {b"?": b"?"})
def test_callers_are_equal_exactly_when_the_credentials_are(
    one: dict[bytes, bytes], other: dict[bytes, bytes]
) -> None:
    """I2: raw bytes under their names, never joined or decoded so that two become one."""
    first, second = sent(one), sent(other)
    assert (first.tenant == second.tenant) == (one == other)
    assert (first.token == second.token) == (one == other)


@given(CREDENTIALS, VALUES, CREDENTIALS, VALUES)
@example({b"?": b"k"}, b"b\x1e\x00user\x00e", {b"?": b"k\x1e\x00user\x00b"}, b"e")
def test_named_users_are_equal_exactly_when_user_and_credentials_are(
    one: dict[bytes, bytes], user: bytes, other: dict[bytes, bytes], other_user: bytes
) -> None:
    """I2: neither half can be made to say what the other half says."""
    users = user.strip(), other_user.strip()
    if not all(users):
        return
    headers = [[pair for pair in c.items() if pair[0] != b"?"] for c in (one, other)]
    queries = [
        b"key=" + quote_from_bytes(c[b"?"], safe="").encode() if b"?" in c else b""
        for c in (one, other)
    ]
    first, second = (
        known(*pairs, (b"x-user", name), query=query, mode="header:X-User")
        for pairs, name, query in zip(headers, users, queries, strict=True)
    )
    assert (first.tenant == second.tenant) == ((one, users[0]) == (other, users[1]))
    assert (first.token == second.token) == (one == other)


def test_no_name_tells_the_credential_and_each_needs_the_secret() -> None:
    """I9: a MAC, not a hash that anybody could compute and compare."""
    key = b"sk-very-secret"
    mine, yours = known(bearer(key)), Tenancy(b"t" * 32).caller([bearer(key)], b"")
    assert yours is not None
    assert {mine.tenant, mine.token}.isdisjoint({yours.tenant, yours.token})
    assert mine.tenant != mine.token
    for mac in (mine.tenant, mine.token):
        assert len(mac) == 20
        assert mac != hashlib.sha256(b"Bearer " + key).digest()[:20]
        assert key not in mac


def test_without_a_secret_there_is_no_identity() -> None:
    """I3: an empty MAC key is an error, never a bucket for everybody."""
    with pytest.raises(ValueError, match="MAC key"):
        Tenancy(b"").caller([bearer(b"k")], b"")


@pytest.mark.parametrize(
    "name",
    [b"ocp-apim-subscription-key", b"x-auth-token", b"x-goog-iam-authorization-token", b"cookie"],
)
def test_a_gateways_own_credential_keeps_its_users_apart(name: bytes) -> None:
    """I3: where upstream goes by another header, two users of it are not one tenant."""
    one, other = (caller((name, value)) for value in (b"ann", b"bob"))
    assert one is None or one != other


# ---- one tenant for several keys


def fingerprint(key: bytes) -> str:
    return hashlib.sha256(key).hexdigest()


TEAM = {"names": {fingerprint(b"sk-a"): "acme", fingerprint(b"sk-b"): "acme"}}


def test_keys_of_one_named_tenant_share_it_and_keep_their_own_tokens() -> None:
    """Acceptance stays with the key: a named tenant is no password."""
    first, second = known(bearer(b"sk-a"), **TEAM), known(bearer(b"sk-b"), **TEAM)
    assert first.tenant == second.tenant
    assert first.token != second.token
    assert known((b"api-key", b"sk-a"), **TEAM).tenant == first.tenant
    assert known((b"authorization", b"bearer  sk-b"), **TEAM).tenant == first.tenant
    assert known(query=b"key=sk-a", **TEAM).tenant == first.tenant


def test_a_key_that_is_not_named_stays_alone() -> None:
    """I2: a tenant's name opens nothing, nor does the hash of one of its keys."""
    team = known(bearer(b"sk-a"), **TEAM).tenant
    for key in (b"sk-c", b"acme", b"name", fingerprint(b"sk-a").encode(), b"", b"sk-a, sk-b"):
        assert known(bearer(key), **TEAM).tenant == known(bearer(key)).tenant != team
    assert known(**TEAM).tenant == known().tenant != team


def test_a_named_key_beside_another_credential_is_not_the_named_tenant() -> None:
    """I3: which of the two upstream judges is not known, so neither speaks for the tenant."""
    team = known(bearer(b"sk-a"), **TEAM).tenant
    assert known(bearer(b"sk-a"), (b"api-key", b"sk-mine"), **TEAM).tenant != team
    assert known(bearer(b"sk-a"), query=b"key=sk-mine", **TEAM).tenant != team
    assert known(bearer(b"sk-mine"), (b"api-key", b"sk-a"), **TEAM).tenant != team
    assert known(bearer(b"sk-mine"), query=b"key=sk-a", **TEAM).tenant != team


# ---- tokens that rotate


def jwt(claims: Any, signature: bytes = b"sig", head: bytes = b"e30") -> bytes:
    body = base64.urlsafe_b64encode(orjson.dumps(claims)).rstrip(b"=")
    return b".".join((head, body, signature))


ANN = {"iss": "https://login.example", "tid": "t1", "sub": "ann"}


def owner(token: bytes) -> Caller:
    return known(bearer(token), jwt=True)


def test_a_rotated_token_is_the_same_tenant_with_another_acceptance() -> None:
    """Issuer, tenant and subject own the answers; upstream still judges the exact token."""
    first, second = owner(jwt(ANN | {"iat": 1})), owner(jwt(ANN | {"iat": 2, "jti": "x"}))
    assert first.tenant == second.tenant
    assert first.token != second.token
    assert known(bearer(jwt(ANN | {"iat": 1}))).tenant != known(bearer(jwt(ANN))).tenant


@pytest.mark.parametrize(
    "claims",
    [
        ANN | {"sub": "bob"},
        ANN | {"sub": "Ann"},
        ANN | {"tid": "t2"},
        ANN | {"tid": ""},
        ANN | {"iss": "https://login.example/"},
        {"iss": ANN["iss"] + '","t1', "tid": "", "sub": "ann"},
        {"iss": ANN["iss"], "sub": "ann"},
    ],
)
def test_another_issuer_tenant_or_subject_is_another_tenant(claims: dict[str, str]) -> None:
    """I2: three claims, compared whole."""
    assert owner(jwt(claims)).tenant != owner(jwt(ANN)).tenant


def test_a_forged_token_has_a_token_of_its_own_that_nobody_accepted() -> None:
    """I3: the claims are not verified here, so the tenant alone must open nothing."""
    real, forged = owner(jwt(ANN, b"real")), owner(jwt(ANN, b"forged"))
    assert forged.tenant == real.tenant
    assert forged.token != real.token


def test_a_forged_token_beside_a_key_that_works_is_not_the_tenant() -> None:
    """I3: upstream may accept the key and never look at the token."""
    for mine in (b"api-key", b"x-api-key"):
        beside = known(bearer(jwt(ANN)), (mine, b"sk-mine"), jwt=True)
        assert beside.tenant != owner(jwt(ANN)).tenant


@pytest.mark.parametrize(
    "token",
    [
        b"sk-plain",
        b"a.b",
        b"a.b.c.d",
        b"a.!!!.c",
        b"..",
        b"e30.e30.e30",
        jwt([]),
        jwt("text"),
        jwt({"sub": "ann"}),
        jwt({"iss": "i"}),
        jwt(ANN | {"sub": ""}),
        jwt(ANN | {"sub": None}),
        jwt(ANN | {"sub": 7}),
        jwt(ANN | {"iss": ["i"]}),
        jwt(ANN | {"tid": {"a": 1}}),
        b"e30." + base64.urlsafe_b64encode(b'{"iss":' + b"[" * 300 + b"]" * 300 + b',"sub":"a"}'),
        b"e30." + base64.urlsafe_b64encode(b"\xff\xfe") + b".x",
    ],
)
def test_what_is_no_readable_token_is_its_own_tenant(token: bytes) -> None:
    """I3: no claims, no sharing, and no failure either."""
    assert owner(token) == known(bearer(token))


@given(st.binary(max_size=60))
def test_no_bytes_make_the_reading_of_a_token_fail(middle: bytes) -> None:
    """A token is a stranger's bytes."""
    for token in (b"a." + middle + b".c", b"a." + base64.urlsafe_b64encode(middle) + b".c"):
        assert caller(bearer(token), jwt=True) is not None


# ---- users named by the app, and no tenants at all


def test_users_behind_one_key_are_apart_when_the_app_names_them() -> None:
    """I2: `header:<name>` splits a key by user, and each key has users of its own."""
    how = {"mode": "header:X-User"}
    ann, bob = (known(bearer(b"k"), (b"x-user", name), **how) for name in (b"ann", b"bob"))
    assert ann.tenant != bob.tenant
    assert ann.token == bob.token
    assert known(bearer(b"k"), (b"x-user", b" ann "), **how) == ann
    assert known(bearer(b"k"), (b"x-user", b"Ann"), **how).tenant != ann.tenant
    assert known(bearer(b"other"), (b"x-user", b"ann"), **how).tenant != ann.tenant
    assert known(bearer(b"k"), **{"mode": "per-key"}).tenant not in (ann.tenant, bob.tenant)


@pytest.mark.parametrize("users", [[], [b""], [b"  "], [b"ann", b"ann"], [b"ann", b"bob"]])
def test_a_user_who_is_not_named_once_is_nobody(users: list[bytes]) -> None:
    """I3: never a bucket for all who were not named."""
    headers = [bearer(b"k"), *((b"x-user", user) for user in users)]
    assert caller(*headers, mode="header:x-user") is None


def test_shared_is_one_tenant_with_a_token_for_each_key() -> None:
    """Said out loud by the operator; a key that upstream refuses still gets nothing."""
    first, second = (known(bearer(key), mode="shared") for key in (b"a", b"b"))
    assert first.tenant == second.tenant
    assert first.token != second.token
