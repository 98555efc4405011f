"""Small integers with one scale for each block of values: 8 or 4 bits.

Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit optimizers via block-wise quantization", arXiv 2110.02861, for
blocks; Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512, for 4 bits of a
pseudo-gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hvdscale.sync.wire.codec import Bytes
from hvdscale.update.outer import Float32s

__all__ = ["Quantised"]

_BLOCK = 256  # values under one float32 scale: 0.125 bits more a value
_ROWS = 128  # blocks worked on at a time, so that temporaries stay in the cache


@dataclass(frozen=True)
class Quantised:
    """Integers in ``-top .. top`` times a float32 scale per 256 values, rounded to nearest; ``bits`` is 8 or 4."""

    bits: int

    @property
    def way(self) -> Literal["scatter"]:
        return "scatter"

    @property
    def unit(self) -> int:
        return _BLOCK

    def size(self, n: int) -> int:
        blocks = -(-n // _BLOCK)
        return blocks * (4 + _BLOCK * self.bits // 8)

    def encode(self, values: Float32s) -> Bytes:
        count = -(-values.size // _BLOCK)
        if values.size < count * _BLOCK:
            values = np.concatenate([values, np.zeros(count * _BLOCK - values.size, np.float32)])
        table = values.reshape(count, _BLOCK)
        top = np.float32(2 ** (self.bits - 1) - 1)
        scales = np.empty((count, 1), np.float32)
        codes = np.empty((count, _BLOCK * self.bits // 8), np.uint8)
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            block = table[rows]
            scale = np.maximum(block.max(axis=1, keepdims=True), -block.min(axis=1, keepdims=True)) / top
            scales[rows] = scale
            # A scale too small for its inverse belongs to values too small to matter.
            inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > np.finfo(np.float32).tiny)
            scaled = np.rint(block * inverse).astype(np.int8)
            codes[rows] = _pack(scaled.view(np.uint8)) if self.bits == 4 else scaled.view(np.uint8)
        return np.concatenate([scales.view(np.uint8).ravel(), codes.ravel()])

    def decode(self, data: Bytes, out: Float32s) -> None:
        count = -(-out.size // _BLOCK)
        scales = data[: 4 * count].view(np.float32).reshape(count, 1)
        codes = data[4 * count :].reshape(count, -1)
        whole = out.size // _BLOCK
        table = out[: whole * _BLOCK].reshape(whole, _BLOCK)
        for start in range(0, whole, _ROWS):
            rows = slice(start, min(start + _ROWS, whole))
            np.multiply(self._integers(codes[rows]), scales[rows], out=table[rows])
        if whole < count:
            out[whole * _BLOCK :] = (self._integers(codes[whole:]) * scales[whole:])[0, : out.size - whole * _BLOCK]

    def _integers(self, codes: Bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
        return _unpack(codes) if self.bits == 4 else codes.view(np.int8)


def _pack(nibbles: Bytes) -> Bytes:
    """Two 4-bit integers a byte: those of the block's first half low, of its second half high."""
    half = nibbles.shape[1] // 2
    return (nibbles[:, :half] & np.uint8(15)) | (nibbles[:, half:] << np.uint8(4))


def _unpack(codes: Bytes) -> np.ndarray[tuple[int, ...], np.dtype[np.int8]]:
    low = (codes << np.uint8(4)).view(np.int8) >> np.int8(4)  # the shift back brings the sign along
    high = codes.view(np.int8) >> np.int8(4)
    return np.concatenate([low, high], axis=1)
