"""A reader feeding a loader: drawn ahead by workers or prefetch, counted as read when training gets it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from hvdscale.data.batch import Batch
from hvdscale.errors import PlanError

__all__ = ["BatchPlan", "BatchReader", "Feed"]


class BatchPlan(Protocol):
    """What a feed asks of a plan: ``ShardPlan`` and ``BalancedPlan`` are such."""

    @property
    def first_epoch(self) -> int: ...

    @property
    def n(self) -> int: ...

    def certificate(self) -> int: ...

    def reader(self, shard: int, batch_size: int, epoch: int | None = None) -> BatchReader: ...


class BatchReader(Protocol):
    """What a feed asks of a reader."""

    @property
    def epoch(self) -> int: ...

    @property
    def step(self) -> int: ...

    def ahead(self, epochs: int | None = None) -> Iterator[Batch]: ...

    def deliver(self, batch: Batch) -> None: ...

    def filled_steps(self, epoch: int | None = None) -> int: ...

    def certificate(self, epoch: int | None = None) -> int: ...

    def state_dict(self) -> dict[str, Any]: ...


class Feed:
    """Passes over the epochs of a shard's reader, for a loader that iterates one epoch at a time.

    A pass draws batches with ``batches()`` and counts each with ``deliver()`` when it is handed out. A pass that is
    left early is not over: the next one starts behind the last delivered batch. ``finish()`` ends it. Passes of all
    shards are over the same epochs: where a shard has nothing to read in one, its pass is empty.
    """

    def __init__(self, plan: BatchPlan, shard: int, batch_size: int, epoch: int | None = None) -> None:
        self.plan = plan
        self.reader = plan.reader(shard, batch_size, epoch)
        self.batch: Batch | None = None
        """The last batch delivered that has samples: what a loader handed out."""
        self._epoch = plan.first_epoch if epoch is None else epoch
        self._drawn: deque[Batch] = deque()

    @property
    def epoch(self) -> int:
        """The epoch of this pass."""
        return self._epoch

    def __len__(self) -> int:
        """Batches of this pass with something in them that are not delivered yet."""
        if self.reader.epoch > self._epoch:
            return 0
        given = self.reader.step if self.reader.epoch == self._epoch else 0
        return max(0, self.reader.filled_steps(self._epoch) - given)

    def batches(self) -> Iterator[Batch]:
        """The rest of this pass. What an earlier call drew and nobody delivered is drawn again."""
        self._drawn.clear()
        for batch in self.reader.ahead(max(0, self._epoch - self.reader.epoch + 1)):
            if batch.epoch == self._epoch:
                self._drawn.append(batch)
                yield batch

    def deliver(self) -> Batch:
        """Count the oldest batch drawn as read.

        Raises:
            PlanError: none was drawn.
        """
        if not self._drawn:
            raise PlanError(f"A batch is delivered after it is drawn; none is waiting in epoch {self._epoch}.")
        batch = self._drawn.popleft()
        self.reader.deliver(batch)
        if len(batch):
            self.batch = batch
        return batch

    def finish(self) -> None:
        """End this pass, once its batches are delivered; the next is over the next epoch.

        Batches without a sample are delivered here: a loader has nothing to hand out for them.

        Raises:
            PlanError: a batch with samples was drawn and not delivered.
        """
        while self._drawn:
            if len(self._drawn[0]):
                raise PlanError(f"Step {self._drawn[0].step} of epoch {self._epoch} is not delivered yet.")
            self.deliver()
        self._epoch += 1

    def state_dict(self) -> dict[str, Any]:
        """The reader's: what was delivered, whatever was drawn."""
        return self.reader.state_dict()
