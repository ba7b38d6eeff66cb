"""The nouns. Frozen values that every layer may pass on; no behaviour beyond small arithmetic.

Plain data: no I/O, no clock, no randomness, no logging, and no vectors (those live in memory).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

__all__ = [
    "Answer",
    "Attempt",
    "Bypass",
    "Call",
    "Candidate",
    "Directives",
    "Discard",
    "Entry",
    "Hit",
    "Miss",
    "Outcome",
    "Policy",
    "Prompt",
    "Request",
    "Selector",
    "Usage",
    "Veto",
]

Mode = Literal["off", "exact", "semantic", "shadow"]
Tier = Literal["exact", "semantic"]
Kind = Literal["hit", "miss", "bypass", "error"]
Attempt = Literal["first", "retry", "fallback"]  # why upstream was called


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens as upstream billed them. `cached` and `reasoning` are parts of the two totals."""

    input: int = 0
    output: int = 0
    cached: int = 0  # input tokens billed at the provider's prompt-cache price
    reasoning: int = 0


@dataclass(frozen=True, slots=True)
class Request:
    """What a protocol's `parse` saw in one body. Text is in NFC with outer white space trimmed."""

    operation: str  # "chat", "completions"
    model: str
    stream: bool
    include_usage: bool  # the client asked for the usage chunk itself
    text: str | None  # the last user text; None when there is none to match on
    rest: bytes  # canonical JSON of all that must be equal, `text` and `stream` taken out
    turns: int  # user texts in all; 1 means no history
    declares_tools: bool
    tool_turns: bool  # a tool call or result anywhere in the conversation
    other_parts: bool  # images, audio, files: anything that is not text in the last user turn
    web_search: bool
    choices: int
    temperature: float | None
    end_user: str | None  # `user`, `safety_identifier`, `metadata.user_id`: identity, not wording


@dataclass(frozen=True, slots=True)
class Directives:
    """What the caller asked of the cache by header; callers may only tighten."""

    mode: Mode = "semantic"
    no_cache: bool = False  # do not read, do store
    no_store: bool = False  # neither
    max_age: int | None = None
    only_if_cached: bool = False
    threshold: float | None = None
    ttl: int | None = None
    namespace: str = ""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Call:
    """One request on its way through `proxy.handle`: the parsed body and what surrounds it."""

    request: Request
    asked: Directives
    partition: bytes  # keyed MAC of everything that must be equal
    digest: bytes  # keyed MAC of partition and text; the entry's own name
    tenant: str  # keyed MAC, hex; fit for counters
    token: bytes  # keyed MAC of the exact credential


@dataclass(frozen=True, slots=True)
class Policy:
    """What the decisions may know of the settings."""

    threshold: float = 0.92
    ttl_seconds: int = 7 * 86_400
    max_temperature: float = 1.0
    neighbours: int = 8
    guards_off: frozenset[str] = frozenset()
    agreement: bool = True  # close neighbours with other answers stand in the way of a hit
    bypass_time_bound: bool = True
    semantic_with_tools: bool = False
    store_tool_calls: bool = False
    max_answer_bytes: int = 2 * 1024 * 1024
    languages: frozenset[str] | None = None  # what the encoder serves; None is any
    shadow: bool = False
    shadow_models: tuple[str, ...] = ()  # with wildcards
    semantic_shadow: bool = False  # the encoder has no calibrated threshold: it only reports


@dataclass(frozen=True, slots=True)
class Prompt:
    """Fit for the cache; whether by meaning as well is `decisions.closed`'s question."""

    request: Request


@dataclass(frozen=True, slots=True)
class Bypass:
    """Not for the cache; forwarded untouched."""

    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer as its protocol's `reassemble` put it together, from JSON or a stream."""

    body: bytes  # the protocol's non-streamed form, upstream's id and date included
    usage: Usage | None  # None when upstream named none
    finished: tuple[str, ...]  # each choice's finish word, "" when it had none
    terminal: bool  # the stream's closing event was seen; True for whole JSON
    empty: bool  # some choice says nothing at all
    refused: bool  # a refusal or filter spoke in some choice
    tool_calls: bool
    error: bool  # an error object, whatever the status


@dataclass(frozen=True, slots=True)
class Entry:
    """A stored answer, as the store keeps it and checks it."""

    digest: bytes
    partition: bytes
    fingerprint: bytes  # of the encoder; 8 bytes
    epoch: int  # the purge epoch in force when its request began
    created: int  # Unix seconds
    expires: int
    text: str  # the user text it answers, for the guards
    model: str
    provider: str
    tenant: str
    namespace: str
    tags: tuple[str, ...]
    usage: Usage | None
    cost: int | None  # nano-dollars that this answer cost upstream; None when the price is unknown
    body: bytes
    gist: str = ""  # what the text says, read once; "" when it is to be read anew


@dataclass(frozen=True, slots=True)
class Discard:
    """Not to be stored, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Veto:
    """A guard's "no": these two texts must not share an answer."""

    guard: str


@dataclass(frozen=True, slots=True)
class Candidate:
    """A neighbour the index proposed and the store confirmed."""

    entry: Entry
    similarity: float  # cosine, -1 to 1
    floor: float = -2.0  # up to here its answer was shown to be wrong; below any cosine, if never
    learned: float | None = None  # the cosine as the encoder's lens sees it; None without one


@dataclass(frozen=True, slots=True)
class Hit:
    entry: Entry
    tier: Tier
    similarity: float
    vetoes: tuple[str, ...] = ()  # of nearer neighbours that were passed over


@dataclass(frozen=True, slots=True)
class Miss:
    reason: str
    similarity: float | None = None  # of the nearest, None when there was none
    vetoes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Selector:
    """Which entries a purge means; the fields that are set must all match, none set is all."""

    digest: bytes | None = None
    tag: str | None = None
    namespace: str | None = None
    model: str | None = None
    created_before: int | None = None

    def matches(self, entry: Entry) -> bool:
        return (
            (self.digest is None or entry.digest == self.digest)
            and (self.tag is None or self.tag in entry.tags)
            and (self.namespace is None or entry.namespace == self.namespace)
            and (self.model is None or entry.model == self.model)
            and (self.created_before is None or entry.created < self.created_before)
        )


@dataclass(slots=True)
class Outcome:
    """The one record of one request; headers, logs, metrics and `cache-stats` read only this.

    Filled in as the request goes, recorded once at its end. Milliseconds are wall clock.
    """

    kind: Kind
    model: str = ""
    tenant: str = ""
    tier: Tier | None = None
    reason: str = ""  # closed set: why it missed, was passed by or failed
    status: int = 0
    entry: str = ""  # public id of the entry served or stored
    similarity: float | None = None
    threshold: float | None = None
    vetoes: tuple[str, ...] = ()
    collapsed: bool = False  # a miss that shared somebody else's upstream call
    shadow: bool = False
    refresh: bool = False
    stored: bool = False
    discard: str = ""  # why a good-looking answer was not stored
    age: int | None = None
    ttl: int | None = None
    saved: Usage | None = None
    saved_cost: int | None = None  # nano-dollars; None when the price is unknown
    spent: Usage | None = None
    spent_cost: int | None = None
    provider: str = ""  # the named provider it was routed to, or that answered in its stead
    attempts: int = 0  # calls made to upstream for it; 0 when none was, as on a hit
    priority: str = ""  # its class in the queue; "" where there is no queue
    answered_by: str = ""  # the fallback's model that spoke; "" when the one asked for did
    trimmed: tuple[int, int] = (0, 0)  # messages and tokens left out of what was sent
    churn: Mapping[str, str] = field(default_factory=dict)  # request field -> digest of its value
    ms: float = 0.0
    upstream_ms: float | None = None
    first_token_ms: float | None = None
    encode_ms: float | None = None
