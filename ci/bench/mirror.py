"""A channel whose other ranks say what this one says: for costs on one rank, without the cost of its peers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdscale.runtime.channel import Bytes, Channel, Float32s, Float64s

__all__ = ["Mirror"]


class Mirror:
    """Rank 0 of ``size``. What it receives takes the memory that it would."""

    concurrent = True
    rank = 0

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.ranks = tuple(range(size))
        self.sent_bytes = 0

    def table(self, row: Float64s) -> Float64s:
        return np.tile(row, (self.size, 1))

    def allreduce(self, values: Float32s) -> None:
        """The sum is the network's work: ``values`` stay."""

    def alltoall(self, rows: Bytes) -> Bytes:
        return rows.copy()

    def allgather(self, data: Bytes) -> Bytes:
        return np.tile(data, (self.size, 1))

    def swap(self, data: Bytes, to: int, source: int) -> Bytes:
        return data.copy()

    def split(self, groups: Sequence[Sequence[int]], patient: bool = False) -> Channel | None:
        mine = next((group for group in groups if self.rank in group), None)
        return None if mine is None else Mirror(len(mine))

    def host(self) -> float:
        return 0.0
