"""One shard of a stream, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.data.stream_past import Run
from hvdscale.data.stream_routes import Picked, Route, Tickets
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError

__all__ = ["StreamReader", "records_from"]


class StreamReader(Iterator[list[Any]]):
    """Batches of one shard, as lists of records, to the end of the stream. Made by ``ShardStream.reader``."""

    def __init__(
        self,
        route: Route,
        past: Sequence[Run],
        facts: Mapping[str, Any],
        source: Callable[[int], Iterable[Any]],
        batch_size: int,
        every: int,
        first: int,
        *,
        delivered: int,
        reached: int,
    ) -> None:
        """``facts`` name the stream, the run and the shard, in every state; the shard's records at positions below
        ``reached`` are read already, in ``delivered`` batches."""
        self._route, self._past, self._facts = route, tuple(past), dict(facts)
        self._batch_size, self._every, self._first = batch_size, every, first
        self._open = self._reached = reached
        self._mark = route.known.get(reached - 1)
        self._before, self._batches, self._finished = delivered, 0, False
        self._records = self._read(source)

    def __next__(self) -> list[Any]:
        while batch := list(islice(self._records, self._batch_size)):
            record, position = batch[-1]
            self._reached, self._mark = position + 1, self._route.mark(record)
            self._batches += 1
            if (self._batches - 1) % self._every == self._first:
                return [record for record, _ in batch]
        self._finished = True
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        """Where this shard is after the batch last returned, as JSON. Records read ahead are not counted."""
        delivered = {"batches": self._before + self._batches, "reached": self._reached, "finished": self._finished}
        return {**self._facts, **delivered, "key": self._mark}

    def _read(self, source: Callable[[int], Iterable[Any]]) -> Picked:
        start = min([self._open, *self._route.known])
        start -= start % self._route.span
        records = records_from(source, start)
        for head in records:
            span = chain([head], islice(records, self._route.span - 1))
            yield from self._route.pick(span, start, self._wanted)
            start += self._route.span

    def _wanted(self, positions: Int64s, tickets: Tickets) -> npt.NDArray[np.bool_]:
        def owners(shards: int) -> Int64s:
            return self._route.owners(tickets, shards)

        wanted: npt.NDArray[np.bool_] = (owners(self._facts["shards"]) == self._facts["shard"]) & (
            positions >= self._open
        )
        for run in self._past:
            if positions.min() < max(run.reached):
                wanted &= ~run.delivered(positions, owners)
        return wanted


def records_from(source: Callable[[int], Iterable[Any]], start: int) -> Iterator[Any]:
    """The records of ``source`` from number ``start`` on.

    Raises:
        PlanError: it gives something else.
    """
    given = source(start)
    if not isinstance(given, Iterable):
        raise PlanError(f"source(start) gives the records from number start on, one by one; it gave {given!r:.80}.")
    return iter(given)
