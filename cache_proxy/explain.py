"""Why a request hit, missed or was passed by, and the one thing that would change it.

Walks the same path as `proxy.handle` with the same collaborators, and changes nothing: nothing is
served, stored, counted or asked upstream. Says names, scores and verdicts; never a prompt.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from . import canonical, decisions, guards
from .acceptance import Acceptance
from .agreement import alike
from .errors import BadRequest, MemoryUnavailable
from .memory import Memory
from .model import Bypass, Call, Candidate, Hit, Policy
from .reading import PROTOCOLS, Exchange, Reader

__all__ = ["Explainer", "Partitions", "explanation"]

_REMEMBERED = 4_096

# What an app can do about each reason; the numbers are filled in.
_CHANGES = {
    "off": "Leave out X-Cache-Mode: off.",
    "no_store": "Leave out Cache-Control: no-store.",
    "temperature": "Lower the temperature, or raise max_temperature.",
    "web_search": "Nothing: a web search answers differently every day.",
    "time_bound": 'Name the date instead of today or now, or set time_bound = "cache".',
    "identity": "Send one credential only, and the user header that `tenancy` names.",
    "unreadable": "A field has a type that cannot be compared, or there are more than 2,048"
    " messages; see the protocol's reference.",
    "encoded": "Send the body without Content-Encoding.",
    "unaccepted": "Nothing: after upstream has accepted this key once, it may hit.",
    "no_cache": "Leave out Cache-Control: no-cache.",
    "mode": "Leave out X-Cache-Mode: exact to match by meaning.",
    "no_text": "Only a request with a user text can be matched by meaning.",
    "tools": "Send tool_choice: none, or set semantic_with_tools = true.",
    "tool_turns": "Nothing: what tools said is compared exactly.",
    "parts": "Only texts are matched by meaning, not images or files.",
    "choices": "Ask for one choice (n = 1) to match by meaning.",
    "anaphoric": "Ask a question that stands by itself.",
    "short_turn": "Ask in full: with history, a turn of under three content words is exact only.",
    "language": "Use an encoder that serves this language.",
    "no_entry": "Ask once: nothing is stored in this partition yet.",
    "max_age": "Raise Cache-Control: max-age.",
    "window": "Shorten the text to the encoder's window, or set question_marker.",
    "late": "Raise cache_ms; the machine is too busy for this encoder.",
    "encoder": "Look at the encoder: it does not answer.",
    "no_encoder": 'Choose a model; "none" matches exactly only.',
    "store": "Look at the store: it does not answer.",
}


class Partitions:
    """Which partitions there are and which texts were asked in them lately, so that a miss that
    should have hit can name the field that differs. In memory, by keyed digest, the latest few
    thousand."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._seen: OrderedDict[bytes, OrderedDict[bytes, Mapping[str, str]]] = OrderedDict()
        self._places: OrderedDict[bytes, tuple[str, Mapping[str, str]]] = OrderedDict()

    def note(self, call: Call, churn: Mapping[str, str]) -> None:
        """Remember that this text was asked in this partition."""
        self._places[call.partition] = call.tenant, churn
        self._places.move_to_end(call.partition)
        if len(self._places) > _REMEMBERED:
            self._places.popitem(last=False)
        name = self._name(call)
        places = self._seen.setdefault(name, OrderedDict())
        self._seen.move_to_end(name)
        places[call.partition] = churn
        if len(places) > 8:
            places.popitem(last=False)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def differing(self, call: Call) -> tuple[bool, list[str]]:
        """Whether this very text was asked in another partition, and the fields in which that one
        differs; else those of the nearest partition, where this one is new; [] if none is known."""
        own = canonical.churn(self._secret, call.request.rest)

        def differing(tenant: str, theirs: Mapping[str, str]) -> list[str]:
            names = (
                name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name)
            )
            credential = ["credential"] if tenant != call.tenant else []
            # The same fields throughout: then it is the namespace, a header or the end user.
            return credential + sorted(names) or ["namespace, header or end user"]

        asked: Mapping[bytes, Mapping[str, str]] = self._seen.get(self._name(call), {})
        same = [differing(call.tenant, asked[at]) for at in asked if at != call.partition]
        if same or call.partition in self._places:
            return bool(same), min(same, key=len, default=[])
        return False, min(
            (differing(*known) for known in self._places.values()), key=len, default=[]
        )

    def _name(self, call: Call) -> bytes:
        text = (call.request.text or "").encode()
        return canonical.keyed(self._secret, b"asked", (call.tenant.encode(), text))


class Explainer:
    """Built once, of the parts that `Proxy` has."""

    def __init__(
        self,
        *,
        reader: Reader,
        memory: Memory,
        acceptance: Acceptance,
        policy: Callable[[str], Policy],
        rests_on: Callable[[str], str],
        partitions: Partitions,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._memory = memory
        self._acceptance = acceptance
        self._policy = policy  # in force for a model, as is what its threshold rests on
        self._rests_on = rests_on
        self._partitions = partitions
        self._clock = clock
        self._now = now

    async def explain(self, exchange: Exchange) -> dict[str, Any]:
        """The verdict on this request, the way to it, and what would change it."""
        try:
            call = self._reader.read(exchange)
        except BadRequest as exc:
            return {"verdict": "error", "reason": "bad_request", "change": str(exc)}
        if isinstance(call, Bypass):
            return _passed_by(call)
        policy = self._policy(call.request.model)
        said: dict[str, Any] = {
            "partition": call.partition.hex(),
            "parts": {"tenant": call.tenant[:12], "model": call.request.model}
            | canonical.churn(b"explain".ljust(16), call.request.rest),
            "threshold": max(policy.threshold, call.asked.threshold or 0.0),
            "threshold_rests_on": self._rests_on(call.request.model),
        }
        admitted = decisions.admit(call.request, call.asked, policy)
        if isinstance(admitted, Bypass):
            return said | _passed_by(admitted)
        try:
            look = await self._memory.look(call.digest, call.partition, call.token, self._now())
        except MemoryUnavailable as exc:
            return said | _passed_by(Bypass(exc.part))
        accepted = look.accepted is not None or not exchange.routed.provider.judges
        said["accepted"] = accepted
        said["exact"] = look.entry.digest.hex() if look.entry else None
        unread = "unaccepted" if not accepted else "no_cache" if call.asked.no_cache else ""
        if look.entry and not unread and decisions.fits(look.entry, call.asked, int(self._clock())):
            return said | _found(call, policy, "exact", look.entry.digest.hex())
        return said | await self._by_meaning(call, policy, unread)

    async def _by_meaning(self, call: Call, policy: Policy, unread: str) -> dict[str, Any]:
        asked_before, differs = self._partitions.differing(call)
        said: dict[str, Any] = {"asked_before": asked_before, "differs": differs}
        reason = unread or decisions.closed(call.request, call.asked, policy)
        if reason:
            return said | _missed(reason)
        text = call.request.text or ""
        found = await self._memory.recall(text, call.partition, policy.neighbours, self._now())
        said["neighbours"] = [
            self._neighbour(text, candidate, policy) for candidate in found.candidates
        ]
        if found.trouble:
            return said | _missed(found.trouble)
        now = int(self._clock())
        read = PROTOCOLS[call.request.operation].text_of
        verdict = decisions.choose(text, found.candidates, call.asked, policy, now, read)
        _compare_answers(said["neighbours"], [read(near.entry.body) for near in found.candidates])
        if isinstance(verdict, Hit):
            return said | _found(call, policy, "semantic", verdict.entry.digest.hex())
        return said | _missed(verdict.reason, said["neighbours"], verdict.vetoes)

    def _neighbour(self, text: str, candidate: Candidate, policy: Policy) -> dict[str, Any]:
        asked, stored = guards.facts(text), guards.facts(candidate.entry.text)
        return {
            "entry": candidate.entry.digest.hex(),
            "similarity": round(candidate.similarity, 4),
            "score": round(decisions.score(candidate, asked, stored), 4),
            "floor": candidate.floor,
            "age": int(self._clock()) - candidate.entry.created,
            "guards": {
                name: guard(asked, stored)
                for name, guard in guards.GUARDS.items()
                if name not in policy.guards_off
            },
        }


def _compare_answers(neighbours: list[dict[str, Any]], answers: list[str]) -> None:
    """Say of each whether it holds the answer of the best one that no guard objects to."""
    free = [at for at, near in enumerate(neighbours) if not any(near["guards"].values())]
    best = max(free, key=lambda at: neighbours[at]["score"], default=None)
    for near, answer in zip(neighbours, answers, strict=True):
        near["agrees"] = None if best is None else alike(answers[best], answer, loose=True)


def _found(call: Call, policy: Policy, tier: str, entry: str) -> dict[str, Any]:
    """A hit, or what would be one if it were not only looked up."""
    said = {"verdict": "hit", "tier": tier, "entry": entry, "reason": "", "change": ""}
    exact = tier == "exact"
    if not decisions.only_looked_up(call.request.model, call.asked, policy, exact=exact):
        return said
    change = "Take shadow mode off: shadow, shadow_models or X-Cache-Mode: shadow."
    if policy.semantic_shadow and not exact:
        change = "Set threshold to serve by meaning with this encoder."
    return said | {"verdict": "shadow", "reason": "shadow", "change": change}


def _passed_by(bypass: Bypass) -> dict[str, Any]:
    change = _CHANGES.get(bypass.reason, "")
    return {"verdict": "bypass", "reason": bypass.reason, "change": change}


def _missed(
    reason: str, neighbours: list[dict[str, Any]] | None = None, vetoes: tuple[str, ...] = ()
) -> dict[str, Any]:
    change = _CHANGES.get(reason, "")
    if reason == "guard":
        change = f"Switch off the guard {vetoes[0]!r} (guards_off), if it is wrong here."
    elif reason == "below_threshold" and neighbours:
        best = max(neighbour["score"] for neighbour in neighbours)
        change = f"Lower the threshold to {best:.3f}, if that neighbour's answer fits."
    elif reason == "disagreement":
        change = "Purge the neighbour whose answer is wrong: those near hold different ones."
    return {"verdict": "miss", "reason": reason, "change": change}


def explanation(said: Mapping[str, Any]) -> RenderableType:
    """What `explain` found, for a terminal."""
    word = {"hit": "green", "miss": "yellow"}.get(said["verdict"], "cyan")
    before = (
        "asked before, but there differed" if said.get("asked_before") else "nearest differs in"
    )
    lines: list[RenderableType] = [
        f"[{word}]{said['verdict'].upper()}[/] {said.get('tier', '')} {said['reason']}".rstrip()
    ]
    if said["change"]:
        lines.append(f"to change it: {said['change']}")
    if said.get("differs"):
        lines.append(f"{before}: {', '.join(said['differs'])}")
    if "threshold" in said:
        lines.append(f"threshold {said['threshold']:.3f}: {said['threshold_rests_on']}")
        lines.append(f"partition {said['partition'][:12]}: {', '.join(said['parts'])}")
    if said.get("neighbours"):
        table = Table("entry", "similarity", "score", "floor", "answer", "guards that object")
        for near in said["neighbours"]:
            objections = ", ".join(name for name, objects in near["guards"].items() if objects)
            table.add_row(
                near["entry"][:12],
                f"{near['similarity']:.3f}",
                f"{near['score']:.3f}",
                f"{near['floor']:.3f}" if near["floor"] > -1 else "",
                {True: "the best's", False: "another", None: ""}[near.get("agrees")],
                objections,
            )
        lines.append(table)
    return Group(*lines)
