"""Where the records of a stream go: by number, by place in a shuffled window, or by key."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import compress
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from hvdscale.data.hashing import hash_keys, kind_of
from hvdscale.data.keys import hash_units, salt_of
from hvdscale.data.permutation import Permutation
from hvdscale.data.types import Int64s
from hvdscale.data.units import owner_table
from hvdscale.errors import PlanError, StateError

__all__ = ["ByKey", "InOrder", "InWindows", "Picked", "Route", "Wanted"]

_AT_ONCE = 256  # records looked at together where a policy leaves it open

Tickets = npt.NDArray[np.integer[Any]]
Picked = Iterator[tuple[Any, int]]
Wanted = Callable[[Int64s, Tickets], npt.NDArray[np.bool_]]
"""``wanted(positions, tickets)``: whether this reader gives out the records there."""


class Route(Protocol):
    """Gives each record a position, the number under which it is delivered, and a ticket, which names its shard."""

    @property
    def span(self) -> int:
        """Records looked at together; spans start at multiples of it."""
        ...

    def pick(self, records: Iterator[Any], start: int, wanted: Wanted) -> Picked:
        """The wanted ones of a span's records, with their positions, ascending.

        Args:
            records: at most ``span`` of them, from number ``start``; taken to their end.
        """
        ...

    def owners(self, tickets: Tickets, shards: int) -> Int64s:
        """The shard of each ticket."""
        ...

    @property
    def known(self) -> Mapping[int, str]:
        """Of some records, by number, what ``mark`` said of them when they were read before."""
        ...

    def mark(self, record: Any) -> str | None:
        """What a state keeps of a record to know it again, where that names its shard."""
        ...


class _Numbered:
    """Shards follow from the number alone, so nothing is to be known of a record."""

    known: ClassVar[Mapping[int, str]] = {}

    def owners(self, tickets: Tickets, shards: int) -> Int64s:
        return (tickets % shards).astype(np.int64)

    def mark(self, record: Any) -> str | None:
        return None


@dataclass(frozen=True)
class InOrder(_Numbered):
    """Position and ticket are the record's number. Records are passed on as they come."""

    span: ClassVar[int] = _AT_ONCE

    def pick(self, records: Iterator[Any], start: int, wanted: Wanted) -> Picked:
        positions = np.arange(start, start + self.span, dtype=np.int64)
        mine = wanted(positions, positions)
        return zip(compress(records, mine.tolist()), positions[mine].tolist(), strict=False)


@dataclass(frozen=True)
class InWindows(_Numbered):
    """Position and ticket are the record's place in the order of its window. Only wanted records are kept."""

    span: int
    facts: tuple[object, ...]

    def pick(self, records: Iterator[Any], start: int, wanted: Wanted) -> Picked:
        order = Permutation(self.span, (*self.facts, start // self.span))
        positions = start + order.inverse(np.arange(self.span, dtype=np.int64))
        mine = wanted(positions, positions)
        kept = zip(compress(records, mine.tolist()), positions[mine].tolist(), strict=False)  # the end comes early
        return iter(sorted(kept, key=lambda pair: pair[1]))


@dataclass
class ByKey:
    """Position is the record's number, the ticket the unit of its key: as in a ``ShardPlan`` with the same seed.

    One is for one reading: it sees to it that all keys are of the kind of the first, and that records which are
    ``known`` have the keys they had.
    """

    key: Callable[[Any], int | str | bytes]
    seed: int
    known: Mapping[int, str] = field(default_factory=dict)
    span: ClassVar[int] = _AT_ONCE
    _first: list[Any] = field(default_factory=list, init=False)

    def pick(self, records: Iterator[Any], start: int, wanted: Wanted) -> Picked:
        read = list(records)
        keys = [self.key(record) for record in read]
        try:
            tickets = hash_units(hash_keys([*keys, *self._first], salt_of(self.seed))[: len(keys)])
        except PlanError as error:
            raise PlanError(f"Keys of records {start}..{start + len(read) - 1} of the stream: {error}") from None
        self._first = self._first or keys[:1]
        for number, mark in self.known.items():
            if 0 <= number - start < len(read):
                self._recognise(number, mark, read[number - start])
        positions = np.arange(start, start + len(read), dtype=np.int64)
        mine = wanted(positions, tickets)
        return zip(compress(read, mine.tolist()), positions[mine].tolist(), strict=True)

    def owners(self, tickets: Tickets, shards: int) -> Int64s:
        return owner_table(((shards, None),))[tickets].astype(np.int64)

    def mark(self, record: Any) -> str | None:
        key = self.key(record)
        return f"{kind_of(key)} {int(hash_keys([key], salt_of(self.seed))[0]):016x}"

    def _recognise(self, number: int, mark: str, record: Any) -> None:
        if (now := self.mark(record)) != mark:
            raise StateError(
                f"A stream goes on with the keys it had; that of record {number} was of {mark} (kind and hash), and is "
                f"of {now} now. Give the key function that the stopped run had, and the same records."
            )
