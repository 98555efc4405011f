"""Starting real ranks in tests: every launch has a hard deadline and its process group is killed at the end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parent.parent

LAUNCHERS: dict[str, list[str]] = {
    "mpirun": ["mpirun", "--bind-to", "none", "--oversubscribe"],
    "horovodrun": ["horovodrun", "--mpi"],
    "horovodrun-gloo": ["horovodrun", "--gloo"],
    "alone": [],
}


@dataclass(frozen=True)
class Finished:
    """What a launch left behind. ``returncode`` is ``None`` when the deadline passed and it was killed."""

    returncode: int | None
    output: str
    seconds: float

    def check(self) -> str:
        assert self.returncode == 0, f"exit code {self.returncode} after {self.seconds:.0f} s\n{self.output}"
        return self.output


def launch(
    command: Sequence[str],
    *,
    ranks: int = 2,
    launcher: str = "mpirun",
    env: Mapping[str, str] | None = None,
    deadline_seconds: float = 300,
    cwd: Path | str | None = None,
) -> Finished:
    """Run ``python <command>`` on ``ranks`` ranks; output of all ranks, both streams, in one text."""
    front = LAUNCHERS[launcher]
    if front:
        front = [str(BIN / front[0]), *front[1:], "-np", str(ranks)]
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "HOROVOD_", "PMI_"))},
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "PYTHONPATH": str(REPOSITORY),
        **(env or {}),
    }
    start = time.monotonic()
    process = subprocess.Popen(
        [*front, sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        cwd=cwd or REPOSITORY,
        start_new_session=True,
    )
    returncode: int | None
    try:
        output, _ = process.communicate(timeout=deadline_seconds)
        returncode = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        returncode = None
    finally:
        _kill_group(process.pid)
    return Finished(returncode, output, time.monotonic() - start)


def _kill_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        return
