"""Hash: a sample belongs to the shard its key hashes to, in every epoch and whatever else is in the data.

Samples with equal keys share a shard. Shards are equal in expectation, not exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hvdscale.data.hashing import hash_integers, scale
from hvdscale.data.types import Int64s, UInt64s

__all__ = ["Hashed"]

_BLOCK = 1 << 14  # samples at a time: temporaries stay in the cache


@dataclass(frozen=True)
class Hashed:
    """``hashes[n]`` are those of the samples' keys; ``None``: the key is the index."""

    n: int
    shards: int
    salt: np.uint64
    hashes: UInt64s | None = field(repr=False, compare=False)

    def size(self, shard: int, epoch: int) -> int:
        return sum(int(np.count_nonzero(self._owner(block) == shard)) for block in self._blocks())

    def indices(self, shard: int, epoch: int) -> Int64s:
        mine = [block[self._owner(block) == shard] for block in self._blocks()]
        return np.concatenate([np.zeros(0, np.int64), *mine])

    def owner(self, samples: Int64s, epoch: int) -> Int64s:
        return self._owner(samples)

    def _owner(self, samples: Int64s) -> Int64s:
        hashes = hash_integers(samples, self.salt) if self.hashes is None else self.hashes[samples]
        return scale(hashes, self.shards)

    def _blocks(self) -> list[Int64s]:
        return [np.arange(i, min(i + _BLOCK, self.n), dtype=np.int64) for i in range(0, self.n, _BLOCK)]
