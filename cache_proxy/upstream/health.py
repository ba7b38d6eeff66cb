"""Which models of which providers are worth asking: a breaker for each pair.

A model that only fails is not asked for a while, and then by one request alone; when that one fails
too the pause doubles. Refusals that prove life (4xx, 429 among them) count as answers.

Plain arithmetic: the time is handed in, and the sending and judging is done elsewhere.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

__all__ = ["Health", "Pass", "Refused"]


@dataclass(frozen=True, slots=True)
class Pass:
    """Leave to call; what came of it is told with it, once."""

    key: Hashable
    spell: int  # a verdict on a call from before the breaker last opened tells nothing new


@dataclass(frozen=True, slots=True)
class Refused:
    """Not now; worth asking again after this many seconds."""

    seconds: float


@dataclass(slots=True)
class _Circuit:
    """Kept from a first failure on."""

    since: float  # when the counting of `good` and `bad` began
    streak: int = 0  # failures in a row
    failing_since: float = 0.0  # the first of them
    good: int = 0
    bad: int = 0
    spell: int = 0  # how often it has opened
    pause: float = 0.0
    shut_until: float = 0.0
    probe_until: float = 0.0  # one request is finding out, and may take until then


@dataclass(slots=True)
class Health:
    """Opens after `failures` in a row, or where `share` of at least `calls` within `window_seconds`
    failed, and either for `seconds`: one moment's failures, however many, are for retries to mend.
    Times are monotonic seconds."""

    seconds: float = 1.0
    failures: int = 5
    share: float = 0.5
    calls: int = 20
    window_seconds: float = 30.0
    pause_seconds: float = 1.0
    longest_seconds: float = 30.0
    most: int = 1_024  # circuits kept: models are named by clients
    _circuits: dict[Hashable, _Circuit] = field(default_factory=dict)

    def enter(self, key: Hashable, now: float) -> Pass | Refused:
        """Whether a call may be made; on a breaker that is half open, who gets a Pass is the one
        probe, and must tell what came of it or `leave`."""
        if wait := self.wait(key, now):
            return Refused(wait)
        circuit = self._circuits.get(key)
        if circuit is None or not circuit.spell:
            return Pass(key, 0)
        circuit.probe_until = now + self.longest_seconds
        return Pass(key, circuit.spell)

    def wait(self, key: Hashable, now: float) -> float:
        """For how many seconds `enter` would refuse; 0 when it would not."""
        circuit = self._circuits.get(key)
        if circuit is None or not circuit.spell:
            return 0.0
        left = max(circuit.shut_until, circuit.probe_until) - now
        # How long the probe takes nobody knows; the next pause is a fair guess.
        return min(max(0.0, left), circuit.pause)

    def succeeded(self, leave: Pass, now: float) -> None:
        """The call was answered, be it with a refusal."""
        circuit = self._circuits.get(leave.key)
        if circuit is None or circuit.spell != leave.spell:
            return
        if circuit.spell or now - circuit.since > self.window_seconds:
            del self._circuits[leave.key]
            return
        circuit.streak = 0
        circuit.good += 1

    def failed(self, leave: Pass, now: float) -> None:
        """The call could not connect, broke off, took too long, or was answered with a 5xx."""
        circuit = self._circuits.get(leave.key)
        if circuit is None:
            circuit = self._begin(leave.key, now)
        if circuit.spell != leave.spell:
            return
        if now - circuit.since > self.window_seconds:
            circuit.since, circuit.good, circuit.bad = now, 0, 0
        if circuit.streak == 0:
            circuit.failing_since = now
        circuit.streak += 1
        circuit.bad += 1
        if circuit.spell or self._hopeless(circuit, now):
            circuit.spell += 1
            circuit.pause = min(circuit.pause * 2 or self.pause_seconds, self.longest_seconds)
            circuit.shut_until = now + circuit.pause
            circuit.probe_until = 0.0

    def leave(self, leave: Pass) -> None:
        """The call ended without a verdict, its caller gone: another may probe."""
        circuit = self._circuits.get(leave.key)
        if circuit is not None and circuit.spell == leave.spell:
            circuit.probe_until = 0.0

    def _hopeless(self, circuit: _Circuit, now: float) -> bool:
        counted = circuit.good + circuit.bad
        mostly = counted >= self.calls and circuit.bad >= self.share * counted
        return (mostly and now - circuit.since >= self.seconds) or (
            circuit.streak >= self.failures and now - circuit.failing_since >= self.seconds
        )

    def _begin(self, key: Hashable, now: float) -> _Circuit:
        if len(self._circuits) >= self.most:
            del self._circuits[next(iter(self._circuits))]
        return self._circuits.setdefault(key, _Circuit(since=now))
