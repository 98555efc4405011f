"""Starting real ranks in tests: every launch has a hard deadline, and nothing of it outlives the call."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from hvdscale.runtime import process

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).resolve().parent.parent

LAUNCHERS: dict[str, list[str]] = {
    "mpirun": ["mpirun", "--bind-to", "none", "--oversubscribe"],
    "mpirun-recovery": ["mpirun", "--bind-to", "none", "--oversubscribe", "--enable-recovery"],
    "horovodrun": ["horovodrun", "--mpi"],
    "horovodrun-gloo": ["horovodrun", "--gloo"],
    "alone": [],
}


class Finished(process.Finished):
    """What a launch left behind. ``returncode`` is ``None`` when the deadline passed and it was ended."""

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
    finished = process.stream(
        [*front, sys.executable, *command], env=environment, cwd=cwd or REPOSITORY, deadline_seconds=deadline_seconds
    )
    return Finished(finished.returncode, finished.output, finished.seconds)
