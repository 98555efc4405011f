"""One shard of a stream, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.data.stream_past import Run, first_open
from hvdscale.data.stream_routes import Picked, Route, Tickets
from hvdscale.data.types import Int64s

__all__ = ["StreamReader"]


class StreamReader(Iterator[list[Any]]):
    """Batches of one shard, as lists of records, to the end of the stream. Made by ``ShardStream.reader``."""

    def __init__(
        self,
        route: Route,
        past: Sequence[Run],
        shards: int,
        source: Callable[[int], Iterable[Any]],
        shard: int,
        batch_size: int,
        every: int,
        first: int,
        head: Mapping[str, Any],
    ) -> None:
        self._route, self._past, self._shards, self._shard = route, tuple(past), shards, shard
        self._batch_size, self._every, self._first = batch_size, every, first
        self._head = dict(head)
        self._reached = self._open = first_open(past)
        self._batches = 0
        self._records = self._read(source)

    def __next__(self) -> list[Any]:
        while batch := list(islice(self._records, self._batch_size)):
            self._reached = batch[-1][1] + 1
            self._batches += 1
            if (self._batches - 1) % self._every == self._first:
                return [record for record, _ in batch]
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Where this shard is after the batch last returned, as JSON. Records read ahead are not counted."""
        past = [list(run.reached) for run in self._past]
        return {**self._head, "batches": self._batches, "reached": self._reached, "past": past}

    def _read(self, source: Callable[[int], Iterable[Any]]) -> Picked:
        start = self._open - self._open % self._route.span
        records = iter(source(start))
        for head in records:
            span = chain([head], islice(records, self._route.span - 1))
            yield from self._route.pick(span, start, self._wanted)
            start += self._route.span

    def _wanted(self, positions: Int64s, tickets: Tickets) -> npt.NDArray[np.bool_]:
        def owners(shards: int) -> Int64s:
            return self._route.owners(tickets, shards)

        wanted: npt.NDArray[np.bool_] = (owners(self._shards) == self._shard) & (positions >= self._open)
        for run in self._past:
            if int(positions.min(initial=0)) < max(run.reached):
                wanted &= ~run.delivered(positions, owners)
        return wanted
