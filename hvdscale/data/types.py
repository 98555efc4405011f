"""Array types of this room, and the interface of an epoch's reading."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

__all__ = ["BLOCK", "Int64s", "Keys", "PolicyName", "Reading", "Share", "Table", "TailName", "UInt64s"]

Int64s = npt.NDArray[np.int64]
UInt64s = npt.NDArray[np.uint64]
Keys: TypeAlias = "Sequence[Any] | npt.NDArray[Any]"
PolicyName = Literal["ordered", "random", "hash"]
TailName = Literal["exact", "pad", "drop"]
Table = npt.NDArray[np.uint16]  # the shard of each of the 65536 units of the hash
Share: TypeAlias = "tuple[int, tuple[float, ...] | None]"  # shards and their weights

BLOCK = 1 << 16  # samples in a block of a lazy reading


class Reading(Protocol):
    """What each shard reads in one epoch, in which order. Shards share no sample."""

    @property
    def sizes(self) -> Int64s:
        """Samples of each shard: int64[shards]."""
        ...

    def blocks(self, shard: int, start: int = 0, block: int = BLOCK) -> Iterator[Int64s]:
        """The samples of ``shard`` in reading order from its ``start``-th on, at most ``block`` at a time."""
        ...

    def owner(self, samples: Int64s) -> Int64s:
        """The shard of each sample, in the shape of ``samples``; -1 for samples that were read before."""
        ...

    def after(self, delivered: Int64s, shares: tuple[Share, ...]) -> Reading:
        """The rest, once each shard has read its first ``delivered[shard]`` samples, for a plan with ``shares``.

        With the same ``shares`` as before each shard keeps its own rest.
        """
        ...
