"""Waiting for what another rank does: look again and again for a moment, then sleep between two looks.

Ranks often share cores: one that only spins takes them from the peer it waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

__all__ = ["pauses"]

_SPIN_SECONDS = 0.0002
_PAUSE_SECONDS = 0.00005


def pauses(done: Callable[[], bool]) -> Iterator[int]:
    """Wait until ``done()``. Before each pause the caller gets its number, from 1, to see to other things."""
    spin_until = time.monotonic() + _SPIN_SECONDS
    number = 0
    while not done():
        if time.monotonic() > spin_until:
            number += 1
            yield number
            time.sleep(_PAUSE_SECONDS)
