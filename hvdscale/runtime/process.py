"""Run a command to its end, line by line, with a deadline; nothing it started outlives it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Finished", "end_session", "signal_session", "stream"]

_GRACE_SECONDS = 3.0


@dataclass(frozen=True)
class Finished:
    """What a command left behind. ``returncode`` is ``None`` when the deadline passed and it was ended."""

    returncode: int | None
    output: str
    seconds: float


def stream(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | str | None = None,
    on_line: Callable[[str], None] | None = None,
    deadline_seconds: float | None = None,
) -> Finished:
    """Run ``command`` in a session of its own; both output streams come line by line through ``on_line``.

    The whole session is ended when the command is done, when the deadline passes and when this call is
    interrupted. A launcher gets the chance to end its ranks before it is killed.

    Raises:
        OSError: the command cannot be started.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=None if env is None else dict(env),
        cwd=cwd,
        start_new_session=True,
    )
    expired = threading.Event()

    def expire() -> None:
        expired.set()
        end_session(process)

    timer = threading.Timer(deadline_seconds, expire) if deadline_seconds is not None else None
    if timer:
        timer.daemon = True
        timer.start()
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if on_line:
                on_line(line.rstrip("\n"))
        process.wait()
    finally:
        if timer:
            timer.cancel()
        end_session(process)
    return Finished(None if expired.is_set() else process.returncode, "".join(lines), time.monotonic() - start)


def end_session(process: subprocess.Popen[Any]) -> None:
    """End what is left of the session that ``process`` leads, started with ``start_new_session``.

    Politely first; then every process of it, because mpirun gives each rank a process group of its own.
    """
    if process.poll() is None:
        signal_session(process, signal.SIGCONT)  # stopped processes hear nothing else
        _signal(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
    signal_session(process, signal.SIGKILL)
    _signal(process.pid, signal.SIGKILL)
    process.wait()


def signal_session(process: subprocess.Popen[Any], number: signal.Signals) -> None:
    """Send a signal to every process of the session that ``process`` leads, started with ``start_new_session``."""
    for pid in _session_members(process.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _signal(group: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, number)


def _session_members(session: int) -> list[int]:
    """Processes of ``session`` (Linux; elsewhere the process group has to do)."""
    members = []
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getsid(pid) == session:
                members.append(pid)
    return members
