"""Server-sent events, cut out of a byte stream and put back together without changing a byte.

Bytes in, bytes out. The splitter never decodes, reorders, repairs or invents anything: what it
hands out plus what it still holds is always exactly what it was fed.
"""

from __future__ import annotations

import re

__all__ = ["Splitter", "SseTooLarge", "data", "event_name"]

# Atomic groups: CRLF must never be taken for a CR and an LF, which would be a blank line.
_BLANK_LINE = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END = re.compile(rb"(?>\r\n|\n|\r)")
_BOM = b"\xef\xbb\xbf"
_LONGEST_TERMINATOR = 4


class SseTooLarge(Exception):
    """One event outgrew the cap. `Splitter.rest` still holds every byte not handed out."""


class Splitter:
    """Cuts a stream into raw events, each with the blank line that ends it."""

    def __init__(self, max_event_bytes: int = 4 * 1024 * 1024) -> None:
        self._held = bytearray()
        self._searched = 0  # no terminator ends before here, so long events are searched once
        self._max = max_event_bytes

    @property
    def rest(self) -> bytes:
        """What came after the last complete event."""
        return bytes(self._held)

    def feed(self, chunk: bytes) -> list[bytes]:
        """Take the next bytes; return the events they complete. Raises `SseTooLarge`."""
        self._held += chunk
        return self._cut(at_end=False)

    def close(self) -> list[bytes]:
        """The stream is over: an event that ended in CR need not wait for an LF any longer."""
        return self._cut(at_end=True)

    def _cut(self, at_end: bool) -> list[bytes]:
        held, events, start = self._held, [], 0
        while end := self._end(start, at_end):
            if end - start > self._max:
                break
            events.append(bytes(held[start:end]))
            start = end
            self._searched = end
        if not events and len(held) > self._max:
            raise SseTooLarge(f"an event exceeds {self._max} bytes")
        del held[:start]
        # A terminator may be half here: step back by all but one of its bytes.
        self._searched = max(0, len(held) - _LONGEST_TERMINATOR + 1)
        return events

    def _end(self, start: int, at_end: bool) -> int:
        """Where the event at `start` ends, 0 when that is not known yet."""
        found = _LINE_END.match(self._held, start) or _BLANK_LINE.search(
            self._held, max(start, self._searched)
        )
        if found is None:
            return 0
        end = found.end()
        if end == len(self._held) and self._held[-1:] == b"\r" and not at_end:
            return 0  # an LF may follow, and would belong to this line end
        return end


def data(event: bytes) -> bytes | None:
    """The event's data lines joined by LF, None when it has none (a comment, a ping)."""
    if event.startswith(b"data: ") and event.find(b"\n") == len(event) - 2 and b"\r" not in event:
        return event[6:-2]  # the one form that nearly every provider sends
    values = _values(event, b"data")
    return b"\n".join(values) if values else None


def event_name(event: bytes) -> bytes | None:
    """The event's name, None when it has none."""
    values = _values(event, b"event")
    return values[-1] if values else None


def _values(event: bytes, field: bytes) -> list[bytes]:
    values = []
    for line in event.removeprefix(_BOM).splitlines():
        name, _, value = line.partition(b":")
        if name == field:
            values.append(value.removeprefix(b" "))
    return values
