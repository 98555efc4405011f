"""Best-fit decreasing: pieces into as few bins as can be, each piece whole.

Ding et al., "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830), pack documents this way, with a
tree over the room left in bins. Here pieces of one length, and bins with the same room, are placed together:
10**6 documents have at most some thousand different lengths, so most work is done a run at a time.
"""

from __future__ import annotations

import numpy as np

from hvdscale.data.types import Int64s

__all__ = ["best_fit"]


def best_fit(lengths: Int64s, room: int) -> Int64s:
    """The bin of each piece: int64[n], bins numbered from 0 in the order in which they are opened.

    The longest piece goes first, each into the fullest bin that still takes it. ``lengths`` lie in ``1 .. room``.
    """
    order = np.argsort(-lengths, kind="stable")
    distinct, counts = np.unique(lengths, return_counts=True)
    bins = _Bins(room)
    for length, count in zip(distinct[::-1].tolist(), counts[::-1].tolist(), strict=True):
        bins.place(length, count)
    owner = np.empty(lengths.size, np.int64)
    owner[order] = bins.owners()
    return owner


class _Bins:
    """Open bins by the room left in them, as runs ``(first, stop)`` of bin numbers with the same room."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._runs: dict[int, list[tuple[int, int]]] = {}
        self._rooms = 0  # bit r is set when some bin has room r: the fullest that fits is one shift away
        self._opened = 0
        self._placed: list[tuple[int, int, int]] = []  # (first bin, bins, pieces in each), in the order of pieces

    def place(self, length: int, count: int) -> None:
        """``count`` pieces of one length. A bin once chosen stays the fullest until it takes no more of them."""
        while count:
            room, first, stop = self._take(length, count)
            each = room // length
            filled = min(stop - first, count // each)
            self._put(first, first + filled, each, room - each * length)
            count -= filled * each
            first += filled
            if first < stop and 0 < count < each:
                self._put(first, first + 1, count, room - count * length)
                count, first = 0, first + 1
            self._leave(first, stop, room)

    def owners(self) -> Int64s:
        """The bin of every piece placed: int64[pieces]."""
        if not self._placed:
            return np.zeros(0, np.int64)
        first, bins, each = np.array(self._placed, np.int64).T
        run = np.repeat(np.arange(len(bins)), bins * each)  # [pieces]
        start = np.cumsum(bins * each) - bins * each
        owners: Int64s = first[run] + (np.arange(len(run)) - start[run]) // each[run]
        return owners

    def _take(self, length: int, count: int) -> tuple[int, int, int]:
        """Of the bins that take ``length``, a run of the fullest; new bins if there is none."""
        fitting = self._rooms >> length
        if not fitting:
            needed = -(-count // (self._room // length))
            self._opened += needed
            return self._room, self._opened - needed, self._opened
        room = length + (fitting & -fitting).bit_length() - 1
        runs = self._runs[room]
        first, stop = runs.pop()
        if not runs:
            self._rooms ^= 1 << room
        return room, first, stop

    def _put(self, first: int, stop: int, each: int, room: int) -> None:
        if first < stop:
            self._placed.append((first, stop - first, each))
            self._leave(first, stop, room)

    def _leave(self, first: int, stop: int, room: int) -> None:
        if first < stop and room:
            self._runs.setdefault(room, []).append((first, stop))
            self._rooms |= 1 << room
