"""A pseudo-random permutation of ``0 .. n - 1`` in O(1) memory, both ways, for any ``n``.

A Feistel network over Z_a x Z_b (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002) needs
a * b = n, or walks cycles until it lands inside. Here the samples fill a grid of ``columns`` whose last row
may be short, and a round turns every row, then every column, by an amount hashed from its number: each by its
own length. That is a bijection of exactly ``n`` cells, so nothing is ever walked again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from hvdscale.data.hashing import derive_words, mix
from hvdscale.data.types import Int64s, UInt64s

__all__ = ["Permutation"]

_TURNS = 8  # of rows and columns in turn
_BLOCK = 1 << 14  # cells at a time: temporaries stay in the cache
_HALF = np.uint64(32)


@dataclass(frozen=True)
class Permutation:
    """The permutation named by ``facts`` (such as a stream, a seed and an epoch). ``n`` is below 2**62."""

    n: int
    facts: tuple[object, ...]
    _words: UInt64s = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_words", derive_words(_TURNS, "permutation", self.n, *self.facts))

    def __call__(self, positions: Int64s) -> Int64s:
        """The sample at each position: int64, in the shape of ``positions``."""
        return self._in_blocks(positions, self._forward)

    def inverse(self, samples: Int64s) -> Int64s:
        """The position of each sample: int64, in the shape of ``samples``."""
        return self._in_blocks(samples, self._backward)

    def _in_blocks(self, cells: Int64s, turn: Callable[[UInt64s], UInt64s]) -> Int64s:
        flat = np.ravel(cells)
        out = np.empty(flat.size, np.int64)
        for start in range(0, flat.size, _BLOCK):
            out[start : start + _BLOCK] = turn(flat[start : start + _BLOCK].astype(np.uint64))
        return out.reshape(np.shape(cells))

    def _forward(self, cells: UInt64s) -> UInt64s:
        grid = _Grid.of(self.n)
        row, column = np.divmod(cells, grid.columns)
        for i, word in enumerate(self._words):
            if i % 2 == 0:
                column = _turn(column, row, grid.width(row), word)
            else:
                row = _turn(row, column, grid.height(column), word)
        return row * grid.columns + column

    def _backward(self, cells: UInt64s) -> UInt64s:
        grid = _Grid.of(self.n)
        row, column = np.divmod(cells, grid.columns)
        for i, word in reversed(list(enumerate(self._words))):
            if i % 2 == 0:
                column = _turn_back(column, row, grid.width(row), word)
            else:
                row = _turn_back(row, column, grid.height(column), word)
        return row * grid.columns + column


@dataclass(frozen=True)
class _Grid:
    """``rows`` rows of ``columns`` cells, the last of ``last`` (1 .. columns) cells."""

    rows: np.uint64
    columns: np.uint64
    last: np.uint64

    @classmethod
    def of(cls, n: int) -> _Grid:
        columns = math.isqrt(max(n, 1) - 1) + 1  # the root, rounded up
        rows = max(1, -(-n // columns))
        return cls(np.uint64(rows), np.uint64(columns), np.uint64(max(1, n - (rows - 1) * columns)))

    def width(self, row: UInt64s) -> UInt64s:
        return np.where(row == self.rows - np.uint64(1), self.last, self.columns)

    def height(self, column: UInt64s) -> UInt64s:
        return self.rows - (column >= self.last)


def _amount(line: UInt64s, length: UInt64s, word: np.uint64) -> UInt64s:
    """How far to turn each line, 0 .. length - 1, from its number. Lengths are below 2**32."""
    return ((mix(line ^ word) >> _HALF) * length) >> _HALF


def _turn(place: UInt64s, line: UInt64s, length: UInt64s, word: np.uint64) -> UInt64s:
    moved = place + _amount(line, length, word)
    return np.where(moved >= length, moved - length, moved)


def _turn_back(place: UInt64s, line: UInt64s, length: UInt64s, word: np.uint64) -> UInt64s:
    amount = _amount(line, length, word)
    return np.where(place >= amount, place - amount, place + length - amount)
