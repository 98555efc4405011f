"""Reading by position: the ordered and the random policy.

``"ordered"``: position p is sample p, and each shard reads one contiguous interval, front to back.
``"random"``: an epoch's permutation gives the sample of each position, and positions are dealt to the shards like
cards. So step s of k ranks with batches of B covers positions ``s * k * B .. (s + 1) * k * B``: the same samples
for every number of ranks with the same ``k * B``. What is left of an interrupted epoch is dealt on in the same way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hvdscale.data.layouts import Cells, Concatenated, Dealt, EndToEnd, Interleaved, Intervals, Layout, Tails
from hvdscale.data.permutation import Permutation
from hvdscale.data.types import BLOCK, Int64s, Share

__all__ = ["Positional", "layout_of", "resized"]


@dataclass(frozen=True)
class Positional:
    """One epoch. ``shares`` is the plan ``layout`` was made for; ``order`` is ``None`` where position is sample."""

    layout: Layout
    shares: tuple[Share, ...]
    order: Permutation | None

    @cached_property
    def sizes(self) -> Int64s:
        return self.layout.sizes

    def blocks(self, shard: int, start: int = 0, block: int = BLOCK) -> Iterator[Int64s]:
        stop = int(self.sizes[shard])
        for first in range(start, stop, block):
            offsets = np.arange(first, min(first + block, stop), dtype=np.int64)
            positions = self.layout.positions(np.full(1, shard, np.int64), offsets)
            yield positions if self.order is None else self.order(positions)

    def owner(self, samples: Int64s) -> Int64s:
        positions = samples if self.order is None else self.order.inverse(samples)
        return self.layout.place(positions)[0]

    def after(self, delivered: Int64s, shares: tuple[Share, ...]) -> Positional:
        rest = Tails(self.layout, delivered)
        if shares == self.shares:
            return Positional(rest, shares, self.order)
        source = Concatenated(rest) if self.order is None else Interleaved(rest)
        return Positional(_fresh(source, shares[-1], dealt=self.order is not None), shares, self.order)


def _fresh(source: Cells, share: Share, dealt: bool) -> Layout:
    shards, weights = share
    if dealt and weights is None:
        return Dealt(source, shards)
    return Intervals.contiguous(source, shards, weights)


def layout_of(n: int, shares: Sequence[Share], dealt: bool) -> Layout:
    """The layout of the first share, resized to each of those after it in turn."""
    layout = _fresh(EndToEnd(n), shares[0], dealt)
    for share in shares[1:]:
        layout, _ = resized(layout, share)
    return layout


def resized(layout: Layout, share: Share) -> tuple[Layout, int]:
    """``layout`` over other shards, and the number of samples that change owner."""
    if not isinstance(layout, Intervals):
        sizes = layout.sizes
        held = np.flatnonzero(sizes > 0)
        layout = Intervals(Concatenated(layout), len(sizes), (np.cumsum(sizes) - sizes)[held], held)
    return layout.resized(*share)
