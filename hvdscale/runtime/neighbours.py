"""Adding up lists of arrays over the ranks of one host, in memory they share.

Every rank writes its arrays into a row of its own, tells the others with one small message, and adds up the rows
itself, in the order of ranks: the same bits everywhere, one copy, no negotiation. There are two sets of rows. A rank
that has heard of everybody's second list knows that they are done with the first, and may write there again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.errors import DesyncError, TransportError
from hvdscale.runtime.shared_memory import shared_rows
from hvdscale.runtime.transport import MPITransport

__all__ = ["FEW_RANKS", "Neighbours", "meet_neighbours", "packed_bytes"]

Array = npt.NDArray[Any]
Finish = Callable[[Sequence[Array]], None]

FEW_RANKS = 8
"""Everybody reads what everybody wrote: with more ranks, a ring reads less."""

_ALIGNED_BYTES = 64
_ROOM_LIMIT_BYTES = 256 << 20  # beyond it the memory is better used otherwise; every rank holds twice as much


def packed_bytes(sizes: Iterable[tuple[int, int]]) -> int:
    """The room for arrays of so many elements of so many bytes each."""
    return sum(-(-count * item // _ALIGNED_BYTES) * _ALIGNED_BYTES for count, item in sizes)


def meet_neighbours(transport: MPITransport, room_bytes: int) -> Neighbours | None:
    """Neighbours that add up to ``room_bytes`` at a time; ``None`` where ranks share no memory. Collective."""
    if transport.size == 1 or room_bytes > _ROOM_LIMIT_BYTES:
        return None
    rows = shared_rows(transport, 2 * transport.size, room_bytes)
    return None if rows is None else Neighbours(transport.twin(), rows.reshape(2, transport.size, -1))


class Neighbours:
    """The ranks of one host and the rows they share: uint8[2, ranks, bytes]."""

    def __init__(self, transport: Any, rows: npt.NDArray[np.uint8]) -> None:
        self._transport = transport
        self._rows = rows
        self._started = 0
        self._waits: Callable[[], Any] | None = None
        self._views: tuple[Any, ...] = ()
        self._layout: tuple[Any, ...] | None = None
        self._word = 0

    def fit(self, sizes: Iterable[tuple[int, int]]) -> bool:
        """Whether there is room for arrays of so many elements of so many bytes each, all at once."""
        return packed_bytes(sizes) <= int(self._rows.shape[2])

    def start(self, arrays: Sequence[Array], before: float = 1.0, after: float = 1.0) -> Finish:
        """Begin to add up these arrays; the function returned waits, and writes the sums into the arrays it is given.

        ``before`` and ``after``: factors for each array and for the sum. Every rank starts the same lists in the same
        order, and finishes one before it starts the next.

        Raises:
            DesyncError: when waited for, and ranks started different lists.
            TransportError: when waited for, and a rank has left the job, or the next list was started before.
        """
        if self._waits is not None:  # begun and thrown away; peers may still read what came before it
            self._waits()
        self._started = number = self._started + 1
        rows = self._laid_out(arrays)[number % 2]
        for array, place in zip(arrays, rows[self._transport.rank], strict=True):
            if before == 1.0:
                np.copyto(place, array)
            else:
                np.multiply(array, before, out=place)
        self._waits = heard = self._transport.start_numbers(self._word)

        def finish(sums: Sequence[Array]) -> None:
            if number != self._started:
                raise TransportError(
                    f"List {number} of gradients in shared memory is waited for after list {self._started} was "
                    "started, which may be written over it. Finish each before the next."
                )
            self._waits = None
            self._compare(heard())
            for i, total in enumerate(sums):
                np.add(rows[0][i], rows[1][i], out=total)
                for row in rows[2:]:
                    np.add(total, row[i], out=total)
                if after != 1.0:
                    np.multiply(total, after, out=total)

        return finish

    def _laid_out(self, arrays: Sequence[Array]) -> tuple[Any, ...]:
        """views[turn][rank][i]: where array ``i`` lies."""
        layout = tuple((array.shape, array.dtype) for array in arrays)
        if layout == self._layout:
            return self._views
        starts = list(accumulate((packed_bytes([(a.size, a.itemsize)]) for a in arrays), initial=0))  # and the end
        self._views = tuple(
            tuple(
                tuple(
                    row[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
                    for start, array in zip(starts, arrays, strict=False)
                )
                for row in rows
            )
            for rows in self._rows
        )
        self._layout = layout
        text = repr([(shape, dtype.str) for shape, dtype in layout]).encode()
        self._word = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")
        return self._views

    def _compare(self, words: npt.NDArray[np.int64]) -> None:
        if (words == self._word).all():
            return
        alike: dict[int, list[int]] = {}
        for rank, word in zip(self._transport.ranks, words.tolist(), strict=True):
            alike.setdefault(word, []).append(rank)
        raise DesyncError(
            f"Ranks {' and '.join(map(str, alike.values()))} reduce different gradients: their number, shapes or "
            "dtypes differ. Freeze and unfreeze the same parameters on every rank."
        )
