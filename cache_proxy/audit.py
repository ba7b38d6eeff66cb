"""Audits: some semantic hits are asked upstream as well, and the two answers compared.

Off the client's path, few at a time. What they cost is counted as spent, in a row of its own. A
wrong hit raises the floor of the entry that was served, and enough of them the threshold of all.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Literal

import structlog

from . import guards
from .agreement import alike
from .dial import Dial
from .errors import MemoryUnavailable, UpstreamUnavailable
from .judge import Judge
from .ledger import Ledger, Source
from .memory import Memory
from .model import Answer, Call, Candidate, Entry
from .passage import Landing
from .reading import PROTOCOLS, Exchange

__all__ = ["Auditor", "Case", "Verdict"]

log = structlog.get_logger("cache_proxy")

Verdict = Literal["right", "wrong", "unclear"]

_AT_ONCE = 4
_REMEMBERED = 1_000  # semantic hits that `cache-proxy audit N` can go back to
_LARGEST_BODY = 65_536
_SECONDS = 120.0
# Two answers in other words say the same thing above this cosine of their beginnings; below it
# they count as different, since calling a right hit wrong costs hits and nothing else.
_SAME_MEANING = 0.90
_COMPARED_CHARACTERS = 1_000
# Differences that make two answers different whatever their wording.
_TELLING = ("numbers", "negation", "antonyms")


@dataclass(frozen=True, slots=True)
class Case:
    """One semantic hit that was served: the request, and what it got."""

    exchange: Exchange  # with the caller's credential; kept in memory only
    call: Call
    entry: Entry
    score: float


class Auditor:
    """Built once. `ask` puts a request to upstream without a stream and without the cache."""

    def __init__(
        self,
        *,
        ask: Callable[[Exchange, Call], Awaitable[Landing]],
        memory: Memory,
        ledger: Ledger,
        dial: Dial,
        share: float,
        dice: Callable[[], float],
        judge: Judge | None = None,
    ) -> None:
        self._ask = ask
        self._memory = memory
        self._ledger = ledger
        self._dial = dial
        self._share = share
        self._dice = dice
        self._judge = judge
        self._latest: OrderedDict[bytes, Case] = OrderedDict()
        self._tasks: set[asyncio.Task[Verdict]] = set()
        self._seats = asyncio.Semaphore(_AT_ONCE)

    def served(self, case: Case) -> None:
        """A semantic hit went out; audit it or only remember it."""
        if len(case.exchange.body) > _LARGEST_BODY:
            return
        self._latest[case.call.digest] = case
        self._latest.move_to_end(case.call.digest)
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)
        if self._share and self._dice() < self._share and len(self._tasks) < _AT_ONCE * 4:
            self._spawn(self.audit(case))

    async def audit_last(self, count: int) -> dict[str, int]:
        """Audit the latest distinct semantic hits now; how each came out."""
        cases = list(self._latest.values())[-count:]
        verdicts = await asyncio.gather(*(self.audit(case) for case in cases))
        found: dict[str, int] = {"right": 0, "wrong": 0, "unclear": 0}
        for verdict in verdicts:
            found[verdict] += 1
        return found

    async def audit(self, case: Case) -> Verdict:
        """Ask upstream what was served from memory, and take the label."""
        async with self._seats:
            try:
                async with asyncio.timeout(_SECONDS):
                    landing = await self._ask(case.exchange, case.call)
                    self._spend(case, landing)
                    verdict = await self._compare(case, landing)
            except (UpstreamUnavailable, TimeoutError):
                return "unclear"
        if verdict != "unclear":
            await self._learn(case, wrong=verdict == "wrong")
        return verdict

    def _spend(self, case: Case, landing: Landing) -> None:
        self._ledger.record_upstream(
            "audit",
            landing.answer.usage if landing.answer else None,
            landing.cost,
            model=case.call.request.model,
            tenant=case.call.tenant,
            provider=case.exchange.routed.provider.name,
        )

    async def _compare(self, case: Case, landing: Landing) -> Verdict:
        answer = landing.answer
        if answer is None or answer.error or answer.empty or not answer.terminal:
            return "unclear"
        text_of = PROTOCOLS[case.call.request.operation].text_of
        served, fresh = text_of(case.entry.body), text_of(answer.body)
        question = case.call.request.text or ""
        same = await self._same(question, served, fresh, case.exchange)
        return "right" if same else "wrong"

    async def _same(
        self, question: str, one: str, other: str, exchange: Exchange | None = None
    ) -> bool:
        """Do two answers to one question say the same? A judge is asked for audits only."""
        if alike(one, other):
            return True
        if self._judge is not None and exchange is not None:
            judged = await self._judge.same(exchange, question, one, other)
            if judged is not None:
                return judged
        facts = guards.facts(one), guards.facts(other)
        if any(guards.GUARDS[name](*facts) for name in _TELLING):
            return False
        similarity = await self._memory.similarity(
            one[:_COMPARED_CHARACTERS], other[:_COMPARED_CHARACTERS]
        )
        return similarity is not None and similarity >= _SAME_MEANING

    def observe(self, call: Call, near: Candidate, answer: Answer, source: Source) -> None:
        """A request that upstream answered, beside its nearest neighbour's answer: a free label."""
        if len(self._tasks) >= _AT_ONCE * 4:
            return

        async def compare() -> Verdict:
            text_of = PROTOCOLS[call.request.operation].text_of
            same = await self._same(
                call.request.text or "", text_of(near.entry.body), text_of(answer.body)
            )
            self._ledger.record_label(
                source,
                near.similarity,
                wrong=not same,
                model=call.request.model,
                tenant=call.tenant,
            )
            return "right" if same else "wrong"

        self._spawn(compare())

    def report(self, similarity: float) -> None:
        """A person says that a hit at this similarity was wrong."""
        self._ledger.record_label("report", similarity, wrong=True)
        self._turn(similarity, wrong=True)

    def _spawn(self, work: Coroutine[Any, Any, Verdict]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _turn(self, score: float, *, wrong: bool) -> None:
        before = self._dial.threshold
        if self._dial.learn(score, wrong=wrong):
            log.warning("threshold", was=before, now=self._dial.threshold, why="wrong hits")

    async def _learn(self, case: Case, *, wrong: bool) -> None:
        self._ledger.record_label(
            "audit",
            case.score,
            wrong=wrong,
            model=case.call.request.model,
            tenant=case.call.tenant,
        )
        if wrong:
            try:
                await self._memory.store.raise_floor(case.entry.digest, case.score)
            except MemoryUnavailable:
                log.warning("audit", lost="the floor of a wrong hit: the store does not answer")
        self._turn(case.score, wrong=wrong)
