"""How far a reader had come, and whether what its state says of that can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hvdscale.data.batch import steps_of
from hvdscale.data.types import Int64s, TailName
from hvdscale.errors import StateError

__all__ = ["Position"]


@dataclass(frozen=True)
class Position:
    """How far one reader had come: ``delivered`` samples, in ``step`` batches, of ``epoch``."""

    shard: int
    batch_size: int
    epoch: int
    step: int
    delivered: int
    sums: Mapping[int, int]

    def check(self, sizes: Int64s, tail: TailName) -> None:
        """Raises StateError where its numbers contradict one another, or ``sizes``, of all shards: int64[shards]."""
        size, steps = int(sizes[self.shard]), int(steps_of(sizes, self.batch_size, tail)[self.shard])
        holds = f"shard {self.shard} holds {size} samples in epoch {self.epoch}"
        if self.step > steps:
            raise StateError(
                f"A shard delivers at most its own batches; {holds}, which are {steps} batches of {self.batch_size} "
                f"under tail {tail!r}, and its state says {self.step} were delivered."
            )
        expected = min(self.step * self.batch_size, size)
        if self.delivered != expected:
            raise StateError(
                f"A state's numbers belong together; {holds}, of which {self.step} batches of {self.batch_size} are "
                f"{expected}, and its state says {self.delivered} were delivered. Take the state saved before."
            )
