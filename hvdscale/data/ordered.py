"""Ordered: each shard reads one contiguous interval of the source, front to back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.data.types import Int64s

__all__ = ["Ordered"]


@dataclass(frozen=True)
class Ordered:
    """``n`` samples in ``shards`` intervals; the first ``n % shards`` of them hold one sample more."""

    n: int
    shards: int

    def size(self, shard: int, epoch: int) -> int:
        return self._start(shard + 1) - self._start(shard)

    def indices(self, shard: int, epoch: int) -> Int64s:
        return np.arange(self._start(shard), self._start(shard + 1), dtype=np.int64)

    def owner(self, samples: Int64s, epoch: int) -> Int64s:
        short, longer = divmod(self.n, self.shards)
        border = longer * (short + 1)  # the first sample of the shorter intervals
        in_longer = samples // (short + 1)
        in_shorter = longer + (samples - border) // max(short, 1)
        return np.where(samples < border, in_longer, in_shorter)

    def _start(self, shard: int) -> int:
        short, longer = divmod(self.n, self.shards)
        return shard * short + min(shard, longer)
