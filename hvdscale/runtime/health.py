"""A rank that fails takes the job down at once, with its own traceback, instead of leaving its peers waiting."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from types import TracebackType

__all__ = ["abort", "end_job_on_error"]

_hooked = False

# How long a rank whose collective broke keeps quiet: the rank that broke it speaks, and the launcher ends the job.
ECHO_SECONDS = 3.0

# How long the launcher gets to pass the traceback on, before it is told to end the job and prints its own lines.
FORWARD_SECONDS = 0.3


def end_job_on_error(rank: int, end: Callable[[int], None]) -> None:
    """From now on an unhandled exception prints its traceback once and calls ``end(1)``.

    An error of Horovod's own is usually the echo of another rank's: it waits, to let that rank have the last word.
    """
    global _hooked
    if _hooked:
        return
    _hooked = True
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            previous(kind, error, where)
        else:
            if _is_echo(kind, error):
                time.sleep(ECHO_SECONDS)
            text = "".join(traceback.format_exception(kind, error, where))
            sys.stdout.flush()
            # One write, so that no other rank's line falls into it.
            sys.stderr.write(f"\n[rank {rank}] ended the job:\n{text}")
            sys.stderr.flush()
            time.sleep(FORWARD_SECONDS)
        end(1)

    sys.excepthook = hook


def _is_echo(kind: type[BaseException], error: BaseException) -> bool:
    return kind.__name__ == "HorovodInternalError" or "Horovod has been shut down" in str(error)


def abort(code: int) -> None:
    """End this process now, and with it the job: no exit handler may wait for a peer.

    Under MPI the library is told; elsewhere the launcher sees a process that ended with an error.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)
