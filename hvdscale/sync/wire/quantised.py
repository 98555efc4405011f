"""Small integers with one scale for each block of values: 8 or 4 bits.

Dettmers, Lewis, Shleifer and Zettlemoyer, "8-bit optimizers via block-wise quantization", arXiv 2110.02861, for
blocks; Douillard et al., "Streaming DiLoCo with overlapping communication", arXiv 2501.18512, for 4 bits of a
pseudo-gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvdscale.sync.wire.blockwise import Blockwise
from hvdscale.sync.wire.codec import Bytes
from hvdscale.update.outer import Float32s

__all__ = ["Quantised"]

Int8s = npt.NDArray[np.int8]

_ROW = 256  # values under one float32 scale: 0.125 bits more a value
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Quantised(Blockwise):
    """Integers in ``-top .. top`` times a float32 scale per 256 values, rounded to nearest; ``bits`` is 8 or 4."""

    bits: int

    @property
    def unit(self) -> int:
        return _ROW

    def size(self, n: int) -> int:
        return -(-n // _ROW) * (4 + self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return _ROW * self.bits // 8

    def _write(self, values: Float32s, data: Bytes, block: slice) -> None:
        scales, codes = self._rows(data, block)
        size = len(codes) * _ROW
        table = (values if values.size == size else np.pad(values, (0, size - values.size))).reshape(-1, _ROW)
        work = np.abs(table)
        np.maximum.reduce(work, axis=1, keepdims=True, out=scales)
        scales /= np.float32(2 ** (self.bits - 1) - 1)
        # A scale too small for its inverse belongs to values too small to matter.
        inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > _TINY)
        np.multiply(table, inverse, out=work)
        np.rint(work, out=work)
        if self.bits == 8:
            np.copyto(codes.view(np.int8), work, casting="unsafe")
        else:
            _pack(work.astype(np.int8).view(np.uint8), codes)

    def _read(self, data: Bytes, block: slice, out: Float32s) -> None:
        scales, codes = self._rows(data, block)
        whole = out.size == len(codes) * _ROW
        table = out.reshape(-1, _ROW) if whole else np.empty((len(codes), _ROW), np.float32)
        if self.bits == 8:
            table[:] = codes.view(np.int8)
        else:
            _unpack(codes, table)
        table *= scales
        if not whole:
            out[:] = table.reshape(-1)[: out.size]

    def _rows(self, data: Bytes, block: slice) -> tuple[Float32s, Bytes]:
        """Views of the scales, float32[rows, 1], and of the integers, uint8[rows, m], of the values at ``block``."""
        count = data.size // (4 + self._row_bytes)
        rows = slice(block.start // _ROW, -(-block.stop // _ROW))
        scales = data[: 4 * count].view(np.float32).reshape(count, 1)
        return scales[rows], data[4 * count :].reshape(count, -1)[rows]


def _pack(nibbles: Bytes, codes: Bytes) -> None:
    """Two 4-bit integers a byte: those of the row's first half low, of its second half high."""
    half = _ROW // 2
    np.left_shift(nibbles[:, half:], np.uint8(4), out=codes)
    codes |= nibbles[:, :half] & np.uint8(15)


def _unpack(codes: Bytes, table: Float32s) -> None:
    half = _ROW // 2
    low: Int8s = (codes << np.uint8(4)).view(np.int8)
    low >>= np.int8(4)  # the shift back brings the sign along
    table[:, :half] = low
    table[:, half:] = codes.view(np.int8) >> np.int8(4)
