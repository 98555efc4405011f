"""Waiting for what another rank does: look again and again for a moment, then sleep between two looks.

Ranks often share cores: one that only spins takes them from the peer it waits for. The longer a wait has lasted, the
longer are its sleeps: what has come is seen late by a small part of the wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

__all__ = ["pauses"]

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
