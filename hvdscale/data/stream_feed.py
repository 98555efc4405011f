"""A stream feeding a loader: read ahead by its threads, counted as read when training gets a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hvdscale.data.streams import ShardStream
from hvdscale.errors import PlanError

__all__ = ["StreamFeed"]


class StreamFeed:
    """Passes over a shard's batches of a stream: what ``Feed`` is for a plan.

    Args:
        source: ``source(start)`` gives the records from number ``start`` on, the same on every rank.
        stream: which records each shard reads.
        shard: whose records.
        batch_size: records in a batch.

    Raises:
        PlanError: an argument out of its range.
    """

    def __init__(
        self, source: Callable[[int], Iterable[Any]], stream: ShardStream, shard: int, batch_size: int
    ) -> None:
        self._source, self._stream, self._shard, self._batch_size = source, stream, shard, batch_size
        self._after: Mapping[str, Any] | None = None
        self._state: Mapping[str, Any] = stream.reader(source, shard, batch_size).state_dict()
        self._drawn: deque[tuple[list[Any], dict[str, Any]]] = deque()

    @property
    def epoch(self) -> int:
        """The number of this pass."""
        return self._stream.epoch

    def batches(self) -> Iterator[list[Any]]:
        """The rest of this pass, in lists of records. What was drawn and nobody delivered is drawn again."""
        self._drawn.clear()
        reader = self._stream.reader(self._source, self._shard, self._batch_size, after=self._after)
        for records in reader:
            self._drawn.append((records, reader.state_dict()))
            yield records

    def deliver(self) -> list[Any]:
        """Count the oldest batch drawn as read.

        Raises:
            PlanError: none was drawn.
        """
        if not self._drawn:
            raise PlanError(f"A batch is delivered after it is drawn; none is waiting in pass {self.epoch}.")
        records, self._state = self._drawn.popleft()
        self._after = self._state
        return records

    def finish(self) -> None:
        """End this pass: the next one is over the stream's next epoch, from its start."""
        self._state = {**self._state, "finished": True}
        self._stream, self._after = self._stream.next_epoch(), None
        self._drawn.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``ShardStream.resume`` takes the states of all shards."""
        return dict(self._state)
