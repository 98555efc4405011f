"""A pseudo-random permutation of ``0 .. n - 1`` in O(1) memory, both ways, for any ``n``.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): a cell of a grid
of ``rows`` x ``columns`` is moved along its row by an amount hashed from the row, then along its column by an amount
hashed from the column, and so on. The grid has at most one cell per row more than ``n``; a sample that comes out
beyond ``n`` is sent through again until it comes out within. Halves are 32 bits wide, so a round needs no division.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hvdscale.data.hashing import derive_words
from hvdscale.data.types import Int64s, UInt64s

__all__ = ["Permutation"]

UInt32s = npt.NDArray[np.uint32]

_ROUNDS = 8
_ROUNDS_OF_SMALL = 32  # a round on few rows and columns has few outcomes
_SMALL = 1 << 12
_BLOCK = 1 << 15  # cells at a time: the work space stays in the cache
_FIRST, _SECOND = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


@dataclass(frozen=True)
class Permutation:
    """The permutation named by ``facts`` (such as a stream, a seed and an epoch). ``n`` is below 2**62."""

    n: int
    facts: tuple[object, ...]
    _words: UInt64s = field(init=False, repr=False, compare=False)
    _rows: int = field(init=False, repr=False, compare=False)
    _columns: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rounds = _ROUNDS if self.n > _SMALL else _ROUNDS_OF_SMALL
        words = [derive_words(8, "permutation", part, self.n, *self.facts) for part in range(rounds // 8)]
        columns = math.isqrt(max(self.n, 1) - 1) + 1  # the root, rounded up
        object.__setattr__(self, "_words", np.concatenate(words))
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "_rows", max(1, -(-self.n // columns)))

    def __call__(self, positions: Int64s) -> Int64s:
        """The sample at each position: int64, in the shape of ``positions``."""
        return self._in_blocks(positions, self._forward)

    def inverse(self, samples: Int64s) -> Int64s:
        """The position of each sample: int64, in the shape of ``samples``."""
        return self._in_blocks(samples, self._backward)

    def _in_blocks(self, cells: Int64s, turn: Callable[[_Work], None]) -> Int64s:
        flat = np.ravel(cells)
        out = np.empty(flat.size, np.int64)
        full = _Work(min(_BLOCK, flat.size), self._columns)
        for start in range(0, flat.size, _BLOCK):
            block = flat[start : start + _BLOCK]
            work = full if len(block) == full.size else _Work(len(block), self._columns)
            out[start : start + _BLOCK] = self._once(block, work, turn)
        while (beyond := np.flatnonzero(out >= self.n)).size:
            out[beyond] = self._once(out[beyond], _Work(beyond.size, self._columns), turn)
        return out.reshape(np.shape(cells))

    def _once(self, cells: Int64s, work: _Work, turn: Callable[[_Work], None]) -> Int64s:
        work.load(cells)
        turn(work)
        return work.cells()

    def _forward(self, work: _Work) -> None:
        for i, word in enumerate(self._words):
            if i % 2 == 0:
                work.forward(work.column, work.row, self._columns, word)
            else:
                work.forward(work.row, work.column, self._rows, word)

    def _backward(self, work: _Work) -> None:
        for i, word in reversed(list(enumerate(self._words))):
            if i % 2 == 0:
                work.backward(work.column, work.row, self._columns, word)
            else:
                work.backward(work.row, work.column, self._rows, word)


class _Work:
    """A block of cells as rows and columns, and the space in which a round is computed, used again and again."""

    def __init__(self, size: int, columns: int) -> None:
        self.size, self._columns = size, np.uint64(columns)
        self.row, self.column = np.empty(size, np.uint32), np.empty(size, np.uint32)
        self._hash, self._shifted = np.empty(size, np.uint32), np.empty(size, np.uint32)
        self._wide, self._product = np.empty(size, np.uint64), np.empty(size, np.uint64)

    def load(self, cells: Int64s) -> None:
        wide, product = self._wide, self._product
        np.floor_divide(np.ascontiguousarray(cells).view(np.uint64), self._columns, out=wide)
        np.copyto(self.row, wide, casting="unsafe")
        np.multiply(wide, self._columns, out=product)
        np.subtract(cells.view(np.uint64), product, out=product)
        np.copyto(self.column, product, casting="unsafe")

    def cells(self) -> Int64s:
        """Row and column back in one: a view of the work space, until the next call."""
        np.copyto(self._wide, self.row)
        np.multiply(self._wide, self._columns, out=self._wide)
        np.add(self._wide, self.column, out=self._wide)
        return self._wide.view(np.int64)

    def forward(self, place: UInt32s, line: UInt32s, length: int, word: np.uint64) -> None:
        """Move each ``place`` along its ``line`` of ``length`` cells, around the end. Lengths are at most 2**31."""
        np.add(place, self._amount(line, length, word), out=place)
        np.subtract(place, np.uint32(length), out=self._shifted)  # wraps to a large number where there is no need
        np.minimum(place, self._shifted, out=place)

    def backward(self, place: UInt32s, line: UInt32s, length: int, word: np.uint64) -> None:
        np.subtract(place, self._amount(line, length, word), out=place)
        np.add(place, np.uint32(length), out=self._shifted)
        np.minimum(place, self._shifted, out=place)

    def _amount(self, line: UInt32s, length: int, word: np.uint64) -> UInt32s:
        """How far to move each line, 0 .. length - 1: a 32-bit mix of its number, scaled.

        The constants are Chris Wellons's "lowbias32" (2018), found by search for the least avalanche bias.
        """
        x, t = self._hash, self._shifted
        np.bitwise_xor(line, np.uint32(word & np.uint64(0xFFFFFFFF)), out=x)
        np.right_shift(x, np.uint32(16), out=t)
        np.bitwise_xor(x, t, out=x)
        np.multiply(x, _FIRST, out=x)
        np.right_shift(x, np.uint32(15), out=t)
        np.bitwise_xor(x, t, out=x)
        np.bitwise_xor(x, np.uint32(word >> np.uint64(32)), out=x)
        np.multiply(x, _SECOND, out=x)
        np.right_shift(x, np.uint32(16), out=t)
        np.bitwise_xor(x, t, out=x)
        np.copyto(self._wide, x)
        np.multiply(self._wide, np.uint64(length), out=self._wide)
        np.right_shift(self._wide, np.uint64(32), out=self._wide)
        np.copyto(x, self._wide, casting="unsafe")
        return x
