"""A plan whose global batches are shared out by cost, for samples of unequal length."""

from __future__ import annotations

import bisect
import heapq
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.data.balanced_past import FORMAT, own_states
from hvdscale.data.balancing import LONGEST, balance
from hvdscale.data.batch import Batch
from hvdscale.data.certificate import add_sums, sum_of
from hvdscale.data.checks import instance, integer
from hvdscale.data.delivery import Delivery
from hvdscale.data.lengths import check_lengths
from hvdscale.data.plan import ShardPlan
from hvdscale.data.reader import Reader
from hvdscale.data.types import Int64s, Keys
from hvdscale.errors import PlanError, StateError

__all__ = ["BalancedPlan", "BalancedReader"]


@dataclass(frozen=True)
class BalancedPlan:
    """``plan`` with the batches of each step exchanged between shards, so that ranks finish the step together.

    A step's global batch is what all shards of ``plan`` read in it. Each rank knows all of it, and ``balance``
    gives it its part; nothing is sent. So every epoch is as exact as the plan's, and steps hold the same samples.
    A shard gets other samples than its own: with policy ``"hash"`` equal keys then meet on no certain rank.

    Ranks get different numbers of samples (``batch.count``); average by samples or tokens. Where the last global
    batches have fewer samples than there are ranks, the last ranks get empty batches, and their loaders fewer: one
    fewer at most, unless shards of policy ``"hash"`` differ by more than a batch. With tail ``"pad"`` these get one
    sample that is not valid, and all ranks as many batches.

    Args:
        plan: the plan, with one shard per rank.
        lengths: int[plan.n], tokens of each sample, identical on all ranks.
        linear, quadratic, equal_counts: as in ``balance``.

    Raises:
        PlanError: an argument out of its range, or lengths that do not fit the plan.
    """

    plan: ShardPlan
    lengths: npt.ArrayLike = field(repr=False, compare=False)
    linear: float = field(default=1.0, kw_only=True)
    quadratic: float = field(default=0.0, kw_only=True)
    equal_counts: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        instance("plan", self.plan, ShardPlan)
        if self.plan.weights is not None:
            raise PlanError(
                f"BalancedPlan gives every rank equal work; the weights {self.plan.weights!s:.80} of its plan ask for "
                "unequal work. Leave weights out."
            )
        lengths = check_lengths(self.lengths, LONGEST)
        if len(lengths) != self.plan.n:
            raise PlanError(f"Each sample has one length; there are {self.plan.n} samples and {len(lengths)} lengths.")
        object.__setattr__(self, "lengths", lengths)
        self.owners(lengths[:1])  # checks the factors now rather than in the first step

    @property
    def n(self) -> int:
        return self.plan.n

    @property
    def shards(self) -> int:
        return self.plan.shards

    @property
    def first_epoch(self) -> int:
        return self.plan.first_epoch

    def certificate(self) -> int:
        """What the sums of all readers for one epoch must add up to, modulo 2**64, as ``ShardPlan.certificate``."""
        return self.plan.certificate()

    def owners(self, lengths: npt.ArrayLike) -> npt.NDArray[np.int32]:
        """The rank of each sample of a global batch with these lengths: int32[batch]."""
        return balance(lengths, self.shards, self.linear, self.quadratic, self.equal_counts)

    def reader(self, shard: int, batch_size: int, epoch: int | None = None) -> BalancedReader:
        """Batches for the rank ``shard``; a step's global batch has ``shards * batch_size`` samples.

        Raises:
            PlanError: an argument out of its range.
        """
        return BalancedReader(self, integer("shard", shard, 0, self.shards - 1), batch_size, epoch)

    def resume(
        self,
        states: Sequence[Mapping[str, Any]],
        shards: int | None = None,
        *,
        keys: Keys | None = None,
        weights: Sequence[float] | None = None,
    ) -> BalancedPlan:
        """This plan for what is left, from the ``state_dict`` of every reader of the interrupted run.

        A step's samples lie across all ranks, so a step is delivered by all of them or by none: save states at the
        same step everywhere. ``shards`` and ``keys`` are as in ``ShardPlan.resume``; weights are refused.

        Raises:
            StateError: as ``ShardPlan.resume``; states of different steps, or not of a balanced reader.
            PlanError: shards, keys or weights that cannot be.
        """
        own = own_states(self, states)
        plan = ShardPlan.resume(own, shards, keys=keys, weights=weights)
        within = {(state["epoch"], state["step"]) for state in own if state["step"]}
        if len(within) > 1:
            raise StateError(
                f"Ranks of a balanced plan are within one step of one epoch; these states are at the (epoch, step) "
                f"{sorted(within)!s:.200}. Resume from states saved at the same step."
            )
        return BalancedPlan(
            plan,
            self.lengths,
            linear=self.linear,
            quadratic=self.quadratic,
            equal_counts=self.equal_counts,
        )


class BalancedReader(Delivery):
    """One rank's parts of the global batches, without end. Made by ``BalancedPlan.reader``."""

    def __init__(self, plan: BalancedPlan, shard: int, batch_size: int, epoch: int | None) -> None:
        self.plan, self.shard = plan, shard
        self._readers = [plan.plan.reader(each, batch_size, epoch) for each in range(plan.shards)]
        super().__init__(min(reader.epoch for reader in self._readers))
        self._drawn: deque[tuple[Batch, _Step]] = deque()

    def ahead(self, epochs: int | None = None) -> Iterator[Batch]:
        """Batches from the next one to deliver on, not counted as delivered; ``epochs=1``: of this epoch only."""
        self._drawn.clear()
        stop = None if epochs is None else self._epoch + integer("epochs", epochs, 0)
        for step in _steps(self._readers, self._epoch, stop):
            samples = np.concatenate([part.indices[: part.count] for part in step.parts.values()])
            lengths: Int64s = np.asarray(self.plan.lengths)[samples]
            mine = samples[self.plan.owners(lengths) == self.shard]
            count = len(mine)
            if not count and self.plan.plan.tail == "pad":
                mine = samples[:1]  # something to compute with, so that ranks keep in step
            batch = Batch(mine, count, step.epoch, step.number, step.last)
            self._drawn.append((batch, step))
            yield batch

    def deliver(self, batch: Batch) -> None:
        """Count a batch of ``ahead()`` as read. Batches are delivered in order.

        Raises:
            PlanError: this is not the next batch.
        """
        instance("batch", batch, Batch)
        self._stream = None
        self._count(batch)

    def steps(self, epoch: int | None = None) -> int:
        """Global batches of one epoch (default: the current one), delivered or not."""
        at = self._epoch if epoch is None else epoch
        return max(reader.steps(at) for reader in self._readers)

    def filled_steps(self, epoch: int | None = None) -> int:
        """How many of them bring this rank a batch with something in it: the first ones."""
        at = self._epoch if epoch is None else epoch
        if self.plan.plan.tail == "pad":
            return self.steps(at)
        size, sizes = self._readers[0].batch_size, self.plan.plan.reading(at).sizes

        def nothing(step: int) -> bool:
            """``balance`` gives each of the first ranks one sample before it gives any rank two."""
            return int(np.clip(sizes - step * size, 0, size).sum()) <= self.shard

        return bisect.bisect_left(range(self.steps(at)), True, key=nothing)

    def certificate(self, epoch: int | None = None) -> int:
        """The sum, modulo 2**64, for the samples of an epoch that this rank was given; see ``Reader.certificate``.

        Raises:
            StateError: an epoch that is too long ago, or whose earlier part is not known.
        """
        epoch = self._summed(epoch)
        own = self._readers[self.shard]
        dropped = sum_of(own.dropped(epoch)) if epoch < self._epoch else 0
        return add_sums([self._sums.get(epoch, 0), dropped, own.read_before(epoch)])

    def state_dict(self) -> dict[str, Any]:
        """How far all ranks have delivered, as JSON. ``BalancedPlan.resume`` takes those of all ranks."""
        own = self._readers[self.shard].state_dict()
        return {"format": FORMAT, "epoch": self._epoch, "step": self._step, "own": own}

    def _count(self, batch: Batch) -> None:
        if not self._drawn or self._drawn[0][0] is not batch:
            expected = (
                f"step {self._drawn[0][0].step} of epoch {self._drawn[0][0].epoch}" if self._drawn else "not drawn"
            )
            raise PlanError(
                f"Batches are delivered in order: the next is {expected}; "
                f"this is step {batch.step} of epoch {batch.epoch}."
            )
        _, step = self._drawn.popleft()
        for shard, part in step.parts.items():
            self._readers[shard].deliver(part)
        self._sums[batch.epoch] = add_sums([self._sums.get(batch.epoch, 0), sum_of(batch.indices[: batch.count])])
        self._epoch, self._step = (batch.epoch + 1, 0) if batch.last else (batch.epoch, batch.step + 1)
        self._forget()


@dataclass(frozen=True)
class _Step:
    """The batches, by shard, that make one global batch."""

    epoch: int
    number: int
    parts: dict[int, Batch]
    last: bool


def _steps(readers: Sequence[Reader], epoch: int, stop: int | None) -> Iterator[_Step]:
    """The global batches from the readers' next ones on. Where a shard's epoch ends early, the others go on."""
    streams = [reader.ahead(None if stop is None else max(0, stop - reader.epoch)) for reader in readers]
    heads: list[tuple[int, int, int, Batch]] = []  # (epoch, step, shard, its next batch), a heap

    def advance(shard: int) -> None:
        batch = next(streams[shard], None)
        if batch is not None:
            heapq.heappush(heads, (batch.epoch, batch.step, shard, batch))

    for shard in range(len(readers)):
        advance(shard)
    while heads:
        at = heads[0][:2]
        parts: dict[int, Batch] = {}
        while heads and heads[0][:2] == at:
            *_, shard, batch = heapq.heappop(heads)
            parts[shard] = batch
        for shard in parts:
            advance(shard)
        yield _Step(*at, parts, last=not heads or heads[0][0] != at[0])
