"""Which positions each shard reads, as arithmetic: O(shards) memory for any number of positions.

A layout maps (shard, offset in the shard's list) to a position, and back. A fresh plan is one layout over
positions ``0 .. n - 1``. A resized plan is a layout over another layout's lists end to end; a resumed one is a
layout over what is left of another's lists. So any history of resizes and resumes is a short chain of layouts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from hvdscale.data.shares import share_out
from hvdscale.data.types import Int64s

__all__ = ["Concatenated", "Dealt", "EndToEnd", "Interleaved", "Intervals", "Layout", "Tails"]


class Layout(Protocol):
    """Lists of positions, one per shard. All arrays of one call have one shape; positions may hold -1: nowhere."""

    @property
    def sizes(self) -> Int64s: ...

    def positions(self, shards: Int64s, offsets: Int64s) -> Int64s: ...

    def place(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        """(shard, offset) of each position; shard -1 for a position in no list."""
        ...


class Cells(Protocol):
    """Positions put in one row of cells ``0 .. count - 1``, for a layout to give to its shards."""

    @property
    def count(self) -> int: ...

    def positions(self, cells: Int64s) -> Int64s: ...

    def cells(self, positions: Int64s) -> Int64s: ...


@dataclass(frozen=True)
class EndToEnd:
    """Position p is cell p."""

    count: int

    def positions(self, cells: Int64s) -> Int64s:
        return cells

    def cells(self, positions: Int64s) -> Int64s:
        return positions


@dataclass(frozen=True)
class Concatenated:
    """The lists of a layout one after the other."""

    lists: Layout
    _starts: Int64s = field(init=False, repr=False, compare=False)  # [shards + 1]

    def __post_init__(self) -> None:
        object.__setattr__(self, "_starts", np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lists.sizes)]))

    @property
    def count(self) -> int:
        return int(self._starts[-1])

    def positions(self, cells: Int64s) -> Int64s:
        shards = np.searchsorted(self._starts, cells, side="right") - 1
        return self.lists.positions(shards, cells - self._starts[shards])

    def cells(self, positions: Int64s) -> Int64s:
        shards, offsets = self.lists.place(positions)
        return np.where(shards < 0, -1, self._starts[shards] + offsets)


@dataclass(frozen=True)
class Interleaved:
    """The lists of a layout in turn: the first of each list, then the second of each, as far as lists go.

    Lists come by length, the longest first, so that those still going in a row are always the first ones.
    Rows with equally many lists make a band.
    """

    lists: Layout
    _order: Int64s = field(init=False, repr=False, compare=False)  # [shards], list numbers by length
    _rank: Int64s = field(init=False, repr=False, compare=False)  # [shards], its inverse
    _rows: Int64s = field(init=False, repr=False, compare=False)  # [bands + 1], first row of each band, and the end
    _width: Int64s = field(init=False, repr=False, compare=False)  # [bands], lists in a row of the band
    _starts: Int64s = field(init=False, repr=False, compare=False)  # [bands + 1], first cell of each band, and the end

    def __post_init__(self) -> None:
        sizes = self.lists.sizes
        order = np.argsort(-sizes, kind="stable")
        rows = np.unique(np.append(sizes, 0))
        width = np.searchsorted(-sizes[order], -rows[:-1], side="left")  # lists longer than the band's first row
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(width * np.diff(rows))])
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        arrays = {"_order": order, "_rank": rank, "_rows": rows, "_width": width, "_starts": starts}
        for name, array in arrays.items():
            object.__setattr__(self, name, array)

    @property
    def count(self) -> int:
        return int(self._starts[-1])

    def positions(self, cells: Int64s) -> Int64s:
        if self.count == 0:
            return cells
        band = np.searchsorted(self._starts, cells, side="right") - 1
        row, turn = np.divmod(cells - self._starts[band], self._width[band])
        return self.lists.positions(self._order[turn], self._rows[band] + row)

    def cells(self, positions: Int64s) -> Int64s:
        if self.count == 0:
            return np.full_like(positions, -1)
        shards, offsets = self.lists.place(positions)
        band = np.searchsorted(self._rows, np.maximum(offsets, 0), side="right") - 1
        band = np.minimum(band, len(self._width) - 1)
        inside = (offsets - self._rows[band]) * self._width[band] + self._rank[shards]
        return np.where(shards < 0, -1, self._starts[band] + inside)


@dataclass(frozen=True)
class Dealt:
    """Cells dealt to the shards like cards: shard r of k has cells r, r + k, r + 2k, ..."""

    source: Cells
    shards: int

    @property
    def sizes(self) -> Int64s:
        return (self.source.count - np.arange(self.shards) + self.shards - 1) // self.shards

    def positions(self, shards: Int64s, offsets: Int64s) -> Int64s:
        return self.source.positions(offsets * self.shards + shards)

    def place(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        cells = self.source.cells(positions)
        offsets = cells // self.shards
        shards = cells - offsets * self.shards  # several times faster than a remainder
        return np.where(cells < 0, -1, shards), offsets


@dataclass(frozen=True)
class Tails:
    """Each list without its first ``skip[shard]`` positions."""

    lists: Layout
    skip: Int64s

    @property
    def sizes(self) -> Int64s:
        return self.lists.sizes - self.skip

    def positions(self, shards: Int64s, offsets: Int64s) -> Int64s:
        return self.lists.positions(shards, offsets + self.skip[shards])

    def place(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        shards, offsets = self.lists.place(positions)
        offsets = offsets - self.skip[shards]
        return np.where(offsets < 0, -1, shards), offsets


@dataclass(frozen=True)
class Intervals:
    """Cells cut into intervals, each owned by one shard; a shard's list is its intervals from left to right."""

    source: Cells
    shards: int
    starts: Int64s  # [intervals], ascending from 0
    owners: Int64s  # [intervals]
    _by_owner: Int64s = field(init=False, repr=False, compare=False)  # [intervals], numbers by owner, then start
    _before: Int64s = field(init=False, repr=False, compare=False)  # [intervals + 1], cells before, in that order
    _base: Int64s = field(init=False, repr=False, compare=False)  # [shards + 1], cells of all lower shards
    _offset: Int64s = field(init=False, repr=False, compare=False)  # [intervals], offset of the start in its list

    def __post_init__(self) -> None:
        lengths = np.diff(np.append(self.starts, self.source.count))
        by_owner = np.argsort(self.owners, kind="stable")
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths[by_owner])])
        base = before[np.searchsorted(self.owners[by_owner], np.arange(self.shards + 1), side="left")]
        offset = np.empty_like(self.starts)
        offset[by_owner] = before[:-1] - base[self.owners[by_owner]]
        for name, array in {"_by_owner": by_owner, "_before": before, "_base": base, "_offset": offset}.items():
            object.__setattr__(self, name, array)

    @classmethod
    def contiguous(cls, source: Cells, shards: int, weights: Sequence[float] | None) -> Intervals:
        """One interval per shard, from left to right."""
        sizes = share_out(source.count, shards, weights)
        starts = np.cumsum(sizes) - sizes
        return cls(source, shards, starts[sizes > 0], np.flatnonzero(sizes > 0))

    @property
    def sizes(self) -> Int64s:
        return np.diff(self._base)

    def positions(self, shards: Int64s, offsets: Int64s) -> Int64s:
        along = self._base[shards] + offsets  # among all cells by owner
        place = np.searchsorted(self._before, along, side="right") - 1
        cells = along - self._before[place] + self.starts[self._by_owner[place]]
        return self.source.positions(cells)

    def place(self, positions: Int64s) -> tuple[Int64s, Int64s]:
        cells = self.source.cells(positions)
        if not len(self.starts):
            return np.full_like(cells, -1), cells
        interval = np.searchsorted(self.starts, cells, side="right") - 1
        offsets = self._offset[interval] + cells - self.starts[interval]
        return np.where(cells < 0, -1, self.owners[interval]), offsets

    def resized(self, shards: int, weights: Sequence[float] | None) -> tuple[Intervals, int]:
        """The same cells over other shards, and how many cells change owner: as few as can be.

        Shards with more than their new share give up the end of their list; shards with less take from what
        was given up, from left to right.
        """
        kept = np.zeros(max(shards, self.shards), np.int64)
        kept[: self.shards] = self.sizes
        goal = share_out(self.source.count, shards, weights, favoured=kept[:shards])
        short = goal - np.minimum(goal, kept[:shards])
        surplus = kept.copy()
        surplus[:shards] -= np.minimum(goal, kept[:shards])
        starts, owners, freed = self._cut(surplus)
        moved = int(short.sum())
        ends = np.append(starts[1:], self.source.count)
        # The freed cells, left to right, are one line again; the new owners cut it contiguously.
        lengths = np.where(freed, ends - starts, 0)
        before = np.cumsum(lengths) - lengths  # freed cells left of each interval
        borders = np.cumsum(short) - short
        takers = np.flatnonzero(short > 0)
        borders = borders[takers]
        inner = np.searchsorted(before[freed], borders, side="right") - 1 if moved else np.zeros(0, np.int64)
        at = starts[freed][inner] + borders - before[freed][inner]  # where a new owner's cells begin
        all_starts = np.union1d(starts, at)
        origin = np.searchsorted(starts, all_starts, side="right") - 1
        along = before[origin] + all_starts - starts[origin]
        taker = takers[np.searchsorted(borders, along, side="right") - 1] if moved else owners[origin]
        merged = np.where(freed[origin], taker, owners[origin])
        first = np.concatenate([np.ones(min(1, len(merged)), bool), merged[1:] != merged[:-1]])
        return Intervals(self.source, shards, all_starts[first], merged[first]), moved

    def _cut(self, surplus: Int64s) -> tuple[Int64s, Int64s, np.ndarray[tuple[int], np.dtype[np.bool_]]]:
        """Intervals cut where each shard's last ``surplus[shard]`` cells begin: starts, owners, which are surplus."""
        keep = (self.sizes - surplus[: self.shards])[self.owners]  # [intervals], cells its owner keeps
        lengths = np.diff(np.append(self.starts, self.source.count))
        held = np.clip(keep - self._offset, 0, lengths)  # kept cells of each interval, at its left
        parts = np.stack([self.starts, self.starts + held], axis=1).ravel()
        full = np.stack([held, lengths - held], axis=1).ravel() > 0
        freed = np.tile(np.array([False, True]), len(self.starts))
        return parts[full], np.repeat(self.owners, 2)[full], freed[full]
