"""One server's part of the shared weights: it takes pushes in the order they come, and answers when it is time.

It is driven by messages and by nothing else, so that tests can try every order. The rule is the stale synchronous
parallel one: Ho et al., "More effective distributed ML via a stale synchronous parallel parameter server", NIPS 2013.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from hvdscale.sync.requests import Answer, Ask, Float64s, Message
from hvdscale.update import DelayedNesterov
from hvdscale.update.outer import Float32s

__all__ = ["Shard", "Stage"]

Answers = list[tuple[int, Message]]  # (position of the worker, what it is told)


class Stage(IntEnum):
    """Where a rank is, as a server sees it."""

    TRAINING = 0
    FLUSHING = 1
    SAVING = 2
    LOADING = 3
    ASIDE = 4  # it does not train
    GONE = 5


_STAGES = {Ask.FLUSH: Stage.FLUSHING, Ask.SAVE: Stage.SAVING, Ask.LOAD: Stage.LOADING}


@dataclass
class _Member:
    """What a server knows of one rank. ``clock``: pushes it made, as it counts; ``pushes``: those that came here."""

    trains: bool
    stage: Stage
    clock: int = 0
    pushes: int = 0
    weight: float = 0.0  # of its last push; 0: unknown
    seen: int = 0  # pushes in the weights it last pulled
    stale: int = 0  # of its last push
    asks: Message | None = None  # not answered yet


class Shard:
    """``values``, float32[n], and the ranks that push to it.

    Args:
        values: the weights at first; moved in place.
        ranks: how many ranks there are; ``workers`` are the positions of those that train.
        staleness: how many pushes a worker may be ahead of the slowest; ``None``: any number.
        outer: how a push moves the weights.
    """

    def __init__(
        self, values: Float32s, ranks: int, workers: Sequence[int], staleness: int | None, outer: DelayedNesterov
    ) -> None:
        self.values = values
        self.slots = {name: np.zeros_like(values) for name in outer.slots}
        self._staleness = staleness
        self._outer = outer
        self._members = [
            _Member(rank in workers, Stage.TRAINING if rank in workers else Stage.ASIDE) for rank in range(ranks)
        ]
        self._batch: dict[int, tuple[float, Float32s]] = {}  # staleness 0: the pushes of this clock
        self._moves = 0  # pushes that have moved the weights
        self._unsettled = 0  # of them, since momentum last acted

    def handle(self, rank: int, message: Message) -> Answers:
        """Take a message of ``rank``; who is to be told what. Answers show the weights until the next message.

        A push is overwritten: with staleness 0 later, when all of its clock are there.
        """
        member = self._members[rank]
        if member.stage is Stage.GONE:
            return [(rank, Message(Answer.COUNTED_OUT))]
        if message.kind == Ask.READ:
            return [(rank, self._weights(member))]
        pushes = message.kind == Ask.PUSH or message.weight > 0
        if (pushes or message.kind == Ask.FLUSH) and message.clock != member.clock + pushes:
            counts = np.array([message.clock, member.clock + pushes], float)
            return [(rank, Message(Answer.MISCOUNT, ledger=counts))]
        member.asks = message
        member.stage = _STAGES.get(Ask(message.kind), Stage.TRAINING)
        if pushes:
            member.clock += 1
            member.pushes += 1
            self._take(rank, message)
        return self._due()

    def lose(self, rank: int) -> Answers:
        """Go on without ``rank``. What it pushed stays."""
        self._members[rank].stage, self._members[rank].asks = Stage.GONE, None
        return self._due()

    @property
    def lead(self) -> int:
        """How many pushes the fastest worker that trains is ahead of the slowest."""
        clocks = [member.clock for member in self._members if self._holds_back(member)]
        return max(clocks) - min(clocks) if clocks else 0

    # Pushes ---------------------------------------------------------------------------------------------------

    def _take(self, rank: int, message: Message) -> None:
        member = self._members[rank]
        member.stale = self._moves - member.seen
        if message.values.size != self.values.size or not message.weight > 0:
            return  # nothing but a tick: what it changed was not finite
        member.weight = message.weight
        if self._staleness == 0:
            self._batch[rank] = (message.weight, message.values)
            return
        # Its part of the mean, were all that train to push now what they pushed last.
        others = [m.weight or message.weight for m in self._members if m is not member and self._has_a_say(m)]
        self._move(message.values, message.weight / (message.weight + sum(others)))
        if self._unsettled > len(others):
            self._settle()

    def _move(self, change: Float32s, share: float) -> None:
        change *= np.float32(share)
        self._outer.step(self.values, change, self.slots)
        self._moves += 1
        self._unsettled += 1

    def _settle(self) -> None:
        if self._unsettled:
            self._outer.settle(self.values, self.slots)
        self._unsettled = 0

    def _close_batch(self) -> None:
        """All pushes of a clock are there: one step on their mean, in one order."""
        total = sum(weight for weight, _ in self._batch.values())
        for _, (weight, change) in sorted(self._batch.items(), key=lambda item: item[0]):
            self._move(change, weight / total)
        self._batch.clear()
        self._settle()

    # Answers --------------------------------------------------------------------------------------------------

    @staticmethod
    def _holds_back(member: _Member) -> bool:
        """Whether the others must not get too far ahead of it."""
        return member.trains and member.stage not in (Stage.FLUSHING, Stage.GONE)

    def _has_a_say(self, member: _Member) -> bool:
        """Whether it trains, or ended with a push."""
        last = member.asks is not None and member.asks.kind == Ask.FLUSH and member.asks.weight > 0
        return self._holds_back(member) or (member.trains and last)

    def _slowest(self) -> float:
        return min((m.clock for m in self._members if self._holds_back(m)), default=np.inf)

    def _due(self) -> Answers:
        slowest = self._slowest()
        if self._batch and slowest >= max(self._members[rank].clock for rank in self._batch):
            self._close_batch()
        bound = np.inf if self._staleness is None else self._staleness
        told: Answers = []
        for rank, member in enumerate(self._members):
            if member.stage is Stage.TRAINING and member.asks is not None and member.clock - slowest <= bound:
                told.append((rank, self._answer(member, self._pulled(member))))
        present = [m for m in self._members if m.stage is not Stage.GONE]
        if not told and present and all(m.asks is not None for m in present if m.trains):
            return self._meeting(present)
        return told

    def _meeting(self, present: list[_Member]) -> Answers:
        """All that train wait for something, and no push is due."""
        stages = {member.stage for member in present if member.trains}
        if stages <= {Stage.FLUSHING}:
            return self._finish() if all(member.asks is not None for member in present) else []
        if stages == {Stage.SAVING}:
            return self._tell_all(present, self._state())
        if stages == {Stage.LOADING}:
            return self._load(present)
        ledger = np.array([[member.stage, member.clock] for member in self._members], float).ravel()
        return [(r, self._answer(m, Message(Answer.APART, ledger=ledger))) for r, m in self._asking()]

    def _finish(self) -> Answers:
        """Everyone flushes: all get the same weights, and may train on from equal clocks."""
        self._settle()
        pushes = [-1.0 if m.stage is Stage.GONE else float(m.pushes) for m in self._members]
        asking = self._asking()
        beside = _mean([m.asks.ledger for _, m in asking if m.asks is not None])
        clock = max(member.clock for member in self._members)
        told = []
        for rank, member in asking:
            answer = self._pulled(member)
            answer.clock, answer.ledger = clock, np.concatenate([pushes, beside])
            told.append((rank, self._answer(member, answer)))
            member.clock, member.stage = clock, Stage.TRAINING if member.trains else Stage.ASIDE
        return told

    def _asking(self) -> list[tuple[int, _Member]]:
        return [(rank, member) for rank, member in enumerate(self._members) if member.asks is not None]

    def _answer(self, member: _Member, message: Message) -> Message:
        member.asks = None
        return message

    def _pulled(self, member: _Member) -> Message:
        """The weights, from which its next change will be."""
        member.seen = self._moves
        return self._weights(member)

    def _weights(self, member: _Member) -> Message:
        slowest = self._slowest()
        clock = member.clock if slowest == np.inf else int(slowest)
        return Message(Answer.WEIGHTS, clock, 0.0, member.stale, values=self.values)

    # Checkpoints ----------------------------------------------------------------------------------------------

    def _state(self) -> Message:
        rows = [[m.clock, m.pushes, m.weight, m.seen] for m in self._members]
        ledger = np.array([self._moves, self._unsettled, *np.ravel(rows)], float)
        return Message(Answer.STATE, ledger=ledger, values=np.concatenate([self.values, *self.slots.values()]))

    def _load(self, present: list[_Member]) -> Answers:
        for member in present:
            if member.asks is not None and member.asks.values.size:
                self._restore(member.asks.ledger, member.asks.values)
        return self._tell_all(present, Message(Answer.STATE))

    def _restore(self, ledger: Float64s, values: Float32s) -> None:
        parts = np.split(values, 1 + len(self.slots))
        for array, part in zip((self.values, *self.slots.values()), parts, strict=True):
            array[:] = part
        self._moves, self._unsettled = int(ledger[0]), int(ledger[1])
        for member, row in zip(self._members, ledger[2:].reshape(len(self._members), 4), strict=True):
            member.clock, member.pushes, member.seen = int(row[0]), int(row[1]), int(row[3])
            member.weight = float(row[2])

    def _tell_all(self, present: list[_Member], state: Message) -> Answers:
        """The first gets the state, the others that it was made."""
        told: Answers = []
        for rank, member in self._asking():
            if member.trains:
                answer = state if not told else Message(state.kind)
                told.append((rank, self._answer(member, answer)))
                member.stage = Stage.TRAINING
        return told


def _mean(rows: list[Float64s]) -> Float64s:
    """The mean of vectors of equal length; without the empty ones of ranks set aside, and those that are not finite."""
    given = [row for row in rows if row.size and np.isfinite(row).all()]
    mean: Float64s = np.mean(given, axis=0) if given else np.zeros(0)
    return mean
