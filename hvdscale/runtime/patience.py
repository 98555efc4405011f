"""A call that needs all ranks, made by some only, waits not for ever: it says so, and in the end it ends the job."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from hvdscale.runtime.health import abort

__all__ = ["patience"]

WARN_SECONDS = 10.0
END_SECONDS = 300.0


@contextmanager
def patience(call: str, *, warn_seconds: float = WARN_SECONDS, end_seconds: float = END_SECONDS) -> Iterator[None]:
    """Around a collective call that is easily made on one rank alone, such as saving.

    ``call`` names it. After ``warn_seconds`` in here a line on stderr says what this rank waits for; after
    ``end_seconds`` the job is ended.
    """
    rule = f"{call} needs all ranks: each holds a part of it. Call it on every rank, then save on one"

    def warn() -> None:
        _say(f"has waited {warn_seconds:g} s for other ranks: {rule}.")

    def end() -> None:
        _say(f"ended the job after {end_seconds:g} s of waiting: {rule}.")
        abort(1)

    timers = [threading.Timer(warn_seconds, warn), threading.Timer(end_seconds, end)]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()


def _say(text: str) -> None:
    sys.stderr.write(f"\n[hvdscale] this rank {text}\n")
    sys.stderr.flush()
