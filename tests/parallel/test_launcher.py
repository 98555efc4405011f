"""However a launch in a test ends, no rank of it lives on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launcher import LAUNCHERS, REPOSITORY, launch

RANK = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"

TEST = """
from tests.launcher import launch

def test_that_waits():
    launch(["-c", {rank!r}, {mark!r}], launcher={launcher!r})
"""


def alive(mark: str) -> list[str]:
    """Command lines that name ``mark``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        if mark in line:
            found.append(line)
    return found


def wait_for(reached: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not reached() and time.monotonic() < deadline:
        time.sleep(0.1)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_deadline_ends_every_rank(launcher: str, tmp_path: Path) -> None:
    mark = tmp_path / uuid.uuid4().hex
    for deadline_seconds in (6, 12, 60):  # a busy machine may not have started a rank in the first
        finished = launch(["-c", RANK, str(mark)], launcher=launcher, deadline_seconds=deadline_seconds)
        assert finished.returncode is None, finished.output
        if mark.exists():
            break
    assert mark.exists(), finished.output
    wait_for(lambda: not alive(mark.name), 10)
    assert alive(mark.name) == []


@pytest.mark.parametrize(
    ("launcher", "lanes"), [*((launcher, 0) for launcher in LAUNCHERS), ("mpirun", 2)], ids=lambda value: str(value)
)
def test_a_test_run_that_is_terminated_ends_every_rank(launcher: str, lanes: int, tmp_path: Path) -> None:
    mark = tmp_path / uuid.uuid4().hex
    test = tmp_path / "test_waits.py"
    test.write_text(TEST.format(rank=RANK, mark=str(mark), launcher=launcher))
    run = subprocess.Popen(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-p", "no:cacheprovider", f"-n{lanes}", str(test)],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(mark.exists, 120)
        assert alive(mark.name)
        run.send_signal(signal.SIGTERM)
        run.wait(60)
    finally:
        run.kill()
    wait_for(lambda: not alive(mark.name), 10)
    assert alive(mark.name) == []
