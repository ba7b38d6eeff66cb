"""What purges leave behind: rules that say which entries no longer count.

A purge deletes nothing at once. It leaves a rule under a new epoch, and whatever entry began before
that epoch and matches is dead wherever it is met. Plain functions of their arguments.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from cache_proxy.model import Entry, Selector

__all__ = ["Purges", "Rule", "pack_rule", "thin", "unpack_rule"]


@dataclass(frozen=True, slots=True)
class Rule:
    """One purge: entries of an earlier epoch than `epoch` that match are gone."""

    epoch: int
    at: int  # Unix seconds of the purge
    selector: Selector


def pack_rule(rule: Rule) -> bytes:
    """A rule as JSON, without its epoch, which names the place where it is kept."""
    selector = rule.selector
    return orjson.dumps(
        {
            "at": rule.at,
            "digest": None if selector.digest is None else selector.digest.hex(),
            "tag": selector.tag,
            "namespace": selector.namespace,
            "model": selector.model,
            "created_before": selector.created_before,
        }
    )


def unpack_rule(epoch: int, data: bytes) -> Rule:
    """The rule of `epoch`. One that cannot be read purges everything: too much, never too little.

    It counts as made at the epoch's own time, for epochs are milliseconds.
    """
    try:
        fields = orjson.loads(data)
        at = int(fields.pop("at"))
        digest = fields.pop("digest")
        return Rule(
            epoch, at, Selector(None if digest is None else bytes.fromhex(digest), **fields)
        )
    except (ValueError, TypeError, KeyError, AttributeError):
        return Rule(epoch, epoch // 1000, Selector())


class Purges:
    """The rules in force, newest first, and whom they mean.

    Purges by tag are the ones that come by the hundred (a document changed), so they are looked
    up and not walked through.
    """

    def __init__(self, rules: Sequence[Rule] = ()) -> None:
        self.rules = tuple(rules)
        self._tags: dict[str, int] = {}
        self._others: list[Rule] = []
        for rule in self.rules:
            tag = rule.selector.tag
            if tag is not None and rule.selector == Selector(tag=tag):
                self._tags.setdefault(tag, rule.epoch)
            else:
                self._others.append(rule)

    def mean(self, entry: Entry) -> bool:
        """Whether a purge since the entry's request began takes it away."""
        for tag in entry.tags:
            if self._tags.get(tag, -1) > entry.epoch:
                return True
        for rule in self._others:
            if rule.epoch <= entry.epoch:
                return False
            if rule.selector.matches(entry):
                return True
        return False


def thin(rules: Iterable[Rule], oldest: int, most: int) -> list[Rule]:
    """The rules that still matter, newest first.

    Dropped are those made before `oldest` (Unix seconds), since no entry lives that long, those
    that were made again later, and those below a purge of everything. Of more than `most` the
    older half becomes one purge of everything up to there: purging too much only costs misses.
    """
    newest_by_selector: dict[Selector, Rule] = {}
    for rule in sorted(rules, key=_epoch):
        if rule.at >= oldest:
            newest_by_selector[rule.selector] = rule
    kept = sorted(newest_by_selector.values(), key=_epoch, reverse=True)
    for place, rule in enumerate(kept):
        if rule.selector == Selector():
            kept = kept[: place + 1]
            break
    if len(kept) > most:
        newest = kept[most // 2]
        kept[most // 2 :] = [Rule(newest.epoch, newest.at, Selector())]
    return kept


def _epoch(rule: Rule) -> int:
    return rule.epoch
