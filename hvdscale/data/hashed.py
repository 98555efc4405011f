"""Reading by key: a sample belongs to the shard its key hashes to, in every epoch and whatever else is in the data.

Samples with equal keys share a shard, and shards are equal in expectation, not exactly. A table gives the shard of
each of 65536 units of the hash; a resize changes the fewest entries. A shard reads its samples in source order,
found block by block, so that nothing the size of the data is held.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from hvdscale.data.even import even_table
from hvdscale.data.keys import UNITS, HashedKeys, IndexKeys
from hvdscale.data.types import BLOCK, Int64s, Share, Table
from hvdscale.data.units import owner_table

__all__ = ["Hashed", "moved_units", "table_of"]

_SCAN = 1 << 14  # samples looked at together: temporaries stay in the cache


def table_of(keys: HashedKeys | IndexKeys, shares: tuple[Share, ...], even: bool) -> Table:
    """The shard of each unit: by the units alone, or ``even``, by the samples in them."""
    return even_table(keys, shares) if even and isinstance(keys, HashedKeys) else owner_table(shares)


@dataclass(frozen=True)
class Hashed:
    """One epoch. ``read`` holds, for each interruption, the table then and where each shard's reading had come to;
    ``left`` how many samples of each unit are left after them, all of them at first: int64[65536]."""

    keys: HashedKeys | IndexKeys
    shares: tuple[Share, ...]
    even: bool = False
    read: tuple[tuple[Table, Int64s], ...] = ()  # (uint16[65536], int64[shards], samples from here on are unread)
    left: Int64s | None = None

    @cached_property
    def table(self) -> Table:
        return table_of(self.keys, self.shares, self.even)

    @cached_property
    def sizes(self) -> Int64s:
        return np.bincount(self.table, self._left, minlength=self.shares[-1][0]).astype(np.int64)

    def blocks(self, shard: int, start: int = 0, block: int = BLOCK) -> Iterator[Int64s]:
        skip, held, parts = start, 0, list[Int64s]()
        for first in range(0, len(self.keys), _SCAN):
            samples, owners, _ = self._scan(first)
            mine = samples[owners == shard]
            if skip >= len(mine):
                skip -= len(mine)
                continue
            parts.append(mine[skip:])
            held += len(mine) - skip
            skip = 0
            if held >= min(block, _SCAN):
                yield from _cut(np.concatenate(parts), block)
                held, parts = 0, []
        if held:
            yield from _cut(np.concatenate(parts), block)

    def owner(self, samples: Int64s) -> Int64s:
        units = self.keys.units_of(samples)
        owners = self.table.take(units).astype(np.int64)
        for table, unread_from in self.read:
            owners[samples < unread_from[table.take(units)]] = -1
        return owners

    def after(self, delivered: Int64s, shares: tuple[Share, ...]) -> Hashed:
        unread_from, left = self._without(delivered)
        return Hashed(self.keys, shares, self.even, (*self.read, (self.table, unread_from)), left)

    @property
    def _left(self) -> Int64s:
        return self.keys.counts if self.left is None else self.left

    def _without(self, delivered: Int64s) -> tuple[Int64s, Int64s]:
        """For each shard where its samples begin that come after its first ``delivered[shard]``, int64[shards], and
        what is left of each unit then."""
        places = np.where(delivered == 0, 0, len(self.keys))
        seen, left = np.zeros_like(delivered), self._left.copy()
        for first in range(0, len(self.keys), _SCAN):
            if (seen >= delivered).all():
                break
            samples, owners, units = self._scan(first)
            counts = np.bincount(owners, minlength=len(seen))
            for shard in np.flatnonzero((seen < delivered) & (seen + counts >= delivered)):
                last_read = np.flatnonzero(owners == shard)[delivered[shard] - seen[shard] - 1]
                places[shard] = samples[last_read] + 1
            seen += counts
            left -= np.bincount(units[samples < places[owners]], minlength=UNITS)
        return places, left

    def _scan(self, first: int) -> tuple[Int64s, npt.NDArray[np.uint16], npt.NDArray[np.uint16]]:
        """Unread samples of the block that starts at ``first``, their shards and their units."""
        stop = min(first + _SCAN, len(self.keys))
        units = self.keys.units(first, stop)
        samples, owners = np.arange(first, stop, dtype=np.int64), self.table.take(units)
        for table, unread_from in self.read:
            unread = samples >= unread_from[table.take(units)]
            samples, owners, units = samples[unread], owners[unread], units[unread]
        return samples, owners, units


def _cut(samples: Int64s, block: int) -> Iterator[Int64s]:
    for start in range(0, len(samples), block):
        yield samples[start : start + block]


def moved_units(keys: HashedKeys | IndexKeys, before: Table, after: Table) -> float:
    """The share of the samples whose unit changes owner; of the hash's range where there are no keys to count."""
    changed = before != after
    if isinstance(keys, IndexKeys) or not len(keys):
        return float(np.count_nonzero(changed) / UNITS)
    return float(keys.counts[changed].sum() / len(keys))
