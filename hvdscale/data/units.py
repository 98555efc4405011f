"""The shard of each of the 65536 units of the hash, whatever keys there are: few intervals of the hash's range."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from hvdscale.data.keys import UNITS
from hvdscale.data.layouts import EndToEnd, Intervals
from hvdscale.data.types import Share, Table

__all__ = ["owner_table"]


@lru_cache(maxsize=16)  # plans, their readings and streams ask for the same few
def owner_table(shares: tuple[Share, ...]) -> Table:
    """The shard of each unit after the first share and every resize after it: uint16[65536], read-only."""
    shards, weights = shares[0]
    layout = Intervals.contiguous(EndToEnd(UNITS), shards, weights)
    for shards, weights in shares[1:]:
        layout, _ = layout.resized(shards, weights)
    table = np.repeat(layout.owners, np.diff(layout.starts, append=UNITS)).astype(np.uint16)
    table.flags.writeable = False
    return table
