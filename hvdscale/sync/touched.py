"""Rows of an embedding that few ranks looked up: their mean over those ranks, not over all.

A row that one rank of n has learnt about moves by an n-th of that in the plain mean, as it would if gradients were
averaged at every step.
"""

from __future__ import annotations

import numpy as np

from hvdscale.sync.exchange import Exchange
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Float64s, Meeting
from hvdscale.update.outer import Float32s

__all__ = ["Touched"]


class Touched:
    """An ``Exchange`` of pseudo-gradients like ``exchange``, in which a row counts the ranks that moved it."""

    def __init__(self, fragment: Fragment, exchange: Exchange) -> None:
        self._tables = fragment.tables
        self._exchange = exchange

    def arrays(self) -> dict[str, Float32s]:
        return self._exchange.arrays()

    def __call__(self, values: Float32s, meeting: Meeting) -> None:
        tables = [values[place].reshape(rows, -1) for place, rows in self._tables]  # [rows, width] each
        moved = np.concatenate([np.zeros(0, np.float32), *(table.any(axis=1).astype(np.float32) for table in tables)])
        self._exchange.beside(moved, meeting, meeting.votes)  # now the share of the ranks that moved each row
        self._exchange(values, meeting)
        start = 0
        for table in tables:
            shares = moved[start : start + len(table), None]
            np.divide(table, shares, out=table, where=shares > 0)
            start += len(table)

    def factor(self, meeting: Meeting) -> np.float32:
        return self._exchange.factor(meeting)

    def beside(self, values: Float32s, meeting: Meeting, votes: Float64s) -> None:
        self._exchange.beside(values, meeting, votes)
