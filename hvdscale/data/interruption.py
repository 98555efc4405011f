"""Epochs that were left before their end, and what of them had been read by then."""

from __future__ import annotations

from dataclasses import dataclass

from hvdscale.data.types import Share

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
