"""Audits: some semantic hits are asked upstream as well, and the two answers compared.

Off the client's path, few at a time. What they cost is counted as spent, in a row of its own. A
wrong hit raises the floor of the entry that was served, and enough of them the threshold of all.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import structlog

from . import canonical, decisions, guards
from .agreement import alike
from .counters import label
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
_COMPARED_CHARACTERS = 800  # most answers fit the packaged window with that
_READ_CHARACTERS = 8_000  # of an answer, for its numbers and negations: some 20 ms at most
# Differences that make two answers different whatever their wording.
_TELLING = ("numbers", "negation", "antonyms")
_LOOKED_AT = 32  # neighbours among which a reported prompt is looked for
_OBSERVED = 256  # misses that wait to be compared
# A prompt that was served wrongly is scored anew next time, in other company: some rounding.
_NEIGHBOURHOOD = 0.005


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
        self._asking: set[bytes] = set()  # digests of requests that are under audit
        self._tasks: set[asyncio.Task[Verdict]] = set()
        self._observing: set[asyncio.Task[Verdict]] = set()
        self._seats = asyncio.Semaphore(_AT_ONCE)

    def served(self, case: Case) -> None:
        """A semantic hit went out; audit it or only remember it."""
        if len(case.exchange.body) + len(case.entry.body) > _LARGEST_BODY:
            return
        self._latest[case.call.digest] = case
        self._latest.move_to_end(case.call.digest)
        if len(self._latest) > _REMEMBERED:
            self._latest.popitem(last=False)
        if self._share and self._dice() < self._share and len(self._tasks) < _AT_ONCE * 4:
            self._begin([case])

    async def audit_last(self, count: int) -> dict[str, int]:
        """Audit now the latest distinct semantic hits that were not audited yet; how each came out.

        The same hit asked twice would be one piece of evidence counted as two.
        """
        verdicts = await asyncio.gather(*self._begin(list(self._latest.values())[-count:]))
        found: dict[str, int] = {"right": 0, "wrong": 0, "unclear": 0}
        for verdict in verdicts:
            found[verdict] += 1
        return found

    def _begin(self, cases: Sequence[Case]) -> list[asyncio.Task[Verdict]]:
        """Audit these, but for what is being audited already."""
        begun = []
        for case in cases:
            digest = case.call.digest
            if digest not in self._asking:
                self._asking.add(digest)
                begun.append(_spawn(self._tasks, self.audit(case)))
                begun[-1].add_done_callback(partial(self._end, digest))
        return begun

    def _end(self, digest: bytes, _: object) -> None:
        self._asking.discard(digest)

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
            latest = self._latest.get(case.call.digest)
            if latest is not None and latest.entry.digest == case.entry.digest:
                del self._latest[case.call.digest]  # served again meanwhile, perhaps
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
        if answer is None or answer.error or answer.empty or answer.refused or not answer.terminal:
            return "unclear"
        if not decisions.ENDINGS.issuperset(answer.finished):
            return "unclear"  # cut off at max_tokens, where what was served never is
        text_of = PROTOCOLS[case.call.request.operation].text_of
        served, fresh = text_of(case.entry.body), text_of(answer.body)
        question = case.call.request.text or ""
        return await self._same(question, served, fresh, case.exchange)

    async def _same(
        self, question: str, one: str, other: str, exchange: Exchange | None = None
    ) -> Verdict:
        """Do two answers to one question say the same? A judge is asked for audits only."""
        if alike(one, other):
            return "right"
        if self._judge is not None and exchange is not None:
            judged = await self._judge.same(exchange, question, one, other)
            if judged is not None:
                return "right" if judged else "wrong"
        facts = guards.facts(one[:_READ_CHARACTERS]), guards.facts(other[:_READ_CHARACTERS])
        if any(guards.GUARDS[name](*facts) for name in _TELLING):
            return "wrong"
        similarity = await self._memory.similarity(
            one[:_COMPARED_CHARACTERS], other[:_COMPARED_CHARACTERS]
        )
        if similarity is None:
            return "unclear"  # a busy encoder or a long word says nothing about the answers
        return "right" if similarity >= _SAME_MEANING else "wrong"

    def observe(self, call: Call, near: Candidate, answer: Answer, source: Source) -> None:
        """A request that upstream answered, beside its nearest neighbour's answer: a free label."""
        if len(self._observing) >= _OBSERVED:
            return

        async def compare() -> Verdict:
            text_of = PROTOCOLS[call.request.operation].text_of
            verdict = await self._same(
                call.request.text or "", text_of(near.entry.body), text_of(answer.body)
            )
            if verdict != "unclear":
                self._ledger.record_label(
                    source,
                    near.similarity,
                    wrong=verdict == "wrong",
                    model=call.request.model,
                    tenant=call.tenant,
                )
            return verdict

        _spawn(self._observing, compare())

    async def report(self, digest: bytes, prompt: str | None) -> float | None:
        """A person says that this entry's answer was wrong, for `prompt` if that is known.

        It is purged, and what is stored under its name later is matched by meaning only above what
        the prompt scored, or exactly where that is not known. The score up to which it is not
        served any more; None when no such entry is stored. Raises MemoryUnavailable.
        """
        (entry,) = await self._memory.fetch([digest])
        score = floor = None
        if entry is not None and prompt is not None:
            score = floor = await self._score(entry, canonical.clean(prompt))
        elif entry is not None:
            cases = reversed(self._latest.values())
            score = next((case.score for case in cases if case.entry.digest == digest), None)
        floor = 1.0 if floor is None else min(1.0, floor + _NEIGHBOURHOOD)
        await self._memory.disown(digest, floor)
        if entry is None:
            return None
        for name in [at for at, case in self._latest.items() if case.entry.digest == digest]:
            del self._latest[name]  # known to be wrong: no second label for an audit to find
        if score is not None:
            self._label("report", score, wrong=True, model=entry.model, tenant=entry.tenant)
        return floor

    async def _score(self, entry: Entry, prompt: str) -> float | None:
        """What this prompt scores beside the entry, as serving would find it; None where it would
        not find it, or by its very words, which says nothing about meaning."""
        if prompt == entry.text:
            return None
        began = asyncio.get_running_loop().time()
        found = await self._memory.recall(prompt, entry.partition, _LOOKED_AT, began)
        texts = guards.facts(prompt), guards.facts(entry.text)
        near = (one for one in found.candidates if one.entry.digest == entry.digest)
        return next((decisions.score(candidate, *texts) for candidate in near), None)

    async def _learn(self, case: Case, *, wrong: bool) -> None:
        if wrong:
            floor = case.score + _NEIGHBOURHOOD
            try:
                await self._memory.store.raise_floor(case.entry.digest, floor)
            except MemoryUnavailable:
                log.warning("audit", lost="the floor of a wrong hit: the store does not answer")
        self._label(
            "audit", case.score, wrong=wrong, model=case.call.request.model, tenant=case.call.tenant
        )

    def _label(self, source: Source, score: float, *, wrong: bool, model: str, tenant: str) -> None:
        """Into the pool; where that moves the threshold of this model's requests, say so."""
        self._ledger.record_label(source, score, wrong=wrong, model=model, tenant=tenant)
        before = self._dial.threshold(model)
        if self._dial.learn(model, score, wrong=wrong):
            now = self._dial.threshold(model)
            log.warning("threshold", model=label(model), was=before, now=now, why="wrong hits")
            if now > before:
                self._ledger.record_tightened(now, model=model)


def _spawn(
    tasks: set[asyncio.Task[Verdict]], work: Coroutine[Any, Any, Verdict]
) -> asyncio.Task[Verdict]:
    task = asyncio.get_running_loop().create_task(work)
    tasks.add(task)
    task.add_done_callback(tasks.discard)
    return task
