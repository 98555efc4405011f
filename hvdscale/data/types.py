"""Array types of this room, and the interface of a sharding policy."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Int64s", "Policy", "UInt64s"]

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]


class Policy(Protocol):
    """One way to give ``n`` samples to ``shards`` shards. For every epoch an exact partition.

    Arguments arrive checked: ``0 <= shard < shards``, ``epoch >= 0``, samples within ``0 .. n - 1``.
    """

    def size(self, shard: int, epoch: int) -> int:
        """Number of samples of ``shard``."""
        ...

    def indices(self, shard: int, epoch: int) -> Int64s:
        """The samples of ``shard`` in reading order: int64[size]."""
        ...

    def owner(self, samples: Int64s, epoch: int) -> npt.NDArray[np.integer[Any]]:
        """The shard of each sample, in the shape of ``samples``."""
        ...
