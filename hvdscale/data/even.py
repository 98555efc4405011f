"""Units of the hash shared out by the samples in them, so that shards are even where keys are not.

A hash alone cannot be even: of n keys over k shards the sizes scatter by sqrt(k / n) around their mean. With bounded
loads (Mirrokni, Thorup and Zadimoghaddam, "Consistent hashing with bounded loads", 2016) a full shard passes keys on.
Here it gives up whole units, the fewest samples that bring it to its share, and the shards that lack most take them,
the largest unit first. Integers alone decide, so every machine agrees; as the units' samples do, an owner depends on
all keys.
"""

from __future__ import annotations

import heapq

import numpy as np

from hvdscale.data.keys import HashedKeys
from hvdscale.data.shares import share_out
from hvdscale.data.types import Int64s, Share, Table
from hvdscale.data.units import owner_table

__all__ = ["even_table"]

_SLACK = 500  # a shard is full where it holds this part of its share more than that
_ROUNDS = 4  # a unit as large as a share, of a key that comes very often, makes others give up theirs in turn


def even_table(keys: HashedKeys, shares: tuple[Share, ...]) -> Table:
    """The shard of each unit after the first share and every resize after it: uint16[65536], read-only."""
    known = keys.even_tables
    before = owner_table(shares[:1])
    for steps in range(1, len(shares) + 1):
        if shares[:steps] not in known:
            known[shares[:steps]] = _next(keys, before, shares[:steps])
        before = known[shares[:steps]]
    return before


def _next(keys: HashedKeys, before: Table, shares: tuple[Share, ...]) -> Table:
    """The table of the last share, made of the one before it."""
    shards, weights = shares[-1]
    staying = np.where(before < shards, before.astype(np.int64), -1)
    owners = _leveled(staying, keys.counts, share_out(len(keys), shards, weights))
    table = np.where(keys.counts > 0, owners, owner_table(shares)).astype(np.uint16)  # empty units: by the hash alone
    table.flags.writeable = False
    return table


def _leveled(owners: Int64s, weight: Int64s, goals: Int64s) -> Int64s:
    """``owners`` with units moved from shards above their goal to those below; -1: nobody's yet."""
    for _ in range(_ROUNDS):
        loads = _loads(owners, weight, len(goals))
        for shard in np.flatnonzero(loads > goals + goals // _SLACK):
            held = np.flatnonzero((owners == shard) & (weight > 0))
            units = _surplus(held[::-1], weight, int(loads[shard] - goals[shard]))
            owners[units] = -1
        free = np.flatnonzero((owners < 0) & (weight > 0))
        if not len(free):
            break
        _hand_out(owners, weight, free, goals - _loads(owners, weight, len(goals)))
    return owners


def _loads(owners: Int64s, weight: Int64s, shards: int) -> Int64s:
    loads = np.zeros(shards + 1, np.int64)
    np.add.at(loads, owners, weight)  # -1 falls into the last
    return loads[:-1]


def _surplus(units: Int64s, weight: Int64s, surplus: int) -> Int64s:
    """The first of ``units`` that weigh no more than ``surplus`` together, and lighter ones behind that still fit."""
    found = [units[:0]]
    while len(units := units[weight[units] <= surplus]):
        count = int(np.searchsorted(np.cumsum(weight[units]), surplus, side="right"))
        found.append(units[:count])
        surplus -= int(weight[units[:count]].sum())
        units = units[count:]
    return np.concatenate(found)


def _hand_out(owners: Int64s, weight: Int64s, free: Int64s, lacking: Int64s) -> None:
    """Give each unit, the heaviest first, to the shard that lacks most."""
    heap = [(-lack, shard) for shard, lack in enumerate(lacking.tolist())]
    heapq.heapify(heap)
    order = free[np.argsort(-weight[free], kind="stable")]
    for unit, heavy in zip(order.tolist(), weight[order].tolist(), strict=True):
        lack, shard = heap[0]
        owners[unit] = shard
        heapq.heapreplace(heap, (lack + heavy, shard))
