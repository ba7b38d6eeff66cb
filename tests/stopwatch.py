"""Time as a test may judge it: what a machine stood still for is nobody's slowness.

Test machines are shared: a process may be stopped for a second in the middle of anything.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Awaitable, Callable
from typing import ParamSpec

import pytest

__all__ = ["awake", "of_three"]

P = ParamSpec("P")

_TICK = 0.01
_LATE = 0.03  # beyond this a tick is late because nothing of the process ran


class _Witness(threading.Thread):
    """Wakes a hundred times a second, and writes down when it could not."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.noted = (0.0, time.monotonic())  # seconds lost so far, and until when that is known

    def run(self) -> None:
        while True:
            time.sleep(_TICK)
            now = time.monotonic()
            self.noted = self.lost(now), now

    def lost(self, now: float) -> float:
        lost, seen = self.noted
        return lost + max(0.0, now - seen - _TICK - _LATE)


@functools.cache
def _witness() -> _Witness:
    witness = _Witness()
    witness.start()
    return witness


def awake() -> float:
    """A monotonic clock, in seconds, that stands still while the whole process does.

    For upper bounds. Work that holds up the event loop counts in full; CPU time is no part of it.
    """
    witness, now = _witness(), time.monotonic()
    return now - witness.lost(now)


def of_three(test: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """The best of three tries, for tests whose subject has a deadline of parts of a second.

    A pause of the machine spoils one try; what is broken spoils all of them.
    """

    @functools.wraps(test)
    async def tried(*args: P.args, **kwargs: P.kwargs) -> None:
        for last in (False, False, True):
            try:
                await test(*args, **kwargs)
            except (Exception, pytest.fail.Exception):
                if last:
                    raise
            else:
                return

    return tried
