"""Two bytes a value: IEEE half precision, and bfloat16 with float32's range. Sums are made in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hvdscale.sync.wire.codec import Bytes
from hvdscale.update.outer import Float32s, blocks

__all__ = ["BrainHalf", "Half"]

_LARGEST = float(np.finfo(np.float16).max)
_MAGNITUDE = np.uint32(0x7FFFFFFF)  # all bits but the sign
_LARGEST_BRAIN_HALF = np.uint32(0x7F7FFFFF)


@dataclass(frozen=True)
class Half:
    """float16. Larger values than it holds are sent as its largest; error feedback sends the rest."""

    @property
    def way(self) -> Literal["scatter"]:
        return "scatter"

    @property
    def unit(self) -> int:
        return 1

    def size(self, n: int) -> int:
        return 2 * n

    def encode(self, values: Float32s) -> Bytes:
        return np.clip(values, -_LARGEST, _LARGEST).astype(np.float16).view(np.uint8)

    def decode(self, data: Bytes, out: Float32s) -> None:
        out[:] = data.view(np.float16)


@dataclass(frozen=True)
class BrainHalf:
    """bfloat16, rounded to nearest, ties to even."""

    @property
    def way(self) -> Literal["scatter"]:
        return "scatter"

    @property
    def unit(self) -> int:
        return 1

    def size(self, n: int) -> int:
        return 2 * n

    def encode(self, values: Float32s) -> Bytes:
        codes = np.empty(values.size, np.uint16)
        for block in blocks(values.size):
            bits = values[block].view(np.uint32)
            even = (bits >> np.uint32(16)) & np.uint32(1)
            # Values beyond bfloat16's largest would round up to infinity: they stay one step below.
            rounded = np.minimum((bits & _MAGNITUDE) + np.uint32(0x7FFF) + even, _LARGEST_BRAIN_HALF)
            codes[block] = (rounded | (bits & ~_MAGNITUDE)) >> np.uint32(16)
        return codes.view(np.uint8)

    def decode(self, data: Bytes, out: Float32s) -> None:
        out.view(np.uint32)[:] = data.view(np.uint16).astype(np.uint32) << np.uint32(16)
