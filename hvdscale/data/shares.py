"""How many cells each shard gets: equal shares, or shares in proportion to weights, in exact integers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hvdscale.data.types import Int64s

__all__ = ["share_out"]

_SCALE = 1 << 32  # of the largest weight


def share_out(cells: int, shards: int, weights: Sequence[float] | None, favoured: Int64s | None = None) -> Int64s:
    """Cells of each shard, summing to ``cells``: int64[shards].

    Each shard gets its exact share rounded down. What is left goes one each to the largest remainders; of equal
    ones to the shard that is ``favoured`` more, then to the lower number. Without floats in the sums, so that
    every machine agrees.
    """
    if weights is None:
        sizes = np.full(shards, cells // shards, np.int64)
        sizes[_first(np.zeros(shards, np.int64), favoured)[: cells % shards]] += 1
        return sizes
    largest = max(weights)
    whole = [max(1, int(weight / largest * _SCALE)) for weight in weights]
    total = sum(whole)
    sizes = np.array([cells * w // total for w in whole], np.int64)
    remainders = np.array([cells * w % total for w in whole], np.int64)  # below total, at most 2**48
    sizes[_first(-remainders, favoured)[: cells - int(sizes.sum())]] += 1
    return sizes


def _first(rank: Int64s, favoured: Int64s | None) -> Int64s:
    """Shards by ascending ``rank``, then descending favour, then number."""
    favour = np.zeros_like(rank) if favoured is None else favoured
    return np.lexsort((-favour, rank)).astype(np.int64)
