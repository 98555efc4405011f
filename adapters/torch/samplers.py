"""The plan's batches as PyTorch samplers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

from torch.utils.data import Sampler

from hvdscale.data import BalancedPlan, Feed, Passes, ShardPlan, checks
from hvdscale.data.batch import Batch
from hvdscale.torch.runtime import world

__all__ = ["AheadSampler", "ShardedBatchSampler", "own_shard"]


def own_shard(shard: int | None, shards: int) -> int:
    """``shard``, or this rank's where it is ``None``; refused where the plan has not one shard per rank."""
    if shard is not None:
        return shard  # also before init()
    here = world()
    return checks.own_shard(shard, shards, here.rank, here.size)


class ShardedBatchSampler(Sampler[list[int]]):
    """A shard's batches of sample numbers, for ``DataLoader(data, batch_sampler=...)``. One iteration is one epoch.

    A batch counts as delivered when it is handed to the loader. With workers the loader draws ahead of training:
    take ``shard_dataset``, whose state counts what training got.

    Args:
        plan: which samples each shard reads.
        batch_size: samples in a batch of one shard.
        shard: whose batches; default: this rank's, of a plan with one shard per rank.
        epoch: the first epoch; default: the plan's first.

    Raises:
        PlanError: an argument out of its range, or no shard for this rank.
    """

    def __init__(
        self, plan: ShardPlan | BalancedPlan, batch_size: int, *, shard: int | None = None, epoch: int | None = None
    ) -> None:
        checks.instance("plan", plan, ShardPlan, BalancedPlan)
        self.plan = plan
        self.feed = Feed(plan, own_shard(shard, plan.shards), batch_size, epoch)

    def __len__(self) -> int:
        """Batches left in this epoch."""
        return len(self.feed)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.feed.batches():
            self.feed.deliver()
            if len(batch):
                yield batch.indices.tolist()
        self.feed.finish()

    @property
    def batch(self) -> Batch | None:
        """The batch delivered last: ``count``, ``valid``, ``epoch``, ``step``."""
        return self.feed.batch

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``ShardPlan.resume`` takes the states of all shards."""
        return self.feed.state_dict()


class AheadSampler(ShardedBatchSampler):
    """Draws without delivering, in ``passes``; its loader delivers. Batches without a sample are left out."""

    @cached_property
    def passes(self) -> Passes:
        return Passes(self.feed)

    def __iter__(self) -> Iterator[list[int]]:
        for _, batch in self.passes.draw():
            yield batch.indices.tolist()
