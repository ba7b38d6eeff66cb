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
    "unreadable": "A field has a type that cannot be compared; see the protocol's reference.",
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
    """Which partitions each text was asked in lately, so that a miss that should have hit can name
    the field that differs. In memory, by keyed digest, the latest few thousand."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._seen: OrderedDict[bytes, OrderedDict[bytes, Mapping[str, str]]] = OrderedDict()

    def note(self, call: Call, churn: Mapping[str, str]) -> None:
        """Remember that this text was asked in this partition."""
        name = self._name(call)
        places = self._seen.setdefault(name, OrderedDict())
        self._seen.move_to_end(name)
        places[call.partition] = churn
        if len(places) > 8:
            places.popitem(last=False)
        if len(self._seen) > _REMEMBERED:
            self._seen.popitem(last=False)

    def differing(self, call: Call) -> list[str]:
        """Fields in which the nearest other partition of this text differs; [] if none is known."""
        own = canonical.churn(self._secret, call.request.rest)
        others = [
            sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))
            for partition, theirs in self._seen.get(self._name(call), {}).items()
            if partition != call.partition
        ]
        # The same fields throughout: then it is the namespace, a header or the end user.
        return min(others, key=len) or ["namespace, header or end user"] if others else []

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
        policy: Callable[[], Policy],
        partitions: Partitions,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        self._reader = reader
        self._memory = memory
        self._acceptance = acceptance
        self._policy = policy
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
        policy = self._policy()
        said: dict[str, Any] = {
            "partition": call.partition.hex(),
            "parts": {"tenant": call.tenant[:12], "model": call.request.model}
            | canonical.churn(b"explain".ljust(16), call.request.rest),
            "threshold": max(policy.threshold, call.asked.threshold or 0.0),
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
        if look.entry and accepted:
            return said | {"verdict": "hit", "tier": "exact", "reason": "", "change": ""}
        return said | await self._by_meaning(call, policy, accepted=accepted)

    async def _by_meaning(self, call: Call, policy: Policy, *, accepted: bool) -> dict[str, Any]:
        said: dict[str, Any] = {"differs": self._partitions.differing(call)}
        reason = decisions.closed(call.request, call.asked, policy)
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
        if not accepted:
            return said | _missed("unaccepted")
        if isinstance(verdict, Hit):
            hit = {"tier": "semantic", "entry": verdict.entry.digest.hex()}
            return said | {"verdict": "hit", "reason": "", "change": "", **hit}
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
    lines: list[RenderableType] = [
        f"[{word}]{said['verdict'].upper()}[/] {said.get('tier', '')} {said['reason']}".rstrip()
    ]
    if said["change"]:
        lines.append(f"to change it: {said['change']}")
    if said.get("differs"):
        lines.append(f"asked before, but there differed: {', '.join(said['differs'])}")
    if "threshold" in said:
        lines.append(f"threshold {said['threshold']:.3f}, partition {said['partition'][:12]}")
    if said.get("neighbours"):
        table = Table("entry", "similarity", "score", "floor", "guards that object")
        for near in said["neighbours"]:
            objections = ", ".join(name for name, objects in near["guards"].items() if objects)
            table.add_row(
                near["entry"][:12],
                f"{near['similarity']:.3f}",
                f"{near['score']:.3f}",
                f"{near['floor']:.3f}" if near["floor"] > -1 else "",
                objections,
            )
        lines.append(table)
    return Group(*lines)
