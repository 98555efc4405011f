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

    def take(self, kept: Float32s, more: Float32s | None, out: Bytes) -> None:
        if more is not None:
            kept += more
        count = self._count(kept.size)
        places = np.sort(np.argpartition(np.abs(kept), kept.size - count)[kept.size - count :])
        out[: 4 * count].view(np.uint32)[:] = places
        out[4 * count :].view(np.float32)[:] = kept[places]
        kept[places] = 0

    def decode(self, data: Bytes, out: Float32s) -> None:
        out[:] = 0
        self.add(data, np.float32(1), out)

    def add(self, data: Bytes, share: np.float32, out: Float32s) -> None:
        places, values = np.split(data, 2)
        out[places.view(np.uint32)] += share * values.view(np.float32)  # no place comes twice

    def _count(self, n: int) -> int:
        return min(n, max(1, round(n * self.fraction)))
