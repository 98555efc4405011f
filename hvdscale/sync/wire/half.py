"""Two bytes a value: IEEE half precision, and bfloat16 with float32's range. Sums are made in float32."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.sync.wire.blockwise import Blockwise
from hvdscale.sync.wire.codec import Bytes
from hvdscale.update.outer import Float32s

__all__ = ["BrainHalf", "Half"]

_LARGEST = np.float32(np.finfo(np.float16).max)
_LARGEST_BRAIN_HALF = np.array(0x7F7F0000, np.uint32).view(np.float32)[()]
_LOW_BITS = np.uint32(16)  # those of a float32 that bfloat16 lacks


class _TwoBytes(Blockwise):
    @property
    def unit(self) -> int:
        return 1

    def size(self, n: int) -> int:
        return 2 * n


@dataclass(frozen=True)
class Half(_TwoBytes):
    """float16. Larger values than it holds are sent as its largest; error feedback sends the rest."""

    def _write(self, values: Float32s, data: Bytes, block: slice) -> None:
        data.view(np.float16)[block] = np.clip(values, -_LARGEST, _LARGEST)

    def _read(self, data: Bytes, block: slice, out: Float32s) -> None:
        out[:] = data.view(np.float16)[block]


@dataclass(frozen=True)
class BrainHalf(_TwoBytes):
    """bfloat16, rounded to nearest, ties to even. Larger values than it holds are sent as its largest."""

    def _write(self, values: Float32s, data: Bytes, block: slice) -> None:
        bits = np.clip(values, -_LARGEST_BRAIN_HALF, _LARGEST_BRAIN_HALF).view(np.uint32)
        odd = bits >> _LOW_BITS
        odd &= np.uint32(1)
        bits += odd
        bits += np.uint32(0x7FFF)
        bits >>= _LOW_BITS
        data.view(np.uint16)[block] = bits

    def _read(self, data: Bytes, block: slice, out: Float32s) -> None:
        bits = out.view(np.uint32)
        bits[:] = data.view(np.uint16)[block]
        bits <<= _LOW_BITS
