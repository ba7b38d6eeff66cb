"""The relay before scripted upstreams: retries, bans, keys, routes, with real sockets and SDKs."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from typing import Any

import openai
import orjson
import pytest

from cache_proxy.serve import bind
from tests.conftest import World, WorldMaker
from tests.scripted import Reply, ScriptedUpstream, Seen, echo, scripted_upstream, streamed, whole
from tests.stopwatch import awake

pytestmark = pytest.mark.live

THRICE = {"attempts": 3}
BUSY = b'{"error":{"message":"overloaded","type":"server_error","param":null,"code":null}}'
JSON = ("content-type", "application/json")
MODEL = "gpt-4o-mini"


def busy(status: int = 503, **headers: str) -> Reply:
    told = ((name.replace("_", "-"), value) for name, value in headers.items())
    return Reply(status, (BUSY,), (JSON, *told))


def first(count: int, reply: Reply) -> Callable[[Seen], Reply]:
    """This reply so many times, then the echo's."""
    return lambda seen: reply if seen.number <= count else echo(seen)


def sdk(world: World, **options: Any) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=world.base, api_key="sk-one", **options)


def asks(text: str) -> Any:
    return [{"role": "user", "content": text}]


def nobody() -> str:
    """A base URL where no one listens."""
    closed = bind("upstream", "127.0.0.1", 0)
    port = closed.getsockname()[1]
    closed.close()
    return f"http://127.0.0.1:{port}/v1"


# ---- retries


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_what_may_pass_is_asked_again_and_the_answer_is_kept(
    make_world: WorldMaker, stream: bool
) -> None:
    """Each named status; the client learns how often upstream was asked."""
    async with make_world(model="none", retry=THRICE) as world:
        for status in (503, 429, 529):
            done = world.upstream.calls
            world.upstream.script = first(done + 1, busy(status))
            answered = await world.ask(f"q{status}", stream=stream)
            assert (answered.status, answered.kind) == (200, "MISS")
            assert answered.headers["x-upstream-attempts"] == "2"
            assert world.upstream.calls == done + 2
            again = await world.ask(f"q{status}", stream=stream)
            assert (again.tier, again.text) == ("exact", answered.text)
            assert "x-upstream-attempts" not in again.headers
        plain = await world.ask("another", stream=stream)
        assert "x-upstream-attempts" not in plain.headers


async def test_what_will_not_pass_is_not_asked_again(make_world: WorldMaker) -> None:
    """Refusals go to the client as they are, at once, and without a word on retrying."""
    async with make_world(model="none", retry=THRICE) as world:
        for calls, status in enumerate((400, 401, 403, 404, 413, 422), 1):
            world.upstream.script = lambda seen, status=status: busy(status)  # type: ignore[misc]
            answered = await world.ask("x")
            assert (answered.status, answered.body) == (status, BUSY)
            assert world.upstream.calls == calls
            assert "x-should-retry" not in answered.headers
        world.upstream.script = lambda seen: busy(503, x_should_retry="false")
        assert (await world.ask("x")).headers["x-should-retry"] == "false"
        assert world.upstream.calls == 7


async def test_a_bad_key_is_told_at_once_and_closes_its_partition(make_world: WorldMaker) -> None:
    """One call, the provider's own words, and what is stored is not served to that key any more."""
    async with make_world(model="none", retry=THRICE) as world:
        await world.ask("stored")
        assert (await world.ask("stored")).kind == "HIT"
        world.upstream.script = lambda seen: busy(401)
        async with sdk(world) as client:
            with pytest.raises(openai.AuthenticationError, match="overloaded"):
                await client.chat.completions.create(model=MODEL, messages=asks("new"))
        assert world.upstream.calls == 2

        async def closed() -> bool:
            return (await world.ask("stored")).status == 401

        await world.until(closed)


async def test_our_retries_and_the_sdks_do_not_multiply(make_world: WorldMaker) -> None:
    """Three attempts, not nine: the SDK is told not to try again."""
    async with make_world(model="none", retry=THRICE) as world, sdk(world) as client:
        world.upstream.script = lambda seen: busy(503)
        with pytest.raises(openai.InternalServerError, match="overloaded") as caught:
            await client.chat.completions.create(model=MODEL, messages=asks("x"))
        told = caught.value.response.headers
        assert (told["x-should-retry"], told["x-upstream-attempts"]) == ("false", "3")
        assert world.upstream.calls == 3


@pytest.mark.parametrize(
    ("status", "error", "retries"),
    [(503, openai.InternalServerError, 0), (429, openai.RateLimitError, 2)],
)
async def test_a_storm_of_failures_reaches_upstream_a_fifth_stronger_at_most(
    make_world: WorldMaker, status: int, error: type[openai.APIStatusError], retries: int
) -> None:
    """Fifty requests a second. A breaker may stop the one storm and send clients away for a while;
    nothing but the budget bounds the other, and the SDK's own retries are told not to add to it."""
    seconds, rate = 4, 50
    async with (
        make_world(model="none", retry=THRICE) as world,
        sdk(world, max_retries=retries) as client,
    ):
        world.upstream.script = lambda seen: busy(status)

        async def ask(n: int) -> None:
            with pytest.raises(error):
                await client.chat.completions.create(model=MODEL, messages=asks(f"q{n}"))

        began, asked = time.monotonic(), []
        for n in range(seconds * rate):
            asked.append(asyncio.create_task(ask(n)))
            await asyncio.sleep(began + (n + 1) / rate - time.monotonic())
        async with asyncio.timeout(100):
            await asyncio.gather(*asked)
        requests = seconds * rate
        assert world.upstream.calls <= 1.2 * requests
        assert status == 503 or world.upstream.calls > 1.1 * requests
        assert (await world.stats())["requests"] == requests


async def test_an_answer_that_has_begun_is_never_asked_for_again(make_world: WorldMaker) -> None:
    """I5: a cut is a cut, streamed or whole."""

    def cut(seen: Seen) -> Reply:
        if not seen.json.get("stream"):
            return Reply(parts=(b'{"id": "c', b"hat"), cut=True)
        reply = streamed("one two three", seen)
        return Reply(parts=reply.parts[:3], headers=reply.headers, cut=True)

    async with make_world(model="none", retry=THRICE) as world:
        world.upstream.script = cut
        for calls, stream in enumerate((False, True), 1):
            with pytest.raises(Exception, match=r"broke off|closed"):
                await world.ask("x", stream=stream)
            assert world.upstream.calls == calls


async def test_a_dropped_connection_is_not_asked_again(make_world: WorldMaker) -> None:
    """It may have been sent, answered and charged: whether to try again is the client's to say."""
    calls = 0

    async def drop(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        calls += 1
        await reader.read(65_536)
        writer.close()

    server = await asyncio.start_server(drop, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        base = f"http://127.0.0.1:{port}/v1"
        async with make_world(model="none", retry=THRICE, upstream=base) as world:
            answered = await world.ask("x")
            assert (answered.status, calls) == (502, 1)
            assert "x-should-retry" not in answered.headers


async def test_a_dead_upstream_is_told_within_two_seconds(make_world: WorldMaker) -> None:
    """Refused connections are tried again, quickly; then the SDK need not."""
    async with make_world(model="none", retry=THRICE, upstream=nobody()) as world:
        began = awake()
        answered = await world.ask("x")
        assert awake() - began < 2.5
        assert (answered.status, answered.headers["x-should-retry"]) == (502, "false")
        assert answered.headers["x-upstream-attempts"] == "3"


async def test_retried_answers_give_their_connections_back(make_world: WorldMaker) -> None:
    """Twenty questions, each refused once, through two connections."""
    async with make_world(
        model="none", retry={"attempts": 2, "budget": 1.0}, max_connections=2
    ) as world:
        refused: set[str] = set()

        def script(seen: Seen) -> Reply:
            if seen.text in refused:
                return echo(seen)
            refused.add(seen.text)
            return Reply(429, (BUSY, b" "), (JSON,), pause=60)  # its body takes its time

        world.upstream.script = script
        async with asyncio.timeout(100):
            answers = await asyncio.gather(*(world.ask(f"q{n}") for n in range(20)))
        assert [answer.status for answer in answers] == [200] * 20
        assert world.upstream.calls == 40


async def test_a_client_that_leaves_ends_the_waiting(make_world: WorldMaker) -> None:
    """I8: nothing more is asked for whoever is gone."""
    async with make_world(model="none", retry=THRICE) as world:
        world.upstream.script = lambda seen: busy(503, retry_after="1")
        asked = asyncio.create_task(world.ask("x"))
        await world.until(lambda: world.upstream.calls == 1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

        async def counted() -> bool:
            return (await world.stats())["requests"] == 1

        await world.until(counted)
        world.upstream.script = echo
        await asyncio.sleep(1.3)  # when it would have come again
        await world.ask("y")
        assert [seen.text for seen in world.upstream.seen] == ["x", "y"]


# ---- bans


async def test_nobody_asks_inside_a_ban(make_world: WorldMaker) -> None:
    """A 429 with a moment holds back whoever shares the limit, and nobody else."""
    told: list[float] = []

    def script(seen: Seen) -> Reply:
        times[seen.number] = time.monotonic(), awake()
        if seen.text == "q0" and not told:
            told.extend((time.monotonic(), awake()))
            return busy(429, retry_after_ms="1500")
        return echo(seen)

    times: dict[int, tuple[float, float]] = {}
    async with make_world(model="none", retry=THRICE) as world:
        world.upstream.script = script
        asked = [asyncio.create_task(world.ask("q0"))]
        await world.until(lambda: bool(told) and world.upstream.seen[0].ended.is_set())
        asked += [asyncio.create_task(world.ask(f"q{n}")) for n in range(1, 15)]
        began = awake()
        others = await asyncio.gather(
            world.ask("other key", key="sk-two"), world.ask("other model", model="gpt-4o")
        )
        assert [other.status for other in others] == [200, 200]
        assert awake() - began < 1.0
        answers = await asyncio.gather(*asked)
        assert {answer.status for answer in answers} == {200}
        late = [
            times[seen.number]
            for seen in world.upstream.seen[1:]
            if (seen.key, seen.json["model"]) == ("sk-one", MODEL)
        ]
        assert len(late) == 15
        assert min(moment for moment, _ in late) - told[0] >= 1.5
        assert min(moment for _, moment in late) - told[1] < 2.5


async def test_a_long_ban_is_the_clients_to_wait_for(make_world: WorldMaker) -> None:
    """The 429 goes through with its header; until it is over nothing is asked, and all are told."""
    async with make_world(model="none", retry=THRICE) as world:
        world.upstream.script = lambda seen: busy(429, retry_after="60")
        answered = await world.ask("x")
        assert (answered.status, answered.body) == (429, BUSY)
        assert answered.headers["retry-after"] == "60"
        assert "x-should-retry" not in answered.headers
        for stream in (False, True):
            local = await world.ask("y", stream=stream)
            assert (local.status, local.reason) == (429, "rate_limited")
            assert 50 <= int(local.headers["retry-after"]) <= 60
            assert local.json["error"]["type"] == "rate_limit_error"
        assert world.upstream.calls == 1
        said = await world.stats()
        assert said["error_reasons"] == {"rate_limited": 2}
        world.upstream.script = echo
        assert (await world.ask("x", key="sk-two")).status == 200
        assert (await world.ask("x", model="gpt-4o")).status == 200


async def test_a_wait_beyond_the_clients_patience_is_not_made(make_world: WorldMaker) -> None:
    """It would be gone by then: it is told instead."""
    async with make_world(model="none", retry=THRICE) as world:
        world.upstream.script = lambda seen: busy(503, retry_after="10")
        began = awake()
        answered = await world.ask("x", headers={"x-stainless-read-timeout": "8"})
        assert (answered.status, answered.headers["retry-after"]) == (503, "10")
        assert "x-should-retry" not in answered.headers
        assert (awake() - began < 4, world.upstream.calls) == (True, 1)


# ---- providers and keys


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE_KEY", "sk-provider-one")
    monkeypatch.setenv("TWO_KEY", "sk-provider-two")


def table(upstream: ScriptedUpstream, *models: str, key: str = "") -> dict[str, Any]:
    return {"base_url": upstream.base_url, "models": models, "api_key_env": key}


def saw(upstream: ScriptedUpstream) -> set[str]:
    """Whatever an upstream was shown of a key."""
    names = ("authorization", "x-api-key", "api-key", "x-goog-api-key")
    found = {seen.headers.get(name, "") for seen in upstream.seen for name in names}
    return (found | {seen.query.decode() for seen in upstream.seen}) - {""}


async def test_each_provider_gets_its_own_models_and_its_own_key(
    make_world: WorldMaker, keys: None
) -> None:
    """I10, and no key goes where it does not belong; the answers are kept apart."""
    async with scripted_upstream() as one, scripted_upstream() as two:
        providers = {
            "one": table(one, "gpt-*", key="ONE_KEY"),
            "two": table(two, "qwen*", key="TWO_KEY"),
        }
        async with make_world(model="none", providers=providers, upstream=None) as world:
            gpt = await world.ask("x", model="gpt-4o", headers={"x-api-key": "sk-stray"})
            qwen = await world.ask("x", model="qwen3", stream=True)
            assert (gpt.status, qwen.status) == (200, 200)
            assert gpt.headers["x-upstream-provider"] == "one"
            assert (qwen.headers["x-upstream-provider"], qwen.headers["x-upstream-model"]) == (
                "two",
                "qwen3",
            )
            prefixed = await world.ask("x", model="two/gpt-4o")
            assert prefixed.headers["x-upstream-model"] == "gpt-4o"
            await world.send("GET", "/two/v1/files?key=sk-query&limit=3")
            assert saw(one) == {"Bearer sk-provider-one"}
            assert saw(two) == {"Bearer sk-provider-two", "limit=3"}
            assert [seen.json["model"] for seen in two.seen[:2]] == ["qwen3", "gpt-4o"]
            assert two.seen[-1].path == "/v1/files"
            assert world.upstream.calls == 0
            # The same key, model and question, but each provider's own answer.
            assert prefixed.text != gpt.text
            assert (await world.ask("x", model="two/gpt-4o")).text == prefixed.text
            again = await world.ask("x", model="gpt-4o", headers={"x-api-key": "sk-stray"})
            assert (again.kind, again.text) == ("HIT", gpt.text)


async def test_a_key_accepted_by_one_provider_proves_nothing_to_another(
    make_world: WorldMaker,
) -> None:
    """I2: where all share, a stranger whom a lax provider answers reads nothing of a strict one."""
    async with scripted_upstream() as strict, scripted_upstream() as lax:
        strict.script = lambda seen: echo(seen) if seen.key == "sk-good" else busy(401)
        providers = {"strict": table(strict, "gpt-*"), "lax": table(lax)}
        async with make_world(
            model="none", providers=providers, upstream=None, tenancy="shared"
        ) as world:
            await world.ask("secret", model="gpt-4o", key="sk-good")
            assert (await world.ask("secret", model="gpt-4o", key="sk-good")).kind == "HIT"
            assert (await world.ask("hello", model="llama", key="sk-bad")).status == 200
            assert (await world.ask("secret", model="gpt-4o", key="sk-bad")).status == 401


async def test_only_client_tokens_open_a_proxy_that_has_them(
    make_world: WorldMaker, keys: None
) -> None:
    """Everything else gets a 401 in its protocol's shape; nothing is looked up or asked."""
    token = hashlib.sha256(b"sk-app").hexdigest()
    async with scripted_upstream() as one:
        providers = {"one": table(one, key="ONE_KEY")}
        tokens = [f"sha256:{token}"]
        async with make_world(
            model="none", providers=providers, upstream=None, client_tokens=tokens
        ) as world:
            assert (await world.ask("x", key="sk-app")).kind == "MISS"
            assert (await world.ask("x", key="sk-app")).kind == "HIT"
            for answered in (await world.ask("x", key="sk-else"), await world.ask("x", key="")):
                assert (answered.status, answered.reason) == (401, "unauthorised")
                assert answered.json["error"]["type"] == "authentication_error"
                assert answered.headers["x-should-retry"] == "false"
            assert (await world.send("GET", "/v1/models")).status == 401
            other = await world.send("POST", "/v1/messages", b"{}", {"x-api-key": "sk-else"})
            assert other.json["type"] == "error"
            assert other.json["error"]["type"] == "authentication_error"
            assert one.calls == 1
            assert saw(one) == {"Bearer sk-provider-one"}
            assert (await world.send("GET", "/v1/files", headers={"x-api-key": "sk-app"})).status


@pytest.mark.parametrize("key", ["TWO_KEY", ""], ids=["with a key", "without"])
async def test_audits_and_judges_are_asked_with_the_right_key(
    make_world: WorldMaker, keys: None, key: str
) -> None:
    """A judge elsewhere is asked with our key for it or not at all, never with the client's."""

    def script(seen: Seen) -> Reply:
        if "single word yes or no" in seen.text:
            return whole("Yes.", seen)
        return whole(f"Paris, in the wording number {seen.number * 'x'}.", seen)

    async with scripted_upstream() as one, scripted_upstream() as two:
        one.script = two.script = script
        providers = {"one": table(one, "gpt-*"), "two": table(two, "judge", key=key)}
        async with make_world(providers=providers, upstream=None, judge_model="judge") as world:
            await world.ask("What is the capital of France?")
            assert (await world.ask("What's the capital city of France?")).tier == "semantic"
            headers = {"authorization": f"Bearer {world.token}", "content-type": "application/json"}
            told = await world.send("POST", "/audit", b'{"n": 5}', headers, base=world.admin)
            assert (one.calls, two.calls) == (2, 1 if key else 0)
            assert saw(one) == {"Bearer sk-one"}
            if key:
                assert told.json["right"] == 1
                assert saw(two) == {"Bearer sk-provider-two"}


# ---- the list of models, and requests for nobody


def lists(*models: str) -> Callable[[Seen], Reply]:
    data = [{"id": model, "object": "model", "owned_by": "x"} for model in models]
    body = orjson.dumps({"object": "list", "data": data})
    return lambda seen: Reply(parts=(body,)) if seen.path.endswith("/models") else echo(seen)


async def test_the_lists_of_models_are_merged(make_world: WorldMaker, keys: None) -> None:
    """Each under a name that leads to it; who is silent is named; no key strays."""
    async with (
        scripted_upstream() as one,
        scripted_upstream() as two,
        scripted_upstream() as three,
    ):
        one.script, two.script = lists("gpt-4o", "gpt-5"), lists("qwen3", "gpt-5")
        three.script = lambda seen: busy(500)
        providers = {
            "one": table(one, "gpt-*", key="ONE_KEY"),
            "two": table(two, "qwen*"),
            "three": table(three, "x"),
            "four": {"base_url": nobody(), "models": ["y"]},
        }
        async with make_world(model="none", providers=providers) as world:
            world.upstream.script = lists("llama")
            async with sdk(world) as client:
                page = await client.models.with_raw_response.list()
            found = [model.id for model in page.parse().data]
            assert found == ["gpt-4o", "one/gpt-5", "qwen3", "two/gpt-5", "llama"]
            assert page.headers["x-upstream-missing"] == "three, four"
            assert (saw(one), saw(two), saw(three)) == ({"Bearer sk-provider-one"}, set(), set())
            assert saw(world.upstream) == {"Bearer sk-one"}  # who takes what matches nobody
            for model in found:
                await world.ask("x", model=model)
            asked = [
                [seen.json["model"] for seen in upstream.seen if seen.method == "POST"]
                for upstream in (one, two, world.upstream)
            ]
            assert asked == [["gpt-4o", "gpt-5"], ["qwen3", "gpt-5"], ["llama"]]
            single = await world.send("GET", "/two/v1/models")
            assert [model["id"] for model in single.json["data"]] == ["qwen3", "gpt-5"]
            counted = await world.stats()
            assert counted["bypasses"] == {"passthrough": 2}


async def test_one_upstreams_own_list_is_passed_on_as_it_is(make_world: WorldMaker) -> None:
    """Byte for byte, with the client's key."""
    async with make_world(model="none") as world:
        body = b'{"data":[ {"id": "m"} ], "object":"list"}'
        world.upstream.script = lambda seen: Reply(parts=(body,))
        answered = await world.send("GET", "/v1/models", headers={"authorization": "Bearer sk"})
        assert answered.body == body
        assert world.upstream.seen[0].key == "sk"


async def test_a_protocol_that_nobody_speaks_is_a_local_404(make_world: WorldMaker) -> None:
    """In its own shape, final, and no provider is asked."""
    async with scripted_upstream() as one:
        tables = {"one": table(one, "gpt-*"), "gem": table(one) | {"protocol": "gemini"}}
        async with make_world(model="none", providers=tables, upstream=None) as world:
            told = await world.send("POST", "/v1/messages", b"{}", {"x-api-key": "k"})
            assert (told.status, told.json["error"]["type"]) == (404, "not_found_error")
            chat = await world.ask("x", model="gem/gemini-x")
            assert (chat.status, chat.json["error"]["code"]) == (404, "model_not_found")
            assert chat.headers["x-should-retry"] == "false"
            assert one.calls == 0


async def test_a_body_that_hides_its_model_is_not_guessed_at(make_world: WorldMaker) -> None:
    """A wrong guess would show one provider's key to another."""
    async with scripted_upstream() as one, scripted_upstream() as two:
        tables = {"one": table(one, "gpt-*"), "two": table(two)}
        async with make_world(model="none", providers=tables, upstream=None) as world:
            told = await world.ask("x", headers={"content-encoding": "gzip"})
            assert (told.status, one.calls, two.calls) == (415, 0, 0)


async def test_passed_on_requests_go_by_their_model_too(make_world: WorldMaker) -> None:
    """A body is read where its model decides, and only the prefix is taken off."""
    async with scripted_upstream() as one, scripted_upstream() as two:
        tables = {
            "one": table(one, "claude-*") | {"protocol": "anthropic"},
            "two": table(two) | {"protocol": "anthropic"},
        }
        async with make_world(model="none", providers=tables, upstream=None) as world:
            for model in ("claude-x", "other", "two/claude-x"):
                body = b'{"max_tokens": 1, "model": "%b"}' % model.encode()
                headers = {"content-type": "application/json", "x-api-key": "k"}
                answered = await world.send("POST", "/v1/messages", body, headers)
                assert answered.status == 200
            assert [seen.body for seen in one.seen] == [b'{"max_tokens": 1, "model": "claude-x"}']
            assert [seen.body for seen in two.seen] == [
                b'{"max_tokens": 1, "model": "other"}',
                b'{"max_tokens":1,"model":"claude-x"}',
            ]
            broken = await world.send("POST", "/v1/messages", b"{", headers)
            assert (broken.status, broken.json["type"]) == (400, "error")
