"""An LLM asked whether two answers say the same, where the operator named one.

Its words cost money: they are counted in a row of their own. What it does not answer plainly is
no verdict.
"""

from __future__ import annotations

import orjson

from .errors import NoRoute, UpstreamUnavailable
from .ledger import Ledger
from .pricing import PriceBook
from .protocols import chat
from .reading import Exchange
from .tenancy import is_credential
from .upstream.providers import Router
from .upstream.relay import Errand, Relay

__all__ = ["Judge"]

_SECONDS = 60.0
_LONGEST = 8_000  # characters of each answer that it reads
_QUESTION = (
    "Two answers were given to one question. Would a person who asked it learn the same from "
    "both? Wording, order and length do not matter; facts, numbers, names and advice do. Answer "
    "with the single word yes or no.\n\nQuestion:\n{}\n\nFirst answer:\n{}\n\nSecond answer:\n{}"
)


class Judge:
    """Asks `model`: with the credential of the request that is audited if both go to one provider,
    with a key of ours if the provider has one, and else not."""

    def __init__(
        self, *, model: str, relay: Relay, router: Router, ledger: Ledger, prices: PriceBook
    ) -> None:
        self._model = model
        self._relay = relay
        self._router = router
        self._ledger = ledger
        self._prices = prices

    async def same(self, exchange: Exchange, question: str, one: str, other: str) -> bool | None:
        """Its verdict; None when it gave none."""
        text = _QUESTION.format(question[:_LONGEST], one[:_LONGEST], other[:_LONGEST])
        body = {
            "model": self._model,
            "temperature": 0,
            "messages": [{"role": "user", "content": text}],
        }
        try:
            priority = [(b"x-priority", b"best_effort")]
            route, sent = self._router.route(b"/v1/chat/completions", priority, body)
        except NoRoute:
            return None
        if route.provider.judges and route.provider != exchange.routed.provider:
            return None
        headers = [(k, v) for k, v in exchange.headers if is_credential(k)]
        headers.append((b"content-type", b"application/json"))
        errand = Errand(
            route=route,
            query=b"",
            headers=headers,
            body=orjson.dumps(sent),
            with_usage=None,
            token=b"",
            patience=_SECONDS,
            alone=True,
        )
        try:
            response = await self._relay.send(errand)
            try:
                said = b"".join([chunk async for chunk in response.chunks()])
            finally:
                await response.close()
        except UpstreamUnavailable:
            return None
        answer = chat.whole(said)
        if response.status != 200 or answer.error or answer.empty:
            return None
        usage = answer.usage
        cost = self._prices.cost(usage, route.model, route.provider.base_url) if usage else None
        self._ledger.record_upstream(
            "judge", usage, cost, model=route.model, provider=route.provider.name
        )
        word = chat.text_of(answer.body).strip().strip(".").lower()
        return {"yes": True, "no": False}.get(word)
