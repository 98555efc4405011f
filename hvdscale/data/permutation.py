"""A pseudo-random permutation of ``0 .. n - 1`` in O(1) memory, both ways, for any ``n``.

A generalised Feistel network (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002): a cell of a grid
of ``rows`` x ``columns`` is moved along its row by an amount hashed from the row, then along its column by an amount
hashed from the column, and so on. The grid has fewer than one row of cells more than ``n``; a cell that comes out
beyond ``n`` is sent through again until it comes out within. Rows and columns fit in half a word, so that an
amount is a product of two halves and a round needs no division.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from hvdscale.data.hashing import derive_words
from hvdscale.data.types import Int64s

__all__ = ["Permutation"]

_Words = npt.NDArray[np.unsignedinteger[Any]]

_ROUNDS = 8
_ROUNDS_OF_SMALL = 32  # with few rows and columns a round has few outcomes
_SMALL = 1 << 12
_BLOCK = 1 << 14  # cells at a time: the work space stays in the cache


class _Size(NamedTuple):
    """Words to compute in, and the constants of a mix of such words."""

    dtype: type[np.unsignedinteger[Any]]
    half_bits: int
    shifts: tuple[int, int]
    factors: tuple[int, int]


# Chris Wellons's "lowbias32" (2018), found by search for the least avalanche bias.
_NARROW = _Size(np.uint32, 16, (16, 15), (0x7FEB352D, 0x846CA68B))
# Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
_WIDE = _Size(np.uint64, 32, (30, 27), (0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Permutation:
    """The permutation named by ``facts`` (such as a stream, a seed and an epoch). ``n`` is at most 2**62."""

    n: int
    facts: tuple[object, ...]
    _size: _Size = field(init=False, repr=False, compare=False)
    _keys: _Words = field(init=False, repr=False, compare=False)  # [rounds, 2]
    _rows: int = field(init=False, repr=False, compare=False)
    _columns: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rounds = _ROUNDS if self.n > _SMALL else _ROUNDS_OF_SMALL
        words = [derive_words(8, "permutation", part, self.n, *self.facts) for part in range(rounds // 4)]
        size = _NARROW if self.n <= 2**31 else _WIDE
        columns = math.isqrt(max(self.n, 1) - 1) + 1  # the root, rounded up
        object.__setattr__(self, "_size", size)
        object.__setattr__(self, "_keys", np.concatenate(words).astype(size.dtype).reshape(rounds, 2))
        object.__setattr__(self, "_columns", columns)
        object.__setattr__(self, "_rows", max(1, -(-self.n // columns)))

    def __call__(self, positions: Int64s) -> Int64s:
        """The sample at each position: int64, in the shape of ``positions``."""
        return self._in_blocks(positions, self._forward)

    def inverse(self, samples: Int64s) -> Int64s:
        """The position of each sample: int64, in the shape of ``samples``."""
        return self._in_blocks(samples, self._backward)

    def _in_blocks(self, cells: Int64s, turn: Callable[[_Block], None]) -> Int64s:
        flat = np.ravel(cells)
        out = np.empty(flat.size, np.int64)
        full = _Block(min(_BLOCK, flat.size), self._size, self._columns)
        for start in range(0, flat.size, _BLOCK):
            self._once(flat[start : start + _BLOCK], out[start : start + _BLOCK], full, turn)
        while (beyond := np.flatnonzero(out >= self.n)).size:
            again = np.empty(beyond.size, np.int64)
            self._once(out[beyond], again, full, turn)
            out[beyond] = again
        return out.reshape(np.shape(cells))

    def _once(self, cells: Int64s, out: Int64s, full: _Block, turn: Callable[[_Block], None]) -> None:
        block = full if len(cells) == full.length else _Block(len(cells), self._size, self._columns)
        block.load(cells)
        turn(block)
        block.store(out)

    def _forward(self, block: _Block) -> None:
        for i, keys in enumerate(self._keys):
            if i % 2 == 0:
                block.forward(block.column, block.row, self._columns, keys)
            else:
                block.forward(block.row, block.column, self._rows, keys)

    def _backward(self, block: _Block) -> None:
        for i in reversed(range(len(self._keys))):
            if i % 2 == 0:
                block.backward(block.column, block.row, self._columns, self._keys[i])
            else:
                block.backward(block.row, block.column, self._rows, self._keys[i])


class _Block:
    """Cells as rows and columns, and the space in which a round is computed, used again and again."""

    def __init__(self, length: int, size: _Size, columns: int) -> None:
        self.length, self._size, self._columns = length, size, size.dtype(columns)
        self.row, self.column, self._hash, self._spare = (np.empty(length, size.dtype) for _ in range(4))

    def load(self, cells: Int64s) -> None:
        np.copyto(self.column, cells, casting="unsafe")
        np.floor_divide(self.column, self._columns, out=self.row)
        np.multiply(self.row, self._columns, out=self._spare)
        np.subtract(self.column, self._spare, out=self.column)

    def store(self, cells: Int64s) -> None:
        np.multiply(self.row, self._columns, out=self._hash)
        np.add(self._hash, self.column, out=self._hash)
        np.copyto(cells, self._hash, casting="unsafe")

    def forward(self, place: _Words, line: _Words, length: int, keys: _Words) -> None:
        """Move each ``place`` along its ``line`` of ``length`` cells, around the end."""
        np.add(place, self._amount(line, length, keys), out=place)
        np.subtract(place, self._size.dtype(length), out=self._spare)  # wraps to a large number where it is not due
        np.minimum(place, self._spare, out=place)

    def backward(self, place: _Words, line: _Words, length: int, keys: _Words) -> None:
        np.subtract(place, self._amount(line, length, keys), out=place)
        np.add(place, self._size.dtype(length), out=self._spare)
        np.minimum(place, self._spare, out=place)

    def _amount(self, line: _Words, length: int, keys: _Words) -> _Words:
        """How far to move each line, 0 .. length - 1: the upper half of a mix of its number, scaled."""
        word, half = self._size.dtype, self._size.dtype(self._size.half_bits)
        x, t = self._hash, self._spare
        np.bitwise_xor(line, keys[0], out=x)
        np.right_shift(x, word(self._size.shifts[0]), out=t)
        np.bitwise_xor(x, t, out=x)
        np.multiply(x, word(self._size.factors[0]), out=x)
        np.right_shift(x, word(self._size.shifts[1]), out=t)
        np.bitwise_xor(x, t, out=x)
        np.bitwise_xor(x, keys[1], out=x)
        np.multiply(x, word(self._size.factors[1]), out=x)
        np.right_shift(x, half, out=x)
        np.multiply(x, word(length), out=x)
        return np.right_shift(x, half, out=x)
