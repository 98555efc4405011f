"""A stream feeding a loader: read ahead by its threads or workers, counted as read when training gets a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hvdscale.data.stream_reader import StreamReader
from hvdscale.data.streams import ShardStream
from hvdscale.errors import PlanError

__all__ = ["StreamCursor", "StreamFeed"]


class StreamCursor:
    """Passes over a shard's batches of a stream, and how far they are delivered. It can be sent to worker processes.

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
        self._state: Mapping[str, Any] = self.reader().state_dict()

    @property
    def epoch(self) -> int:
        """The number of this pass."""
        return self._stream.epoch

    def reader(self, every: int = 1, first: int = 0) -> StreamReader:
        """Over the rest of this pass; ``every`` and ``first`` are as in ``ShardStream.reader``."""
        return self._stream.reader(
            self._source, self._shard, self._batch_size, every=every, first=first, after=self._after
        )

    def reach(self, state: Mapping[str, Any]) -> None:
        """Count all up to ``state``, of a reader of this pass, as read: the next reader starts behind it."""
        self._state = self._after = state

    def finish(self) -> None:
        """End this pass: the next one is over the stream's next epoch, from its start."""
        self._state = {**self._state, "finished": True}
        self._stream, self._after = self._stream.next_epoch(), None

    def state_dict(self) -> dict[str, Any]:
        """What was delivered, as JSON; ``ShardStream.resume`` takes the states of all shards."""
        return dict(self._state)


class StreamFeed(StreamCursor):
    """A cursor that delivers batch by batch: what ``Feed`` is for a plan."""

    def __init__(
        self, source: Callable[[int], Iterable[Any]], stream: ShardStream, shard: int, batch_size: int
    ) -> None:
        super().__init__(source, stream, shard, batch_size)
        self._drawn: deque[tuple[list[Any], dict[str, Any]]] = deque()

    def batches(self) -> Iterator[list[Any]]:
        """The rest of this pass, in lists of records. What was drawn and nobody delivered is drawn again."""
        self._drawn.clear()
        reader = self.reader()
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
        records, state = self._drawn.popleft()
        self.reach(state)
        return records

    def finish(self) -> None:
        """End this pass: the next one is over the stream's next epoch, from its start."""
        super().finish()
        self._drawn.clear()
