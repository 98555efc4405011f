"""A process that stands still can be ended by one beside it, and by nobody else: fencing.

Where the others go on without a rank that fell silent, it must not come back, and its launcher waits for it for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from dataclasses import astuple, dataclass
from pathlib import Path

__all__ = ["Process"]


@dataclass(frozen=True)
class Process:
    """One process of all machines, for good: a number given out again has another start.

    Args:
        place: the boot of the machine and the namespace in which the number counts; empty where neither is known.
        number: its id there.
        started: when, in ticks since that boot.
    """

    place: str
    number: int
    started: int

    @classmethod
    def own(cls) -> Process:
        """This one."""
        number = os.getpid()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            return cls(f"{boot} {os.readlink('/proc/self/ns/pid')}", number, _started(number))
        except OSError:  # not Linux
            return cls("", number, 0)

    @classmethod
    def read(cls, data: bytes) -> Process:
        """From what ``encode`` gave."""
        place, number, started = json.loads(data)
        return cls(str(place), int(number), int(started))

    def encode(self) -> bytes:
        return json.dumps(astuple(self)).encode()

    def beside(self, other: Process) -> bool:
        """Whether ``other`` is another process of the same machine, which this one sees."""
        return bool(self.place) and self.place == other.place and self.number != other.number

    def end(self, other: Process) -> bool:
        """Kill ``other`` if it is beside this one and still there. Whether it was."""
        if not self.beside(other):
            return False
        with contextlib.suppress(OSError):
            handle = os.pidfd_open(other.number)  # from here on the number is this process, whoever gets it later
            try:
                if _started(other.number) == other.started:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    return True
            finally:
                os.close(handle)
        return False


def _started(number: int) -> int:
    after_name = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2]  # a name may hold anything
    return int(after_name.split()[19])
