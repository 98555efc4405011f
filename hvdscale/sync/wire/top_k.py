"""Only the largest values, with their places; error feedback keeps the others until they matter.

Stich, Cordonnier and Jaggi, "Sparsified SGD with memory", arXiv 1809.07599.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hvdscale.sync.wire.codec import Bytes
from hvdscale.update.outer import Float32s

__all__ = ["TopK"]


@dataclass(frozen=True)
class TopK:
    """The ``fraction`` of values that are largest in magnitude: 8 bytes each, at least one."""

    fraction: float

    @property
    def way(self) -> Literal["gather"]:
        return "gather"

    @property
    def unit(self) -> int:
        return 1

    def size(self, n: int) -> int:
        return 8 * self._count(n)

    def encode(self, values: Float32s) -> Bytes:
        count = self._count(values.size)
        places = np.sort(np.argpartition(np.abs(values), values.size - count)[values.size - count :])
        return np.concatenate([places.astype(np.uint32).view(np.uint8), values[places].view(np.uint8)])

    def decode(self, data: Bytes, out: Float32s) -> None:
        places, values = np.split(data, 2)
        out[:] = 0
        out[places.view(np.uint32)] = values.view(np.float32)

    def _count(self, n: int) -> int:
        return min(n, max(1, round(n * self.fraction)))
