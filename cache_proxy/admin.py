"""The admin port: health, readiness, metrics, statistics, purge. Never proxies anything.

All but health and readiness want the token that the proxy wrote into its data dir.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from .audit import Auditor
from .certify import interval, upper_bound
from .errors import MemoryUnavailable
from .explain import Explainer
from .ledger import Ledger
from .memory import Memory
from .model import Selector
from .reading import PROTOCOLS, Exchange
from .stats import By, as_json, collect, parse_since
from .upstream.routes import operation

__all__ = ["Lifespan", "admin_app"]

Lifespan = Callable[[FastAPI], AbstractAsyncContextManager[None]]


class Purge(BaseModel):
    """Which entries to purge; the fields given must all match, and `all` stands for none given."""

    model_config = {"extra": "forbid"}

    entry: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    tag: str | None = None
    namespace: str | None = None
    model: str | None = None
    older_than_seconds: Annotated[int, Field(ge=0)] | None = None
    all: bool = False


class Explain(BaseModel):
    """A request as the app would send it."""

    model_config = {"extra": "forbid"}

    body: dict[str, Any]
    headers: dict[str, str] = Field(default_factory=dict)
    path: str = "/v1/chat/completions"


class Audit(BaseModel):
    """How many of the latest distinct semantic hits to audit."""

    model_config = {"extra": "forbid"}

    n: Annotated[int, Field(ge=1, le=1_000)] = 100


class Bad(BaseModel):
    """An entry whose answer was wrong, and for which prompt."""

    model_config = {"extra": "forbid"}

    entry: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
    prompt: str | None = None


def selector(purge: Purge, now: float) -> Selector:
    """Raises ValueError when nothing was selected, or everything by accident."""
    named = purge.model_dump(exclude={"all"}, exclude_none=True)
    if purge.all == bool(named):
        raise ValueError("Name what to purge, or say that all is meant.")
    return Selector(
        digest=bytes.fromhex(purge.entry) if purge.entry else None,
        tag=purge.tag,
        namespace=purge.namespace,
        model=purge.model,
        created_before=None
        if purge.older_than_seconds is None
        else int(now) - purge.older_than_seconds,
    )


def admin_app(
    *,
    token: str,
    memory: Memory,
    ledger: Ledger,
    auditor: Auditor,
    explainer: Explainer,
    clock: Callable[[], float],
) -> FastAPI:
    """The admin port's application."""

    def authorised(request: Request) -> None:
        given = request.headers.get("authorization", "").encode("latin-1", "replace")
        if not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "The admin token is missing or wrong.")

    app = FastAPI(title="cache-proxy admin", docs_url=None, redoc_url=None, openapi_url=None)
    guarded: list[Any] = [Depends(authorised)]

    @app.exception_handler(MemoryUnavailable)
    async def unavailable(_: Request, exc: MemoryUnavailable) -> Response:
        return JSONResponse({"title": f"The {exc.part} does not answer.", "status": 503}, 503)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, exc: RequestValidationError) -> Response:
        # What was sent stays out of it: it may be a prompt.
        first = exc.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "body"
        return JSONResponse({"detail": f"{where}: {first['msg']}."}, 422)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz(response: Response) -> dict[str, object]:
        response.status_code = 200 if memory.warm else 503
        return {"ready": memory.warm, "indexed": memory.indexed, "store": memory.store.state}

    @app.get("/metrics", dependencies=guarded)
    async def metrics() -> Response:
        text = ledger.metrics(memory.store.rejected)
        return Response(text, media_type="text/plain; version=0.0.4")

    @app.get("/stats", dependencies=guarded)
    async def stats(since: Annotated[str, Query()] = "7d", by: By | None = None) -> dict[str, Any]:
        await ledger.flush(memory.store)
        try:
            start = parse_since(since, clock())
        except ValueError as exc:
            raise HTTPException(422, str(exc)) from None
        return as_json(await collect(memory.store, start, clock(), by))

    @app.post("/purge", dependencies=guarded)
    async def purge(asked: Purge) -> dict[str, int]:
        try:
            chosen = selector(asked, clock())
        except ValueError as exc:
            raise HTTPException(422, str(exc)) from None
        epoch = await memory.store.purge(chosen, clock())
        return {"epoch": epoch, "deleted": await memory.store.sweep(chosen)}

    @app.post("/explain", dependencies=guarded)
    async def explain(asked: Explain) -> dict[str, Any]:
        headers = [(k.lower().encode(), v.encode("latin-1")) for k, v in asked.headers.items()]
        path, _, query = asked.path.partition("?")
        name = operation("POST", path)
        if name not in PROTOCOLS:
            raise HTTPException(422, "The path is of no operation that can be explained.")
        body = orjson.dumps(asked.body)
        return await explainer.explain(
            Exchange(name, path.encode(), query.encode(), headers, body, lambda: None)
        )

    @app.post("/audit", dependencies=guarded)
    async def audit(asked: Audit) -> dict[str, Any]:
        verdicts = await auditor.audit_last(asked.n)
        audited = verdicts["right"] + verdicts["wrong"]
        rate, low, high = interval(verdicts["wrong"], audited) if audited else (None, None, None)
        bound = upper_bound(verdicts["wrong"], audited, 0.95) if audited else None
        said: dict[str, Any] = {"audited": audited, "rate": rate, "low": low, "high": high}
        return {**verdicts, **said, "bound": bound}

    @app.post("/bad", dependencies=guarded)
    async def bad(asked: Bad) -> dict[str, Any]:
        floor = await auditor.report(bytes.fromhex(asked.entry), asked.prompt)
        return {"entry": asked.entry, "found": floor is not None, "floor": floor}

    return app
