"""``shard_dataset``: a rank's share of the data as a ``tf.data.Dataset`` that knows what it has delivered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from hvdscale.data import BalancedPlan, Batch, Feed, Passes, ShardPlan, ShardStream, StreamFeed, Table
from hvdscale.data.checks import function, instance, integer, own_shard
from hvdscale.data.stream_reader import records_from
from hvdscale.data.tables import stack
from hvdscale.errors import PlanError
from hvdscale.tensorflow.arrays import layout_of
from hvdscale.tensorflow.runtime import world
from hvdscale.tensorflow.streaming import counted_pipeline

__all__ = ["ShardedDataset", "StreamDataset", "shard_dataset"]


def shard_dataset(
    data: Any,
    plan: ShardPlan | BalancedPlan | ShardStream,
    batch_size: int,
    *,
    shard: int | None = None,
    epoch: int | None = None,
    workers: int = 0,
    prefetch: int = 2,
    collate: Callable[[Any], Any] | None = None,
    signature: Any = None,
) -> ShardedDataset | StreamDataset:
    """This rank's share of ``data`` as a ``tf.data.Dataset``. One iteration is one epoch, each in the plan's order.

    ``dataset.state_dict()`` counts the batches that a consumer has taken, not those prefetched: by a Python loop,
    by ``fit``, by a loop inside a ``tf.function``. A stage added behind this dataset is its consumer: with ``map``
    that is the same, a ``prefetch`` or a parallel ``map`` takes ahead, and so the state would count ahead. Give work
    on batches to ``collate``. ``break`` in a loop over a dataset inside a ``tf.function`` takes one batch more than
    its body sees; loop over ``iter(dataset)`` there.

    Save the states of all ranks; ``ShardPlan.resume(states, hvd.size())`` makes the plan for what is left. An
    iteration that is left early is gone on with by the next. Auto-sharding is off.

    Args:
        data: an array, or a tuple or dictionary of arrays (NumPy, memory maps, tensors). Or any object with
            ``__len__`` and ``__getitem__`` whose items are numbers, arrays, or tuples or dictionaries of them. With
            a ``ShardStream``: a function of the number of the record to start at.
        plan: which samples each shard reads: a ``ShardPlan``, ``BalancedPlan`` or ``ShardStream``.
        batch_size: samples in a batch of one rank.
        shard: whose samples; default: this rank's, of a plan with one shard per rank.
        epoch: the first epoch; default: the plan's first. A stream has its own.
        workers: threads that fetch batches; 0: none but the one that prefetches. Not for streams.
        prefetch: batches prepared ahead; 0: none.
        collate: makes NumPy arrays of a list of samples, or of the rows taken from arrays; default: they are stacked,
            or taken as they are.
        signature: ``tf.TensorSpec`` of a batch; default: that of the first sample, whose shape all have.

    Raises:
        PlanError: an argument out of its range, or data that does not fit the plan.
    """
    instance("plan", plan, ShardPlan, BalancedPlan, ShardStream)
    integer("batch_size", batch_size, 1)
    integer("workers", workers, 0)
    prefetch = integer("prefetch", prefetch, 0, 2**31 - 1)
    mine = shard
    if mine is None:  # a given shard needs no init()
        here = world()
        mine = own_shard(None, plan.shards, here.rank, here.size)
    if isinstance(plan, ShardStream):
        if epoch is not None:
            raise PlanError(f"A stream has its epoch in itself: ShardStream(..., epoch={epoch!r}). Leave epoch out.")
        function("collate", collate)
        if workers:
            raise PlanError(f"One thread reads a stream; workers is {workers}. Leave workers out.")
        return StreamDataset(StreamFeed(data, plan, mine, batch_size), data, collate or stack, signature, prefetch)
    table = Table(data, collate)
    table.check_length(plan.n)
    full = batch_size if isinstance(plan, ShardPlan) and plan.tail != "exact" else None
    return ShardedDataset(Feed(plan, mine, batch_size, epoch), table, full, signature, workers, prefetch)


class _Counted(tf.data.Dataset):
    """A dataset that stands for ``pipeline``."""

    def __init__(self, pipeline: tf.data.Dataset) -> None:
        self._pipeline = pipeline  # first: what follows asks for its options
        super().__init__(pipeline._variant_tensor)

    def _inputs(self) -> list[Any]:
        return [self._pipeline]

    @property
    def element_spec(self) -> Any:
        return self._pipeline.element_spec


class ShardedDataset(_Counted):
    """A shard's batches. Made by ``shard_dataset``."""

    def __init__(
        self, feed: Feed, table: Table, batch_size: int | None, signature: Any, workers: int, prefetch: int
    ) -> None:
        """``batch_size`` is that of every batch, or ``None`` where batches differ."""

        def example() -> Any:
            if not len(table) and not table.is_arrays:
                raise PlanError("There is no sample to see types and shapes by; give signature=...")
            return table.fetch(np.arange(min(1, len(table))))

        self.feed = feed
        self.batch: Batch | None = None
        """The plan's batch taken last: ``indices``, ``count``, ``valid``, ``epoch``, ``step``."""
        layout = layout_of(signature, example, batch_size)
        pipeline = counted_pipeline(
            Passes(feed), table.fetch, layout, workers=workers, prefetch=prefetch, indices=True, taken=self._taken
        )
        super().__init__(pipeline)

    def _taken(self, batch: Batch) -> None:
        self.batch = batch

    @property
    def epoch(self) -> int:
        """The epoch of the next batch: once the last batch of an epoch is taken, the epoch after it."""
        return self.feed.epoch

    def cardinality(self) -> tf.Tensor:
        """Batches of this epoch that are not taken yet: int64. So is ``len(dataset)``."""
        return tf.constant(len(self.feed), tf.int64)

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``resume`` of the plan's class takes the states of all ranks."""
        return self.feed.state_dict()


class StreamDataset(_Counted):
    """A shard's batches of a stream. Made by ``shard_dataset``."""

    def __init__(
        self,
        feed: StreamFeed,
        source: Callable[[int], Any],
        collate: Callable[[Any], Any],
        signature: Any,
        prefetch: int,
    ) -> None:
        def example() -> Any:
            record = next(records_from(source, 0), None)
            if record is None:
                raise PlanError("The stream has no record to see types and shapes by; give signature=...")
            return collate([record])

        self._feed = feed
        layout = layout_of(signature, example, None)
        pipeline = counted_pipeline(
            Passes(feed), collate, layout, workers=0, prefetch=prefetch, indices=False, taken=lambda records: None
        )
        super().__init__(pipeline)

    @property
    def epoch(self) -> int:
        """The pass over the stream of the next batch: once the last batch is taken, the pass after it."""
        return self._feed.epoch

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``ShardStream.resume`` takes the states of all shards."""
        return self._feed.state_dict()
