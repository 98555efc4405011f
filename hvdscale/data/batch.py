"""One batch of sample numbers, and how lists of samples become batches under each tail."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvdscale.data.types import Int64s, TailName

__all__ = ["Batch", "rebatch", "steps_of"]


@dataclass(frozen=True, eq=False)
class Batch:
    """What one rank reads in one step.

    Attributes:
        indices: sample numbers, int64[batch]. Under tail ``"pad"`` those from ``count`` on only fill the batch.
        count: how many of them, from the front, are this shard's samples: the weight of the batch in an average.
        epoch: the epoch it belongs to.
        step: batches this reader gave in the epoch before it.
        last: whether the reader's epoch ends with it.
    """

    indices: Int64s
    count: int
    epoch: int
    step: int
    last: bool

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """Which of ``indices`` are samples to learn from or to evaluate: bool[batch]."""
        return np.arange(len(self.indices)) < self.count


def rebatch(blocks: Iterable[Int64s], batch_size: int) -> Iterator[Int64s]:
    """The same samples ``batch_size`` at a time; the last batch may be smaller, none is empty."""
    held: list[Int64s] = []
    count = 0
    for block in blocks:
        held.append(block)
        count += len(block)
        if count < batch_size:
            continue
        whole = held[0] if len(held) == 1 else np.concatenate(held)
        full = count // batch_size * batch_size
        for start in range(0, full, batch_size):
            yield whole[start : start + batch_size]
        held, count = [whole[full:]], count - full
    if count:
        yield np.concatenate(held)


def steps_of(sizes: Int64s, batch_size: int, tail: TailName) -> Int64s:
    """Batches of each shard in an epoch: int64[shards].

    ``"exact"``: as many as its samples need. ``"pad"``: as many as the largest shard needs.
    ``"drop"``: as many as the smallest shard can fill.
    """
    if tail == "drop":
        return np.full_like(sizes, sizes.min() // batch_size)
    needed = -(-sizes // batch_size)
    return needed if tail == "exact" else np.full_like(sizes, needed.max())
