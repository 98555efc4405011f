"""Epochs that were left before their end, and what of them had been read by then."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.data.types import Int64s, Share
from hvdscale.errors import StateError

__all__ = ["Interruption", "Leg"]


@dataclass(frozen=True)
class Leg:
    """One stretch of an epoch, read by one set of shards from its start, or from the last interruption, on.

    Attributes:
        shares: the first shards and weights of the plan then, and those of each resize since.
        delivered: samples each shard had read when the stretch ended.
    """

    shares: tuple[Share, ...]
    delivered: tuple[int, ...]

    def within(self, sizes: Int64s, epoch: int) -> Int64s:
        """``delivered``, where shards held ``sizes``, both int64[shards].

        Raises:
            StateError: a shard has read more than it held.
        """
        for shard, (count, size) in enumerate(zip(self.delivered, sizes.tolist(), strict=True)):
            if count > size:
                raise StateError(
                    f"A shard delivers at most its own samples; in epoch {epoch} shard {shard} of an earlier run held "
                    f"{size}, and the state says {count} were delivered. It is damaged: take the one saved before."
                )
        return np.array(self.delivered, np.int64)


@dataclass(frozen=True)
class Interruption:
    """An epoch that goes on after one or several legs.

    Attributes:
        epoch: its number.
        legs: in the order in which they were read.
        certificate: the sum of what all legs read; ``None`` where a rank no longer knew its part.
    """

    epoch: int
    legs: tuple[Leg, ...]
    certificate: int | None
