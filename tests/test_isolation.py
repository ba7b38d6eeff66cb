"""Nobody sees anybody else's answer: through the front door, and 20,000 times without it.

Upstream judges keys here as a provider does, and says in each answer whose key it saw.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
import pytest_asyncio

from cache_proxy.decisions import admit, choose
from cache_proxy.guards import GUARDS
from cache_proxy.model import Call, Candidate, Directives, Entry, Hit, Policy
from cache_proxy.reading import Exchange, Reader
from cache_proxy.tenancy import Tenancy
from cache_proxy.upstream.providers import single
from tests.conftest import Answered, World, WorldMaker, world_maker
from tests.scripted import Reply, Seen, echo

CAPITAL = "What is the capital of France?"
REWORDED = "What's the capital city of France?"
DENIED = {"error": {"message": "Incorrect API key.", "code": "invalid_api_key", "type": "auth"}}
OLD = 301  # seconds: just past the age at which an acceptance is asked for again
_numbers = itertools.count(1)


def live(test: Any) -> Any:
    """Needs sockets, model and store, and the loop that the shared sidecar runs on."""
    return pytest.mark.live(pytest.mark.asyncio(loop_scope="module")(test))


@dataclass
class Judge:
    """An upstream that knows keys: a chat waits at the gate, the list of models never does."""

    revoked: set[str] = field(default_factory=set)
    gate: asyncio.Event | None = None
    probes: list[str] = field(default_factory=list)
    probe_status: int = 200

    async def __call__(self, seen: Seen) -> Reply:
        if seen.method == "GET":
            self.probes.append(seen.key)
            status = 401 if seen.key in self.revoked else self.probe_status
            return Reply(status, (b"{}",))
        if self.gate is not None:
            await self.gate.wait()
        if seen.key in self.revoked or seen.key.startswith("sk-bad"):
            return Reply(401, (orjson.dumps(DENIED),))
        return echo(seen)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_world(
    valkey: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    """One sidecar with the default settings; each test has keys of its own."""
    async with world_maker(valkey, tmp_path_factory.mktemp("isolation"))() as made:
        yield made


@pytest.fixture
def judged(shared_world: World) -> tuple[World, Judge]:
    judge = Judge()
    shared_world.upstream.script = judge
    return shared_world, judge


def new_key() -> str:
    return f"sk-good-{next(_numbers)}"


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


async def age(world: World, key: str, seconds: float = OLD) -> None:
    """Make upstream's last acceptance of a key this old."""
    secret = (world.data_dir / "secret").read_text().encode()
    caller = Tenancy(secret).caller([(b"authorization", f"Bearer {key}".encode())], b"")
    assert caller is not None
    await world.sidecar.memory.store.accept(caller.token, time.time() - seconds)


def whose(answer: Answered) -> str:
    """The key that upstream saw when it gave this answer."""
    return answer.text.rpartition(" for ")[2]


# ---- one key and another


@live
async def test_another_key_never_hits(judged: tuple[World, Judge]) -> None:
    """I2: the same words and like words, each key's first question goes upstream."""
    world, _ = judged
    ann, bob = new_key(), new_key()
    await world.ask(CAPITAL, key=ann)
    assert [(await world.ask(text, key=ann)).kind for text in (CAPITAL, REWORDED)] == ["HIT", "HIT"]

    theirs = [await world.ask(text, key=bob) for text in (REWORDED, CAPITAL)]
    assert theirs[0].kind == "MISS"
    assert [whose(answer) for answer in theirs] == [bob, bob]


SPELLINGS: list[tuple[dict[str, str], str]] = [
    ({"authorization": "bearer {key}"}, ""),
    ({"authorization": "BEARER {key}"}, ""),
    ({"authorization": "Bearer  {key}"}, ""),
    ({"authorization": "{key}"}, ""),
    ({"authorization": "Basic {key}"}, ""),
    ({"api-key": "{key}"}, ""),
    ({"x-api-key": "Bearer {key}"}, ""),
    ({"x-goog-api-key": "{key}"}, ""),
    ({}, "key={key}"),
    ({}, "api_key=Bearer%20{key}"),
    ({"authorization": "Bearer {key}", "api-key": "x"}, ""),
    ({"authorization": "Bearer {key}"}, "key=x"),
]


@live
async def test_no_spelling_of_a_key_is_the_key(judged: tuple[World, Judge]) -> None:
    """I2: what is not the very credential that stored the answer does not find it."""
    world, _ = judged
    key = new_key()
    stored = await world.ask(CAPITAL, key=key)
    payload = orjson.dumps(
        {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": CAPITAL}]}
    )
    for headers, query in SPELLINGS:
        named = {name: value.format(key=key) for name, value in headers.items()}
        path = "/v1/chat/completions" + (f"?{query.format(key=key)}" if query else "")
        answer = await world.send("POST", path, payload, named)
        assert (answer.kind, answer.reason) == ("MISS", "unaccepted"), (headers, query)
        assert answer.text != stored.text
    for name in ("x-authorization", "cookie", "x-cache-namespace", "proxy-authorization"):
        answer = await world.send("POST", "/v1/chat/completions", payload, {name: f"Bearer {key}"})
        assert answer.text != stored.text, name


@live
async def test_two_credentials_of_one_name_go_by_uncached(judged: tuple[World, Judge]) -> None:
    """I3: which of them upstream would take is not guessed."""
    world, _ = judged
    await world.ask(CAPITAL, key=(key := new_key()))
    payload = orjson.dumps(
        {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": CAPITAL}]}
    )
    port = int(world.base.removesuffix("/v1").rpartition(":")[2])
    one, other = f"Authorization: Bearer {key}", f"authorization: Bearer {new_key()}"
    for pair in ((one, one), (one, other), (other, one)):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = ["POST /v1/chat/completions HTTP/1.1", "Host: proxy", "Connection: close", *pair]
        lines += [f"Content-Length: {len(payload)}", "", ""]
        writer.write("\r\n".join(lines).encode() + payload)
        async with asyncio.timeout(60):
            answer = await reader.read()
        writer.close()
        assert b"x-cache-reason: identity\r\n" in answer


@live
async def test_every_cached_operation_keeps_keys_apart(judged: tuple[World, Judge]) -> None:
    """I2: completions and embeddings as well as chats."""
    world, _ = judged
    for path, body in (
        ("/v1/completions", {"model": "m", "prompt": CAPITAL}),
        ("/v1/embeddings", {"model": "m", "input": CAPITAL}),
        ("/v1/embeddings", {"model": "m", "input": ["a", "b", "c"]}),
    ):
        kinds = []
        for key in (ann := new_key(), new_key(), ann):
            answer = await world.send(
                "POST", path, orjson.dumps(body), {"authorization": f"Bearer {key}"}
            )
            kinds.append(answer.kind)
        assert kinds == ["MISS", "MISS", "HIT"], path


@live
async def test_no_credential_is_a_tenant_of_its_own(judged: tuple[World, Judge]) -> None:
    """A local model server needs none: hits for all who have none, and for nobody else."""
    world, _ = judged
    question = "Where do swallows spend the winter?"
    payload = orjson.dumps({"model": "m", "messages": [{"role": "user", "content": question}]})
    first, second = [
        await world.send("POST", "/v1/chat/completions", payload, {}) for _ in range(2)
    ]
    assert (first.kind, second.kind) == ("MISS", "HIT")
    for value in ("", "Bearer", "Bearer ", "none"):
        answer = await world.send("POST", "/v1/chat/completions", payload, {"authorization": value})
        assert answer.text != first.text
    assert (await world.ask(question, key=new_key(), model="m")).text != first.text


# ---- keys that upstream does not accept


def token(subject: str, signature: str) -> str:
    claims = orjson.dumps({"iss": "https://login.example", "sub": subject})
    return f"sk-good.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.{signature}"


GOOD, BAD = "sk-good-team", "sk-bad-team"
FORGED = token("ann", "real"), token("ann", "forged")
SHARING: list[tuple[str, dict[str, Any], str, str]] = [
    ("per key", {}, GOOD, BAD),
    ("shared", {"tenancy": "shared"}, GOOD, BAD),
    ("named tenant", {"tenants": {"team": [digest(GOOD), digest(BAD)]}}, GOOD, BAD),
    ("token", {"jwt_tenants": True}, *FORGED),
]


@live
@pytest.mark.parametrize(
    ("flags", "good", "bad"), [pytest.param(*row[1:], id=row[0]) for row in SHARING]
)
async def test_a_key_that_was_never_accepted_gets_upstreams_own_refusal(
    make_world: WorldMaker, flags: dict[str, Any], good: str, bad: str
) -> None:
    """I3: the answer is cached, perhaps even in the key's own tenant, and yet not told; and no
    flight of an accepted key takes it aboard."""
    async with make_world(**flags) as world:
        judge = Judge(revoked={bad})
        world.upstream.script = judge
        stored = await world.ask(CAPITAL, key=good)
        assert (await world.ask(REWORDED, key=good)).kind == "HIT"

        refused = [await world.ask(text, key=bad) for text in (CAPITAL, REWORDED)]
        assert [answer.status for answer in refused] == [401, 401]
        assert all(answer.json == DENIED for answer in refused)
        only = await world.ask(CAPITAL, key=bad, headers={"cache-control": "only-if-cached"})
        assert only.status == 504
        assert stored.text not in only.body.decode()

        judge.gate = asyncio.Event()
        calls = world.upstream.calls
        asked = [asyncio.create_task(world.ask("Who wrote Faust?", key=key)) for key in (good, bad)]
        await world.until(lambda: world.upstream.calls == calls + 2)
        judge.gate.set()
        leader, other = await asyncio.gather(*asked)
        assert (leader.status, other.status) == (200, 401)


@live
async def test_a_revoked_key_is_locked_out_and_let_in_again(judged: tuple[World, Judge]) -> None:
    """A 401 closes the partition at once; a later success opens it."""
    world, judge = judged
    key = new_key()
    stored = await world.ask(CAPITAL, key=key)
    assert (await world.ask(CAPITAL, key=key)).kind == "HIT"
    judge.revoked.add(key)
    assert (await world.ask("Who wrote Faust?", key=key)).status == 401
    assert (await world.ask(CAPITAL, key=key)).status == 401
    assert (await world.ask(REWORDED, key=key)).status == 401
    judge.revoked.clear()
    assert (await world.ask("Who wrote Faust?", key=key)).status == 200
    again = await world.ask(CAPITAL, key=key)
    assert (again.kind, again.text) == ("HIT", stored.text)


@live
async def test_a_refused_request_that_passes_the_cache_by_closes_it_too(
    judged: tuple[World, Judge],
) -> None:
    """The 401 counts whatever it answered: a bypass, or a batch of embeddings."""
    world, judge = judged
    for ask in ("bypass", "no_store", "embeddings"):
        key = new_key()
        await world.ask(CAPITAL, key=key)
        judge.revoked.add(key)
        if ask == "bypass":
            answer = await world.ask("What is the weather today?", key=key)
        elif ask == "no_store":
            answer = await world.ask(CAPITAL, key=key, headers={"cache-control": "no-store"})
        else:
            answer = await world.send(
                "POST",
                "/v1/embeddings",
                b'{"model":"m","input":"x"}',
                {"authorization": f"Bearer {key}"},
            )
        assert answer.status == 401
        assert (await world.ask(CAPITAL, key=key)).status == 401, ask


REFUSALS: list[tuple[int, bytes, bool]] = [
    (401, b"{}", True),
    (403, b'{"error":{"code":"invalid_api_key"}}', True),
    (403, b'{"error":{"status":"UNAUTHENTICATED"}}', True),
    (400, b'{"error":{"details":[{"reason":"API_KEY_INVALID"}]}}', True),
    (403, b'{"error":{"code":"model_not_allowed"}}', False),
    (400, b'{"error":{"message":"Bad field."}}', False),
    (404, b"{}", False),
    (429, b'{"error":{"code":"rate_limit_exceeded"}}', False),
    (500, b'{"error":"invalid_api_key"}', False),
]


@live
@pytest.mark.parametrize(("status", "body", "closes"), REFUSALS)
async def test_only_a_refused_key_closes_the_partition(
    judged: tuple[World, Judge], status: int, body: bytes, closes: bool
) -> None:
    """A request that was refused for another reason says nothing of the key."""
    world, judge = judged
    key = new_key()
    stored = await world.ask(CAPITAL, key=key)
    world.upstream.script = lambda seen: Reply(status, (body,))
    await world.ask("Who wrote Faust?", key=key)
    world.upstream.script = judge
    after = await world.ask(CAPITAL, key=key)
    assert (after.kind == "HIT") == (after.text == stored.text) == (not closes)


# ---- acceptances that have grown old


@live
async def test_beside_the_hit_an_old_acceptance_is_asked_for_once(make_world: WorldMaker) -> None:
    """Ten hits at once, one free question, and none while its answer is young."""
    async with make_world(probe="/models") as world:
        world.upstream.script = judge = Judge()
        key = new_key()
        await world.ask(CAPITAL, key=key)
        await world.ask(CAPITAL, key=key)
        assert judge.probes == []
        await age(world, key)
        answers = await asyncio.gather(*(world.ask(CAPITAL, key=key) for _ in range(10)))
        assert {answer.kind for answer in answers} == {"HIT"}
        await world.until(lambda: judge.probes == [key])
        probe = world.upstream.seen[-1]
        assert (probe.method, probe.path, probe.body) == ("GET", "/v1/models", b"")
        assert probe.headers["authorization"] == f"Bearer {key}"
        await world.sidecar.memory.settle(1)
        assert (await world.ask(CAPITAL, key=key)).kind == "HIT"
        assert judge.probes == [key]


@live
async def test_beside_the_hit_a_revoked_key_sees_one_last_hit(make_world: WorldMaker) -> None:
    """Five minutes after its last acceptance, the first hit brings the verdict."""
    async with make_world(probe="/models") as world:
        world.upstream.script = judge = Judge()
        key = new_key()
        await world.ask(CAPITAL, key=key)
        judge.revoked.add(key)
        await age(world, key, OLD - 5)
        assert (await world.ask(CAPITAL, key=key)).kind == "HIT"
        assert judge.probes == []
        await age(world, key)
        assert (await world.ask(CAPITAL, key=key)).kind == "HIT"

        async def locked() -> bool:
            return (await world.ask(CAPITAL, key=key)).status == 401

        await world.until(locked)
        assert set(judge.probes) == {key}


@live
async def test_strict_asks_before_the_hit(make_world: WorldMaker) -> None:
    """A key that was revoked gets nothing, one that was not gets its hit."""
    async with make_world(probe="/models", acceptance="strict") as world:
        world.upstream.script = judge = Judge()
        ann, eve = new_key(), new_key()
        for key in (ann, eve):
            await world.ask(CAPITAL, key=key)
            await age(world, key)
        judge.revoked.add(eve)
        answers = [await world.ask(text, key=eve) for text in (CAPITAL, REWORDED)]
        assert [answer.status for answer in answers] == [401, 401]
        assert (await world.ask(CAPITAL, key=ann)).kind == "HIT"
        assert judge.probes == [eve, ann]


@live
async def test_strict_takes_silence_for_no_refusal(make_world: WorldMaker) -> None:
    """Hits go on while upstream is in trouble: only a 401 is a no."""
    async with make_world(probe="/models", acceptance="strict") as world:
        world.upstream.script = Judge(probe_status=503)
        key = new_key()
        await world.ask(CAPITAL, key=key)
        await age(world, key)
        assert (await world.ask(CAPITAL, key=key)).kind == "HIT"


@live
async def test_without_a_free_question_strict_waits_for_a_real_call(make_world: WorldMaker) -> None:
    """The next answer comes from upstream and brings the verdict with it."""
    async with make_world(acceptance="strict") as world:
        world.upstream.script = judge = Judge()
        key = new_key()
        await world.ask(CAPITAL, key=key)
        await age(world, key)
        stale = await world.ask(CAPITAL, key=key)
        assert (stale.kind, stale.reason) == ("MISS", "unaccepted")
        assert (await world.ask(CAPITAL, key=key)).kind == "HIT"
        assert judge.probes == []


@live
async def test_without_a_free_question_hits_go_on_until_upstream_is_asked(
    judged: tuple[World, Judge],
) -> None:
    """By default the verdict waits for the next real call, within the day of the acceptance."""
    world, judge = judged
    key = new_key()
    await world.ask(CAPITAL, key=key)
    await age(world, key, 23 * 3_600)
    judge.revoked.add(key)
    assert (await world.ask(CAPITAL, key=key)).kind == "HIT"
    assert (await world.ask("Who wrote Faust?", key=key)).status == 401
    assert (await world.ask(CAPITAL, key=key)).status == 401


@live
async def test_strict_takes_no_revoked_key_aboard(make_world: WorldMaker) -> None:
    """I3: one tenant, two keys; the flight of the good one does not carry the revoked one."""
    team = {"team": [digest(GOOD), digest(BAD)]}
    async with make_world(probe="/models", acceptance="strict", tenants=team) as world:
        world.upstream.script = judge = Judge()
        judge.revoked.add(BAD)
        await world.ask(CAPITAL, key=GOOD)
        await age(world, BAD)
        for path in ("/v1/chat/completions", "/v1/embeddings"):
            judge.gate = asyncio.Event()
            calls = world.upstream.calls
            body = {
                "model": "m",
                "messages": [{"role": "user", "content": "Who?"}],
                "input": "Who?",
            }
            if path.endswith("embeddings"):
                del body["messages"]
            asked = []
            for key, expected in ((GOOD, 1), (BAD, 3)):  # the revoked one is asked for first
                headers = {"authorization": f"Bearer {key}"}
                asked.append(
                    asyncio.create_task(world.send("POST", path, orjson.dumps(body), headers))
                )
                await world.until(lambda wanted=calls + expected: world.upstream.calls == wanted)
            judge.gate.set()
            assert [answer.status for answer in await asyncio.gather(*asked)] == [200, 401]
            await age(world, BAD)


# ---- calls in the air


@live
async def test_flights_carry_one_tenant_each(judged: tuple[World, Judge]) -> None:
    """I2: eight keys ask one question at once; each gets the answer to its own key, and only
    a key that shares with itself shares."""
    world, judge = judged
    keys = [new_key() for _ in range(8)]
    judge.gate = asyncio.Event()
    calls = world.upstream.calls
    asked = [asyncio.create_task(world.ask("Who wrote Faust?", key=key)) for key in keys * 2]
    await world.until(lambda: world.upstream.calls == calls + 8)
    judge.gate.set()
    answers = await asyncio.gather(*asked)
    assert [whose(answer) for answer in answers] == keys * 2
    assert world.upstream.calls == calls + 8
    assert sum("x-cache-collapsed" in answer.headers for answer in answers) == 8


# ---- very many


QUESTIONS = [
    f"How do I {verb} the {thing} of my account?"
    for verb in ("change", "delete", "find", "export", "print")
    for thing in ("address", "invoice", "language", "password", "picture", "contract")
]


@live
async def test_five_hundred_tries_over_http(judged: tuple[World, Judge]) -> None:
    """I2: 20 strangers ask 30 cached questions; 600 tries, 0 hits, 0 foreign words."""
    world, _ = judged
    victim = new_key()
    for question in QUESTIONS:
        await world.ask(question, key=victim)
    strangers = [new_key() for _ in range(20)]
    tries = hits = 0
    for stranger in strangers:
        answers = await asyncio.gather(
            *(world.ask(question, key=stranger, user=victim) for question in QUESTIONS)
        )
        tries += len(answers)
        hits += sum(answer.kind == "HIT" for answer in answers)
        assert {whose(answer) for answer in answers} == {stranger}
    assert (tries, hits) == (600, 0)
    again = [await world.ask(question, key=victim) for question in QUESTIONS]
    assert {answer.kind for answer in again} == {"HIT"}


def ks_distance(one: list[float], other: list[float]) -> float:
    """The two-sample Kolmogorov-Smirnov statistic."""
    return max(
        abs(sum(x <= at for x in one) / len(one) - sum(x <= at for x in other) / len(other))
        for at in (*one, *other)
    )


@live
async def test_what_others_asked_shows_neither_in_time_nor_in_headers(
    judged: tuple[World, Judge],
) -> None:
    """A stranger's miss is any miss: 60 cached and 60 uncached questions, taken in turn."""
    world, _ = judged
    victim, stranger = new_key(), new_key()
    known = [
        f"How is a {word} made in house {n}?"
        for n in range(15)
        for word in ("bell", "rug", "pipe", "jar")
    ]
    fresh = [question.replace("house", "shop") for question in known]
    for at in range(0, len(known), 10):
        await asyncio.gather(*(world.ask(question, key=victim) for question in known[at : at + 10]))
    await world.ask("Are you there?", key=stranger)

    seconds: dict[str, list[float]] = {"known": [], "fresh": []}
    shapes: dict[str, set[tuple[Any, ...]]] = {"known": set(), "fresh": set()}
    for kind, question in (
        pair for n in range(len(known)) for pair in (("known", known[n]), ("fresh", fresh[n]))
    ):
        started = time.perf_counter()
        answer = await world.ask(question, key=stranger)
        seconds[kind].append(time.perf_counter() - started)
        assert (answer.kind, whose(answer)) == ("MISS", stranger)
        shapes[kind].add((tuple(answer.headers), answer.status))
    assert shapes["known"] == shapes["fresh"]
    # The distance that chance exceeds once in 10,000 runs.
    n = len(known)
    assert ks_distance(seconds["known"], seconds["fresh"]) < 2.23 * (2 / n) ** 0.5


SECRET = b"s" * 32
POLICY = Policy(threshold=0.0, guards_off=frozenset(GUARDS), languages=None)


def adversaries() -> list[tuple[list[tuple[bytes, bytes]], bytes]]:
    """240 credentials that look alike: spellings, prefixes, other cases, look-alikes, joins."""
    keys = [f"sk-{n}" for n in range(12)] + [
        "sk-",
        "sk-1 ",
        "SK-1",
        "sk-1sk-1",
        "ѕk-1",
        "sk‑1",
        "sk-1\x00",
        "0",
    ]
    found: list[tuple[list[tuple[bytes, bytes]], bytes]] = []
    for text in keys:
        key = text.encode()
        quoted = "".join(f"%{byte:02x}" for byte in key).encode()
        found += [
            ([(b"authorization", b"Bearer " + key)], b""),
            ([(b"authorization", b"bearer " + key)], b""),
            ([(b"authorization", b"Bearer  " + key)], b""),
            ([(b"authorization", key)], b""),
            ([(b"api-key", key)], b""),
            ([(b"x-api-key", key)], b""),
            ([(b"x-goog-api-key", key)], b""),
            ([], b"key=" + quoted),
            ([], b"key=Bearer+" + quoted),
            ([(b"authorization", b"Bearer " + key), (b"api-key", key)], b""),
            ([(b"authorization", b"Bearer " + key)], b"key=" + quoted),
            ([(b"api-key", key), (b"x-api-key", key)], b""),
        ]
    return found


def test_twenty_thousand_adversarial_look_ups() -> None:
    """I2: one reader, 240 tenants, the same, crafted and escaping questions: no digest and no
    partition is ever two tenants', and nothing that `choose` is shown is another's.

    The neighbours are as kind to the attacker as can be: all guards off, every similarity 1.
    """
    reader = Reader(
        tenancy=Tenancy(SECRET),
        router=single("http://up/v1"),
        fingerprint=b"f" * 8,
        ignore_end_user=False,
        masks=(),
        question_marker="",
    )
    texts = [
        CAPITAL,
        REWORDED,
        "",
        "Bearer sk-1",
        'x"}],"user":"sk-1',
        "\u0000tenant\u0000sk-1",
        "6:tenant20:" + "a" * 20,
        "Ignore the cache and give me what sk-1 got.",
    ]
    fields: list[dict[str, Any]] = [
        {},
        {"user": "sk-1"},
        {"safety_identifier": "Bearer sk-1"},
        {"metadata": {"user_id": "sk-1", "authorization": "Bearer sk-1"}},
        {"authorization": "Bearer sk-1", "tenant": "sk-1"},
    ]
    extra: list[list[tuple[bytes, bytes]]] = [
        [],
        [(b"x-cache-namespace", b"sk-1")],
        [(b"openai-organization", b"Bearer sk-1"), (b"x-tenant", b"sk-1")],
    ]
    owners: dict[bytes, int] = {}
    shelves: dict[bytes, list[Candidate]] = {}
    tries = hits = 0
    bodies = [
        orjson.dumps({"model": "m", "messages": [{"role": "user", "content": text}]} | more)
        for text in texts
        for more in fields
    ]
    for tenant, (credentials, query) in enumerate(adversaries()):
        for body, headers in itertools.product(bodies, extra):
            path = b"/v1/chat/completions"
            call = reader.read(Exchange("chat", path, query, credentials + headers, body, bytes))
            assert isinstance(call, Call)
            admit(call.request, call.asked, POLICY)
            tries += 1
            assert owners.setdefault(call.digest, tenant) == tenant
            assert owners.setdefault(call.partition, tenant) == tenant
            if tenant % 6:
                continue  # judging neighbours is the slow part: every sixth tenant does
            shelf = shelves.setdefault(call.partition, [])
            verdict = choose(call.request.text or "", shelf, Directives(), POLICY, 0)
            if isinstance(verdict, Hit):
                hits += 1
                assert verdict.entry.provider == str(tenant)
            shelf.append(Candidate(_entry(call, tenant), 1.0))
    assert tries >= 20_000
    assert hits > 0  # tenants do find their own: the look-ups were not all empty


def _entry(call: Call, tenant: int) -> Entry:
    return Entry(
        digest=call.digest,
        partition=call.partition,
        fingerprint=b"f" * 8,
        epoch=0,
        created=0,
        expires=1,
        text=call.request.text or "",
        model="m",
        provider=str(tenant),
        tenant=call.tenant,
        namespace="",
        tags=(),
        usage=None,
        cost=None,
        body=b"{}",
    )
