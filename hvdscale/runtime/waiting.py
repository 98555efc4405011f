"""Waiting for what another rank does: look again and again for a moment, then sleep between two looks.

Ranks often share cores: one that only spins takes them from the peer it waits for. The longer a wait has lasted, the
longer are its sleeps: what has come is seen late by a small part of the wait.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["Stall", "pauses"]

_SPIN_SECONDS = 0.0002
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.00005, 0.001
_PAUSE_PER_WAIT = 1 / 64


def pauses(done: Callable[[], bool]) -> Iterator[int]:
    """Wait until ``done()``. Before each pause the caller gets its number, from 1, to see to other things."""
    began = time.monotonic()
    number = 0
    while not done():
        waited = time.monotonic() - began
        if waited > _SPIN_SECONDS:
            number += 1
            yield number
            time.sleep(min(max(waited * _PAUSE_PER_WAIT, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS))


class Stall:
    """Says on standard error, once, that a wait for other ranks lasts.

    Horovod's settings hold: HOROVOD_STALL_CHECK_TIME_SECONDS (60), HOROVOD_STALL_CHECK_DISABLE.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        off = os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("", "0")
        self._seconds = float("inf") if off else float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS", 60))
        self._until = time.monotonic() + self._seconds

    def look(self) -> None:
        """To be called again and again while the wait lasts."""
        if time.monotonic() < self._until:
            return
        self._until = float("inf")
        sys.stderr.write(
            f"Rank {self._rank} has waited {self._seconds:g} s for all ranks to make the same call. One is slow, "
            "stands still, or waits in another: hvd.join() and all-reduces of a script do not meet a plan's rounds. "
            "A rank that has run out of data calls optimizer.sync.flush().\n"
        )
        sys.stderr.flush()
