"""Random: a new permutation each epoch, dealt out to the shards like cards.

Shard ``r`` of ``k`` reads positions ``r, r + k, r + 2k, ...`` of the shuffled order. So step ``s`` of ``k`` ranks
with batches of ``B`` covers positions ``s * k * B .. (s + 1) * k * B``: the same samples for every number of ranks
with the same ``k * B``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.data.permutation import Permutation
from hvdscale.data.types import Int64s

__all__ = ["Shuffled"]


@dataclass(frozen=True)
class Shuffled:
    n: int
    shards: int
    seed: int

    def size(self, shard: int, epoch: int) -> int:
        return (self.n - shard + self.shards - 1) // self.shards

    def indices(self, shard: int, epoch: int) -> Int64s:
        return self._order(epoch)(np.arange(shard, self.n, self.shards, dtype=np.int64))

    def owner(self, samples: Int64s, epoch: int) -> Int64s:
        return self._order(epoch).inverse(samples) % self.shards

    def _order(self, epoch: int) -> Permutation:
        return Permutation(self.n, (self.seed, epoch))
