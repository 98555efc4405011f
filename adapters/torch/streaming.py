"""A sharded stream as a PyTorch data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch.utils.data import IterableDataset, default_collate, get_worker_info

from hvdscale.data import ShardStream
from hvdscale.data.checks import function, instance
from hvdscale.data.stream_feed import StreamCursor
from hvdscale.errors import PlanError
from hvdscale.torch.samplers import own_shard

__all__ = ["ShardedIterable", "StatedIterable"]


class ShardedIterable(IterableDataset[Any]):
    """A shard's batches of a stream, for ``DataLoader(..., batch_size=None)``. One iteration is one pass.

    Workers take the batches in turn: each reads the whole stream and makes its own batches only. The state of what
    was delivered is known to ``shard_dataset``'s loader.

    Args:
        source: ``source(start)`` gives the records from number ``start`` on, the same on every rank.
        stream: which records each shard reads.
        batch_size: records in a batch of one shard.
        shard: whose batches; default: this rank's, of a stream with one shard per rank.
        collate: makes a batch of a list of records; default: PyTorch's ``default_collate``.

    Raises:
        PlanError: an argument out of its range, or no shard for this rank.
    """

    def __init__(
        self,
        source: Callable[[int], Iterable[Any]],
        stream: ShardStream,
        batch_size: int,
        *,
        shard: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        instance("stream", stream, ShardStream)
        function("collate", collate)
        self.cursor = StreamCursor(source, stream, own_shard(shard, stream.shards), batch_size)
        self._collate = collate or default_collate

    def __iter__(self) -> Iterator[Any]:
        return (batch for batch, _ in self.stated())

    def stated(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Batches, each with the state once it is delivered; in a worker the worker's turns."""
        worker = get_worker_info()
        every, first = (1, 0) if worker is None else (worker.num_workers, worker.id)
        reader = self.cursor.reader(every, first)
        for records in reader:
            yield self._collate(records), reader.state_dict()

    def state_dict(self) -> dict[str, Any]:
        """How far the stream is delivered, as JSON; ``ShardStream.resume`` takes the states of all shards."""
        return self.cursor.state_dict()


class StatedIterable(IterableDataset[Any]):
    """A ``ShardedIterable`` whose items carry their states, for the loader that counts them."""

    def __init__(self, batches: ShardedIterable) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[Any, dict[str, Any]]]:
        return self.batches.stated()


def refuse_persistent(workers: int, persistent: bool) -> None:
    """Workers learn where a pass starts when they start themselves.

    Raises:
        PlanError: they are to outlive a pass.
    """
    if workers and persistent:
        raise PlanError("Workers of a stream start anew in each pass; leave persistent_workers out.")
