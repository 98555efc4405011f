"""A rank's batches, epoch after epoch, and how far they were delivered."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdscale.data.batch import Batch, rebatch, steps_of
from hvdscale.data.certificate import add_sums, sum_of
from hvdscale.data.checks import instance, integer
from hvdscale.data.delivery import Delivery
from hvdscale.data.position import Position
from hvdscale.data.state import check_own_state, make_state
from hvdscale.data.types import BLOCK, Int64s
from hvdscale.errors import PlanError, StateError

if TYPE_CHECKING:
    from hvdscale.data.plan import ShardPlan

__all__ = ["Reader"]

_SUM_EVERY = 64  # batches
_LARGEST_FILLED = 1 << 24  # samples of a batch that may be larger than every shard


class Reader(Delivery):
    """Batches of one shard, without end. Made by ``ShardPlan.reader``.

    Iteration ends only where no later epoch can bring a batch: the shard holds no sample (there are fewer samples
    than shards, or none).
    """

    def __init__(self, plan: ShardPlan, shard: int, batch_size: int, epoch: int | None = None) -> None:
        self.plan, self.shard, self.batch_size = plan, shard, batch_size
        super().__init__(plan.first_epoch if epoch is None else integer("epoch", epoch, plan.first_epoch))
        self._unsummed: list[Int64s] = []
        if plan.tail == "pad" and batch_size > _LARGEST_FILLED:
            largest = int(plan.sizes(self._regular_epoch).max())
            if batch_size > largest:
                raise PlanError(
                    f'Tail "pad" fills every batch: batch_size is {batch_size}, and the largest shard holds {largest} '
                    'samples. Use a smaller batch, or tail "exact".'
                )
        if plan.tail == "drop" and plan.n and not self.steps(self._regular_epoch):
            sizes = plan.sizes(self._regular_epoch)
            raise PlanError(
                f'Tail "drop" leaves no batch: batch_size is {batch_size}, and shard {int(sizes.argmin())} of '
                f'{plan.shards} holds {int(sizes.min())} samples. Use a smaller batch, fewer shards, or tail "pad".'
            )
        self._skip_finished()

    def ahead(self, epochs: int | None = None) -> Iterator[Batch]:
        """Batches from the next one to deliver on, not counted as delivered; ``epochs=1``: of this epoch only."""
        epoch, step = self._epoch, self._step
        stop = None if epochs is None else epoch + integer("epochs", epochs, 0)
        while stop is None or epoch < stop:
            batch = None
            for batch in self._batches(epoch, step):
                yield batch
            if batch is None and step == 0 and epoch >= self._regular_epoch:
                return
            epoch, step = epoch + 1, 0

    def deliver(self, batch: Batch) -> None:
        """Count a batch of ``ahead()`` as read. Batches are delivered in order.

        Raises:
            PlanError: this is not the next batch.
        """
        instance("batch", batch, Batch)
        if (batch.epoch, batch.step) != (self._epoch, self._step):
            raise PlanError(
                f"Batches are delivered in order: the next is step {self._step} of epoch {self._epoch}; "
                f"this is step {batch.step} of epoch {batch.epoch}."
            )
        self._stream = None
        self._count(batch)

    def steps(self, epoch: int | None = None) -> int:
        """Batches of one epoch (default: the current one) for this shard, delivered or not."""
        sizes = self.plan.reading(self._epoch if epoch is None else epoch).sizes
        return int(steps_of(sizes, self.batch_size, self.plan.tail)[self.shard])

    def filled_steps(self, epoch: int | None = None) -> int:
        """How many of them have something in them: all."""
        return self.steps(epoch)

    def dropped(self, epoch: int | None = None) -> Int64s:
        """The samples of this shard that tail ``"drop"`` leaves out of the epoch: int64[...], empty for other tails."""
        if self.plan.tail != "drop":
            return np.zeros(0, np.int64)
        epoch = self._epoch if epoch is None else epoch
        rest = self.plan.reading(epoch).blocks(self.shard, self.steps(epoch) * self.batch_size)
        return np.concatenate([np.zeros(0, np.int64), *rest])

    def certificate(self, epoch: int | None = None) -> int:
        """The sum, modulo 2**64, for the samples of an epoch that this reader delivered (default: the last finished).

        Added over the readers of all shards it equals ``plan.certificate()`` when the epoch was read exactly once.
        Samples that tail ``"drop"`` leaves out count as read once the epoch is over. What was read before
        ``ShardPlan.resume`` is part of shard 0's sum.

        Raises:
            StateError: an epoch that is too long ago, or whose earlier part is not known.
        """
        epoch = self._summed(epoch)
        self._sum_up()
        return add_sums([self._sums.get(epoch, 0), self.read_before(epoch)])

    def read_before(self, epoch: int) -> int:
        """This reader's part of the certificate that is older than it: what ``ShardPlan.resume`` found, at shard 0."""
        past = next((each for each in self.plan.interrupted if each.epoch == epoch), None)
        if self.shard != 0 or past is None:
            return 0
        if past.certificate is None:
            raise StateError(f"What was read of epoch {epoch} before the run was resumed is not known to all ranks.")
        return past.certificate

    def state_dict(self) -> dict[str, Any]:
        """How far this reader has delivered, as JSON can hold it. ``ShardPlan.resume`` takes those of all shards."""
        self._sum_up()
        delivered = self._delivered() if self._step else 0
        position = Position(self.shard, self.batch_size, self._epoch, self._step, delivered, self._sums)
        return make_state(self.plan, position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a reader of an equal plan, the same shard and the same batch size was.

        Raises:
            StateError: a state that is damaged, or of another plan, shard, batch size or format.
        """
        own = check_own_state(state, self.plan, self.shard, self.batch_size)
        self._epoch, self._step, self._sums = own.epoch, own.step, dict(own.sums)
        self._unsummed.clear()
        self._stream = None

    @property
    def _regular_epoch(self) -> int:
        """The first epoch that was not interrupted, from the reader's own on."""
        after = max((each.epoch + 1 for each in self.plan.interrupted), default=0)
        return max(self._epoch, after)

    def _delivered(self) -> int:
        """Samples of the current epoch that were delivered."""
        upper = self._step * self.batch_size
        if self.plan.tail != "pad":
            return upper
        return min(upper, int(self.plan.reading(self._epoch).sizes[self.shard]))

    def _batches(self, epoch: int, step: int) -> Iterator[Batch]:
        """The batches of one epoch from ``step`` on."""
        tail, size = self.plan.tail, self.batch_size
        blocks = self.plan.reading(epoch).blocks(self.shard, step * size, max(size, BLOCK // size * size))
        parts = rebatch(blocks, size)
        if tail == "exact":
            part = next(parts, None)
            while part is not None:
                following = next(parts, None)
                yield Batch(part, len(part), epoch, step, following is None)
                part, step = following, step + 1
            return
        total = self.steps(epoch)
        nothing = np.zeros(0, np.int64)
        for number, part in zip(range(step, total), itertools.chain(parts, itertools.repeat(nothing)), strict=False):
            filled = part if len(part) == size else np.resize(part, size)  # its own samples again, or sample 0
            yield Batch(filled, len(part), epoch, number, number == total - 1)

    def _count(self, batch: Batch) -> None:
        self._step = batch.step + 1
        self._unsummed.append(batch.indices[: batch.count].copy())  # hashed many together: it costs a fraction
        if len(self._unsummed) >= _SUM_EVERY:
            self._sum_up()
        if batch.last:
            self._end_epoch()
            self._skip_finished()

    def _end_epoch(self) -> None:
        self._unsummed.append(self.dropped())
        self._sum_up()
        self._epoch, self._step = self._epoch + 1, 0
        self._forget()

    def _skip_finished(self) -> None:
        """Leave interrupted epochs of which nothing is left for this shard."""
        while self._epoch < self._regular_epoch and not self.steps():
            self._end_epoch()

    def _sum_up(self) -> None:
        """Add what was delivered of this epoch since the last call to its sum."""
        samples = np.concatenate([np.zeros(0, np.int64), *self._unsummed])
        self._unsummed.clear()
        if len(samples):
            self._sums[self._epoch] = add_sums([self._sums.get(self._epoch, 0), sum_of(samples)])
