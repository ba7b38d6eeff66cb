"""HTTP in, HTTP out: limits, pass-through, and clients that leave.

The proxied paths are one plain ASGI callable: a framework's route would cost more CPU than a whole
exact hit. Decides nothing about caching; knows no provider's JSON.
"""

from __future__ import annotations

import asyncio
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import suppress
from typing import Any, NamedTuple

from . import canonical
from .arrival import Gone, Message, Overdue, Receive, Upload, Watcher
from .clients import ClientTokens
from .errors import BadRequest, NoRoute, UpstreamUnavailable
from .model import Outcome
from .protocols.faults import fault
from .reading import Exchange
from .reply import Reply, failure, passed_headers
from .upstream.catalogue import Catalogue
from .upstream.client import Response
from .upstream.providers import Provider, Route, Router
from .upstream.relay import Relay
from .upstream.routes import Headers, forward, operation, protocol
from .upstream.tasks import asks

__all__ = ["App"]

Scope = MutableMapping[str, Any]
Send = Callable[[Message], Awaitable[None]]

# Neither of the HTTP parsers bounds all of these.
_HEAD_BYTES = 65_536
_HEAD_FIELDS = 200


class App:
    """The proxy's port."""

    def __init__(
        self,
        *,
        handlers: Mapping[str, Callable[[Exchange], Awaitable[Reply]]],
        relay: Relay,
        router: Router,
        clients: ClientTokens,
        record: Callable[[Outcome], None],
        max_body_bytes: int,
        body_seconds: float,
        read_seconds: float,
        now: Callable[[], float],
    ) -> None:
        self._handlers = handlers
        self._relay = relay
        self._router = router
        self._clients = clients
        self._catalogue = Catalogue(relay, router)
        self._record = record
        self._max_body_bytes = max_body_bytes
        self._too_large = 413, f"The request body is larger than {max_body_bytes} bytes."
        self._body_seconds = body_seconds
        self._silent = f"The client sent nothing for {body_seconds:g} seconds."
        self._read_seconds = read_seconds
        self._now = now

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})
        if scope["type"] != "http":
            return
        watcher = Watcher(receive)
        try:
            await self._answer(scope, receive, send, watcher)
        except asyncio.CancelledError:
            if not watcher.left:
                raise
        except Gone:
            pass
        finally:
            watcher.stop()

    async def _answer(self, scope: Scope, receive: Receive, send: Send, watcher: Watcher) -> None:
        started = self._now()
        headers: Headers = scope["headers"]
        if problem := _bad_head(headers):
            await _send(send, self._refused(scope, *problem, started))
            return
        if not self._clients.admit(headers, scope["query_string"]):
            problem = 401, "This proxy wants one of its own client tokens as the key."
            await _send(send, self._refused(scope, *problem, started, code="invalid_api_key"))
            return
        name = operation(scope["method"], scope["path"])
        if name is None:
            await self._other(scope, receive, send, watcher, started)
            return
        body = await self._body(headers, receive)
        if isinstance(body, tuple):
            await _send(send, self._refused(scope, *body, started))
            return
        reply = await self._handlers[name](
            Exchange(name, scope["raw_path"], scope["query_string"], headers, body, watcher.start)
        )
        await _send(send, reply)

    async def _body(self, headers: Headers, receive: Receive) -> bytes | tuple[int, str]:
        """The whole body, or the status and sentence to refuse it with."""
        if _length(headers) > self._max_body_bytes:
            return self._too_large
        parts: list[bytes] = []
        size = 0
        # A bare timer, around the first byte too: a client may name a length and send nothing.
        # `asyncio.timeout` would be one tenth of what the rest of an exact hit costs here.
        overdue = Overdue(self._body_seconds)
        try:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                parts.append(message["body"])
                size += len(message["body"])
                if size > self._max_body_bytes:
                    return self._too_large
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
        except asyncio.CancelledError:
            if not overdue.struck:
                raise
            return 408, f"The request body took longer than {self._body_seconds:g} seconds."
        finally:
            overdue.timer.cancel()

    async def _other(
        self, scope: Scope, receive: Receive, send: Send, watcher: Watcher, started: float
    ) -> None:
        """Any other path; its body is read only where the model in it says who it goes to."""
        headers: Headers = scope["headers"]
        path: bytes = scope["raw_path"]
        try:
            wanted = scope["method"] == "POST" and (asks(path) or _says_json(headers))
            coded = bool(_kept(headers, b"content-encoding"))
            if wanted and coded and self._router.by_model(path, headers):
                # To guess would show one provider's key to another.
                raise NoRoute("A body with a Content-Encoding does not show its model.", 415)
            if wanted and not coded and self._router.by_body(path, headers):
                read = await self._body(headers, receive)
                if isinstance(read, tuple):
                    await _send(send, self._refused(scope, *read, started))
                    return
                route, _ = self._router.route(path, headers, canonical.load(read))
                body = _Body(route.body or read, len(route.body or read))
                watcher.start()
            else:
                route, _ = self._router.route(path, headers, None)
                body = await self._streamed(headers, receive, watcher)
        except BadRequest as exc:
            told = self._refused(scope, exc.status, str(exc), started, code=exc.code)
            await _send(send, told)
            return
        listed = self._router.listing(path, headers) if _lists_models(scope, route) else ()
        if len(listed) > 1:
            await _send(send, await self._models(scope, listed, route, started))
        else:
            await self._pass_through(scope, send, route, body, started)

    async def _streamed(self, headers: Headers, receive: Receive, watcher: Watcher) -> _Body:
        """The request's body as it arrives; no content when it has none."""
        overdue = Overdue(self._body_seconds)
        try:
            first = await receive()
        except asyncio.CancelledError:
            if not overdue.struck:
                raise
            raise BadRequest(self._silent, 408) from None
        finally:
            overdue.timer.cancel()
        if first["type"] == "http.disconnect":
            raise Gone
        length = _length(headers) if _kept(headers, b"content-length") else None
        if not first.get("more_body") and not first["body"]:
            watcher.start()
            return _Body(None, length)
        upload = Upload(receive, watcher, self._body_seconds, self._read_seconds)
        return _Body(upload.pieces(first), length, upload)

    async def _models(
        self, scope: Scope, listed: Sequence[Provider], route: Route, started: float
    ) -> Reply:
        """Several providers' models in one list."""
        outcome = Outcome(kind="bypass", reason="passthrough", status=200)
        asked = forward(scope["headers"])
        body, silent = await self._catalogue.models(listed, route, asked)
        outcome.ms = (self._now() - started) * 1_000
        if body is None:
            outcome.kind, outcome.reason, outcome.status = "error", "upstream", 502
            self._record(outcome)
            message = "No provider listed its models."
            told = fault(route.protocol, message, 502, "upstream_unavailable")
            return failure(outcome, told, retry=True)
        self._record(outcome)
        headers = passed_headers(outcome, [(b"content-type", b"application/json")])
        headers.append((b"content-length", b"%d" % len(body)))
        if silent:
            headers.append((b"x-upstream-missing", ", ".join(silent).encode()))
        return Reply(200, headers, body)

    async def _pass_through(
        self, scope: Scope, send: Send, route: Route, body: _Body, started: float
    ) -> None:
        """Byte for byte, streaming both ways, counted and nothing else."""
        outcome = Outcome(kind="bypass", reason="passthrough", provider=route.provider.name)
        if scope["method"] == "POST":  # look-ups take no place in the queue
            outcome.priority = route.priority
        headers: Headers = scope["headers"]
        forwarded = [*forward(headers), *_kept(headers, b"cache-control", b"pragma")]
        if body.length is not None:
            forwarded.append((b"content-length", b"%d" % body.length))
        try:
            try:
                outcome.attempts = 1
                response = await self._sent(scope, route, forwarded, body)
            except BadRequest as exc:
                outcome.kind, outcome.reason, outcome.status = "error", "bad_request", exc.status
                told = fault(route.protocol, str(exc), exc.status, exc.code)
                await _send(send, _last(failure(outcome, told, retry=False)))
                return
            except UpstreamUnavailable as exc:
                reason = "shed" if exc.reason == "shed" else "upstream"
                outcome.attempts = int(reason != "shed")
                outcome.kind, outcome.reason, outcome.status = "error", reason, exc.status_hint
                told = fault(route.protocol, str(exc), exc.status_hint, "upstream_unavailable")
                reply = failure(outcome, told, retry=True, retry_after=exc.retry_after)
                await _send(send, reply if body.upload is None else _last(reply))
                return
            outcome.status = response.status
            try:
                passed = passed_headers(outcome, response.headers)
                reply = Reply(response.status, passed, response.chunks())
                if body.upload is not None and not body.upload.whole:
                    reply = _last(reply)
                await _send(send, reply, head_only=scope["method"] == "HEAD")
            finally:
                await response.close()
        finally:
            outcome.ms = (self._now() - started) * 1_000
            self._record(outcome)

    async def _sent(self, scope: Scope, route: Route, headers: Headers, body: _Body) -> Response:
        """Upstream's answer; UpstreamUnavailable, or BadRequest when the client fell silent."""
        try:
            return await self._relay.pass_on(
                scope["method"],
                route,
                scope["query_string"],
                headers,
                body.content,
                read_seconds=self._read_seconds,
            )
        except asyncio.CancelledError:
            if body.upload is None or not body.upload.silent:
                raise
            if body.upload.silent == "client":
                raise BadRequest(self._silent, 408) from None
            message = "Upstream took no more of the request."
            raise UpstreamUnavailable(message, 504, reason="timeout") from None
        finally:
            if body.upload is not None:
                body.upload.close()

    def _refused(
        self,
        scope: Scope,
        status: int,
        message: str,
        started: float,
        *,
        code: str = "invalid_request",
    ) -> Reply:
        reason = "unauthorised" if status == 401 else "bad_request"
        outcome = Outcome(kind="error", reason=reason, status=status)
        outcome.ms = (self._now() - started) * 1_000
        self._record(outcome)
        told = fault(protocol(scope["raw_path"], scope["headers"]), message, status, code)
        return _last(failure(outcome, told, retry=False))


class _Body(NamedTuple):
    """What a request brings, whole or as it arrives, and the length it claims."""

    content: bytes | AsyncIterator[bytes] | None
    length: int | None
    upload: Upload | None = None


async def _send(send: Send, reply: Reply, *, head_only: bool = False) -> None:
    """Send a reply to its end, and settle it however that goes."""
    try:
        start = {"type": "http.response.start", "status": reply.status, "headers": reply.headers}
        await send(start)
        if isinstance(reply.body, bytes):
            await send({"type": "http.response.body", "body": reply.body})
            return
        # Where upstream breaks off, the client's connection is closed without an end: the cut
        # must look like one, and nothing may be spliced on.
        with suppress(UpstreamUnavailable):
            async for chunk in reply.body:
                if not head_only:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
    finally:
        reply.finish()


def _last(reply: Reply) -> Reply:
    """The last one on its connection: unread bytes may still be coming."""
    reply.headers.append((b"connection", b"close"))
    return reply


def _says_json(headers: Headers) -> bool:
    return dict(headers).get(b"content-type", b"").lower().startswith(b"application/json")


def _lists_models(scope: Scope, route: Route) -> bool:
    return (
        scope["method"] == "GET"
        and scope["path"].endswith("/models")
        and route.protocol == "openai"
    )


def _bad_head(headers: Headers) -> tuple[int, str] | None:
    size = hosts = 0
    for name, value in headers:
        size += len(name) + len(value)
        hosts += name == b"host"
    if size > _HEAD_BYTES or len(headers) > _HEAD_FIELDS:
        return 431, "The request's headers are too large."
    if hosts != 1:
        return 400, "The request names no host, or more than one."
    return None


def _length(headers: Headers) -> int:
    for name, value in headers:
        if name == b"content-length":
            return int(value) if value.isdigit() and len(value) < 19 else 0
    return 0


def _kept(headers: Headers, *names: bytes) -> Headers:
    return [(name, value) for name, value in headers if name in names]
