"""A rank that fails takes the job down at once, with its own traceback, instead of leaving its peers waiting."""

from __future__ import annotations

import gc
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType
from typing import Protocol

__all__ = [
    "WhoLeft",
    "abort",
    "end_alone",
    "end_job_on_error",
    "forget",
    "in_a_collective",
    "is_echo",
    "on_error",
    "survivable",
]

WhoLeft = Callable[[float], Sequence[int]]
"""Given some seconds of patience, the ranks known to have left the job."""


class Leaver(Protocol):
    """What the other ranks may need of this one."""

    def dispensable(self) -> bool:
        """Whether they can do without its training."""
        ...

    def leave(self) -> None:
        """Give them what they still need, for as long as they do."""
        ...


_hooked = False
_leavers: list[Leaver] = []
_who_left: WhoLeft = lambda patience_seconds: ()  # noqa: E731

# How long a rank whose collective broke keeps quiet: the rank that broke it speaks, and the launcher ends the job.
ECHO_SECONDS = 3.0

_RECOVERY = "OMPI_MCA_orte_enable_recovery"

# How long the launcher gets to pass the traceback on, before it is told to end the job and prints its own lines.
FORWARD_SECONDS = 0.3


def end_job_on_error(rank: int, end: Callable[[int], None], who_left: WhoLeft = _who_left) -> None:
    """From now on an unhandled exception prints its traceback once and calls ``end(1)``.

    An error of Horovod's own is usually the echo of another rank's: it waits, to let that rank have the last word.
    A rank that left early says nothing; ``who_left`` then names it. A second call only brings another ``who_left``.
    """
    global _hooked, _who_left
    _who_left = who_left
    if _hooked:
        return
    _hooked = True
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            previous(kind, error, where)
        else:
            cause = _wait_for_the_cause() if is_echo(kind.__name__, str(error)) else ""
            text = "".join(traceback.format_exception(kind, error, where))
            sys.stdout.flush()
            leavers = list(_leavers)
            alone = bool(leavers) and all(leaver.dispensable() for leaver in leavers)
            deed = "left the job, which goes on" if alone else "ended the job"
            # One write, so that no other rank's line falls into it.
            sys.stderr.write(f"\n[rank {rank}] {deed}:\n{text}{cause}")
            sys.stderr.flush()
            if alone:
                for leaver in leavers:
                    leaver.leave()
                end_alone(1)
            time.sleep(FORWARD_SECONDS)
        end(1)

    sys.excepthook = hook


def is_echo(kind: str, message: str) -> bool:
    """Whether an error of this type and message only tells that another rank is gone.

    Horovod's operations raise errors of its own in torch, and TensorFlow's ``UnknownError`` in TensorFlow.
    """
    if kind == "HorovodInternalError" or "Horovod has been shut down" in message:
        return True
    return kind == "UnknownError" and _OPERATION.search(message) is not None


_OPERATION = re.compile(r"Horovod(Grouped)?(All|Broadcast|Reduce|Join|Barrier)")


def _wait_for_the_cause() -> str:
    """Give the rank that failed the time to say so; if it is still quiet, what is known about who left."""
    start = time.monotonic()
    left = _who_left(ECHO_SECONDS)
    if left:
        names = ", ".join(map(str, left))
        return f"rank{'s' * (len(left) > 1)} {names} had left the job (sys.exit or the end of the script).\n"
    time.sleep(max(0.0, ECHO_SECONDS - (time.monotonic() - start)))
    return ""


def on_error(leaver: Leaver) -> None:
    """Ask it before an error of this rank ends the job."""
    _leavers.append(leaver)


def forget(leaver: Leaver) -> None:
    """Do not ask it any more."""
    if leaver in _leavers:
        _leavers.remove(leaver)


# Modules whose functions wait for all ranks, and those of their functions that do not.
_COLLECTIVE = {f"hvdscale.runtime.{module}" for module in ("channel", "transport")}
_NO_COLLECTIVE = {"close", "run_loopback"}


def in_a_collective() -> bool:
    """Whether the main thread is inside a collective, of Horovod's or of this library's."""
    main = threading.main_thread().ident
    frame = None if main is None else _frames().get(main)
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith("horovod.") or (module in _COLLECTIVE and frame.f_code.co_name not in _NO_COLLECTIVE):
            return True
        frame = frame.f_back
    return False


def _frames() -> dict[int, FrameType]:
    """Where each thread stands.

    Python 3.11 makes this list under a lock of the interpreter's own. A garbage collection meanwhile runs any code
    there is to run at its end, and all threads stand still if that code waits for one that needs the same lock.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        return sys._current_frames()
    finally:
        if collects:
            gc.enable()


def survivable() -> bool:
    """Whether the launcher lets a job go on when one of its processes ends: ``mpirun --enable-recovery`` does."""
    return os.environ.get(_RECOVERY) == "1"


def end_alone(code: int) -> None:
    """End this process now, and only this one: nothing may wait for ranks that are gone, or go on without it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def abort(code: int) -> None:
    """End this process now, and with it the job: no exit handler may wait for a peer.

    Under MPI the library is told; elsewhere the launcher sees a process that ended with an error.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1:
        mpi.COMM_WORLD.Abort(code)
    os._exit(code)
