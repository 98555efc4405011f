"""The cores of this host that the job's ranks share, and those this rank is held to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from hvdscale.runtime.launch import read_launch

__all__ = ["bound_by_default", "cores_in_quota", "own_cores", "release_binding", "srun_bound", "usable_cores"]

# Open MPI tells a rank that it was bound, and how the user asked for it, if the user did.
_BOUND, _ASKED_FOR = "OMPI_MCA_orte_bound_at_launch", "OMPI_MCA_hwloc_base_binding_policy"


def usable_cores() -> int:
    """Cores that the ranks of this host share.

    A launcher that binds its ranks is not bound itself: its cores are those of the job. Slurm's tasks are started by
    a daemon that is nobody's; where each has cores of its own, as many of them are taken to be every task's.
    """
    cores = len(_job_cores(os.environ))
    if srun_bound(os.environ):
        cores = min(cores * max(1, read_launch(os.environ).local_size), os.cpu_count() or 1)
    return min(cores, cores_in_quota())


def own_cores() -> int:
    """Cores this rank may run on: fewer than the job's when its launcher bound it."""
    return min(len(_affinity()), cores_in_quota())


def bound_by_default(env: Mapping[str, str]) -> bool:
    """Whether ``mpirun`` bound this rank to some of the job's cores without being asked to."""
    return env.get(_BOUND) == "1" and _ASKED_FOR not in env and _affinity() < _job_cores(env)


def srun_bound(env: Mapping[str, str]) -> bool:
    """Whether Slurm gave each task of this node cores of its own: it lists a mask or a core for each."""
    if not env.get("SLURM_CPU_BIND_TYPE", "").startswith(("mask_cpu", "map_cpu")) or "PMIX_RANK" not in env:
        return False
    listed = [place for place in env.get("SLURM_CPU_BIND_LIST", "").split(",") if place]
    return len(set(listed)) == len(listed) > 1


def release_binding(env: Mapping[str, str]) -> frozenset[int]:
    """Let every thread of this process run on all of the job's cores; those cores."""
    cores = _job_cores(env)
    for task in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # a thread may end while we look
            os.sched_setaffinity(int(task.name), cores)
    return cores


def cores_in_quota(text: str | None = None) -> int:
    """Cores a container's quota allows at once: ``<microseconds> <period>`` in ``cpu.max``, or a large number."""
    try:
        limit, period = (Path("/sys/fs/cgroup/cpu.max").read_text() if text is None else text).split()
        return max(1, -(-int(limit) // int(period)))
    except (OSError, ValueError):  # no such file, or no limit: it then says "max"
        return 1 << 20


def _affinity(process: int = 0) -> frozenset[int]:
    if not hasattr(os, "sched_getaffinity"):
        return frozenset(range(os.cpu_count() or 1))
    return frozenset(os.sched_getaffinity(process))


def _job_cores(env: Mapping[str, str]) -> frozenset[int]:
    own = _affinity()
    return own | _affinity(os.getppid()) if env.get(_BOUND) == "1" else own
