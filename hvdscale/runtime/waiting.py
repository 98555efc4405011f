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


def pauses(done: Callable[[], bool], pause_seconds: float = 0.0) -> Iterator[int]:
    """Wait until ``done()``. Before each pause the caller gets its number, from 1, to see to other things.

    ``pause_seconds``: from the first look on, instead of pauses that grow.
    """
    began = time.monotonic()
    number = 0
    while not done():
        waited = time.monotonic() - began
        if waited > _SPIN_SECONDS or pause_seconds:
            number += 1
            yield number
            time.sleep(pause_seconds or _growing(waited))


def _growing(waited_seconds: float) -> float:
    return min(max(waited_seconds * _PAUSE_PER_WAIT, _SHORTEST_PAUSE_SECONDS), _LONGEST_PAUSE_SECONDS)


class Stall:
    """Says on standard error, once, that a wait for other ranks lasts.

    Horovod's settings hold: HOROVOD_STALL_CHECK_TIME_SECONDS (60 where it is no number), HOROVOD_STALL_CHECK_DISABLE.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._seconds = _number("HOROVOD_STALL_CHECK_TIME_SECONDS", 60.0)
        off = _number("HOROVOD_STALL_CHECK_DISABLE", 0.0) > 0
        self._until = float("inf") if off else time.monotonic() + self._seconds

    def look(self) -> None:
        """To be called again and again while the wait lasts."""
        if time.monotonic() < self._until:
            return
        self._until = float("inf")
        sys.stderr.write(
            f"Rank {self._rank} has waited {self._seconds:g} s for all ranks to make the same call. One is slow, "
            "stands still, or waits in a call that does not meet it, such as hvd.join() where others meet in rounds.\n"
        )
        sys.stderr.flush()


def _number(name: str, otherwise: float) -> float:
    try:
        return float(os.environ.get(name, otherwise))
    except ValueError:
        return otherwise
