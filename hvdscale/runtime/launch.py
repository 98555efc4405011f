"""Who started this process, and which rank it is: read from the environment the launcher left behind."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hvdscale.errors import WorldError

__all__ = ["Launch", "read_launch"]

Controller = Literal["mpi", "gloo", "single"]


@dataclass(frozen=True)
class Launch:
    """The place of this process in the job, as its launcher tells it.

    ``controller`` is how Horovod's ranks find each other: ``"mpi"``, ``"gloo"`` or ``"single"`` (no launcher).
    ``local_rank`` and ``local_size`` count the ranks of this host; a ``local_size`` of 0 says that the launcher left
    it unsaid. In an ``elastic`` job these are the values the process started with: ranks come and go, and Horovod
    knows the present ones.
    """

    launcher: str
    controller: Controller
    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    elastic: bool = False

    @property
    def spans_hosts(self) -> bool:
        """Whether ranks are known, or must be taken, to run on several hosts."""
        return self.size > self.local_size


@dataclass(frozen=True)
class _Dialect:
    """The variable names one launcher uses. Local ones may be missing."""

    launcher: str
    controller: Controller
    rank: str
    size: str
    local_rank: str = ""
    local_size: str = ""


# Order matters: horovodrun over MPI leaves Open MPI's variables, over Gloo its own.
_DIALECTS = (
    _Dialect("horovodrun --gloo", "gloo", "HOROVOD_RANK", "HOROVOD_SIZE", "HOROVOD_LOCAL_RANK", "HOROVOD_LOCAL_SIZE"),
    _Dialect(
        "mpirun (Open MPI)",
        "mpi",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    _Dialect("mpiexec (PMI)", "mpi", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Dialect("srun (PMIx)", "mpi", "PMIX_RANK", "SLURM_NTASKS", "SLURM_LOCALID"),
)

# Launchers whose ranks Horovod cannot see: their presence alone means "started the wrong way".
_FOREIGN = {"torchrun": ("RANK", "WORLD_SIZE", "MASTER_ADDR"), "TensorFlow's TF_CONFIG": ("TF_CONFIG",)}


def read_launch(env: Mapping[str, str] | None = None) -> Launch:
    """Read rank and world size from ``env`` (default: this process's environment).

    Raises:
        WorldError: rank variables half set, not numbers, out of range, or set by a launcher
            that Horovod cannot join.
    """
    env = os.environ if env is None else env
    for dialect in _DIALECTS:
        if dialect.rank in env or (dialect.size in env and dialect.size != "SLURM_NTASKS"):
            return _parse(dialect, env)
    for name, variables in _FOREIGN.items():
        if all(v in env for v in variables):
            shown = ", ".join(f"{v}={env[v]}" for v in variables)
            raise WorldError(
                f"This process was started by {name} ({shown}), whose ranks Horovod cannot join. "
                "Start it with `mpirun -np N python script.py`, `horovodrun -np N python script.py` or "
                "`hvdscale run -np N script.py`; to run one process alone, unset these variables."
            )
    return Launch("none", "single")


def _parse(dialect: _Dialect, env: Mapping[str, str]) -> Launch:
    rank = _number(dialect, dialect.rank, env)
    size = _number(dialect, dialect.size, env)
    local_size = _number(dialect, dialect.local_size, env, default=1 if size == 1 else _slurm_tasks_here(env))
    local_rank = _number(dialect, dialect.local_rank, env, default=rank)
    if not (0 <= rank < size and (local_size == 0 or 0 <= local_rank < local_size <= size)):
        raise WorldError(
            f"{dialect.launcher} left ranks that cannot be: {dialect.rank}={rank} of {dialect.size}={size}, "
            f"local rank {local_rank} of {local_size}. A rank lies in 0..size-1. "
            "Unset these variables or start the job again with its launcher."
        )
    return Launch(
        dialect.launcher, dialect.controller, rank, size, local_rank, local_size, env.get("HOROVOD_ELASTIC") == "1"
    )


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """Tasks of this job step on this node, from such lists as ``2(x3),1`` (nodes 0 to 2 hold 2, node 3 holds 1)."""
    tasks: list[int] = []
    for part in (env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or "").split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            return 0
        tasks += [int(match[1])] * int(match[2] or 1)
    node = env.get("SLURM_NODEID", "0" if len(tasks) == 1 else "")
    return tasks[int(node)] if node.isdecimal() and int(node) < len(tasks) else 0


def _number(dialect: _Dialect, name: str, env: Mapping[str, str], default: int | None = None) -> int:
    text = env.get(name)
    if text is None:
        if default is not None:
            return default
        raise WorldError(
            f"Rank variables of {dialect.launcher} are half set: {name} is missing, while "
            + ", ".join(f"{v}={env[v]}" for v in (dialect.rank, dialect.size) if v in env)
            + " is there. Unset them all to run one process, or start the job with its launcher."
        )
    try:
        return int(text)
    except ValueError:
        raise WorldError(
            f"{name}={text!r} is not a number. {dialect.launcher} sets it; unset it to run one process."
        ) from None
