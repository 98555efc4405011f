"""How a rank ends that leaves before the others, or outlives them. Nothing may wait for a rank that is gone.

A job outlives one of its processes under ``mpirun --enable-recovery``. Horovod does not: its collectives, its own end
among them, need every rank.
"""

from __future__ import annotations

import atexit
import sys
import time
import warnings
from typing import Protocol

from hvdscale.errors import TransportError
from hvdscale.runtime import health

__all__ = ["Parting"]

_LOOK_SECONDS = 0.1  # between two looks at where the script stands

_NOT_SURVIVABLE = (
    "The others are to go on when a rank is gone, but mpirun and horovodrun end a job when one of its processes dies. "
    "Start it with mpirun --enable-recovery; without it they go on only where a rank's script ends by itself."
)


class Serving(Protocol):
    """What a rank does for the others: see ``Service``."""

    rank: int
    ranks: tuple[int, ...]
    idle: bool

    @property
    def serves(self) -> bool: ...

    @property
    def counted_out(self) -> bool: ...

    @property
    def missing(self) -> tuple[int, ...]: ...

    def end_silent(self) -> dict[int, int]: ...

    def check(self) -> None: ...

    def linger(self) -> None: ...

    def close(self) -> None: ...


class Parting:
    """Watches over the end of this process, from now until ``forget``.

    Args:
        service: what the others need of this rank.
        keep_going: whether they go on without it.
        patience_seconds: how long to wait for a rank that is gone.
        launched: whether a launcher started the job, which then watches its processes.
    """

    def __init__(self, service: Serving, keep_going: bool, patience_seconds: float, launched: bool) -> None:
        self._service, self._keep_going, self._patience_seconds = service, keep_going, patience_seconds
        self._survives = keep_going and health.survivable()
        self._stuck_since: float | None = None
        self._told: set[int] = set()
        self._fenced: set[int] = set()
        self._looked = 0.0
        # Runs before Horovod's own end, whose handler was made earlier.
        atexit.register(self.at_exit)
        if self._survives:
            health.on_error(self)
        elif keep_going and launched and service.rank == 0:
            warnings.warn(_NOT_SURVIVABLE, stacklevel=2)

    def forget(self) -> None:
        """This rank has parted."""
        atexit.unregister(self.at_exit)
        health.forget(self)

    def at_exit(self) -> None:
        """The script has ended, done or not."""
        service = self._service
        alone = self._survives and (service.missing or not service.idle)
        if self._keep_going and not service.idle and service.serves:
            service.linger()
        service.close()
        if alone:
            health.end_alone(0)

    def dispensable(self) -> bool:
        """After an error: whether the others can go on without what this rank asks."""
        if self._service.counted_out:
            return True
        try:
            self._service.check()
        except TransportError:
            return False
        return True

    def leave(self) -> None:
        """After an error: answer as long as anyone asks, and end."""
        if self._service.serves:
            self._service.linger()
        self._service.close()

    def watch(self) -> None:
        """Tell who is gone, and end the job if the script waits in a collective to which that rank will never come.

        Called now and then.
        """
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return
        self._looked = now
        missing = self._service.missing
        self._tell(missing)
        if self._survives:
            self._fence(missing)
        if not missing or not health.in_a_collective():
            self._stuck_since = None
        elif self._stuck_since is None:
            self._stuck_since = now
        elif now - self._stuck_since > self._patience_seconds:
            self._write(
                "ended the job: it waited in a collective, which needs all ranks, and "
                f"rank {', '.join(map(str, missing))} is gone. Where optimizer.sync.metrics()['ranks_lost'] "
                "is not 0, use optimizer.sync alone."
            )
            health.abort(1)

    def _fence(self, missing: tuple[int, ...]) -> None:
        """Who is gone stays gone: a process that stands still would come back, and mpirun waits for it."""
        if {*missing} <= self._fenced:
            return
        self._fenced |= {*missing}
        for rank, number in self._service.end_silent().items():
            self._write(f"ended process {number} of rank {rank}, which stood still.")

    def _tell(self, missing: tuple[int, ...]) -> None:
        """The first of those who go on says it once for all."""
        news = {*missing} - self._told
        self._told |= news
        if news and self._keep_going and self._service.rank == min({*self._service.ranks} - {*missing}):
            who = ", ".join(map(str, sorted(news)))
            self._write(f"rank {who} is gone; training goes on without it.")

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\n[rank {self._service.rank}] {line}\n")
        sys.stderr.flush()
