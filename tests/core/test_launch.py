"""read_launch: each launcher's dialect is understood; what does not fit together is refused with the way out."""

from __future__ import annotations

import pytest

from hvdscale.errors import WorldError
from hvdscale.runtime.launch import Launch, read_launch

OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
GLOO = {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "8", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, Launch("none", "single")),
        (OPEN_MPI, Launch("mpirun (Open MPI)", "mpi", 3, 8, 1, 2)),
        (GLOO, Launch("horovodrun --gloo", "gloo", 3, 8, 1, 2)),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launch("mpiexec (PMI)", "mpi", 1, 4, 1, 2),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "4"}, Launch("mpiexec (PMI)", "mpi", 1, 4, 1, 0)),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, Launch("mpiexec (PMI)", "mpi", 0, 1, 0, 1)),
        (
            {"PMIX_RANK": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}
            | {"SLURM_NODEID": "1"},
            Launch("srun (PMIx)", "mpi", 5, 8, 1, 4),
        ),
        # An interactive Slurm allocation names a number of tasks, but this process is none of them.
        ({"SLURM_NTASKS": "8"}, Launch("none", "single")),
        # horovodrun over MPI starts mpirun, whose variables are there beside PMIx's.
        (OPEN_MPI | {"PMIX_RANK": "3"}, Launch("mpirun (Open MPI)", "mpi", 3, 8, 1, 2)),
        # Somebody's MASTER_ADDR alone does not make this a torchrun job.
        ({"MASTER_ADDR": "10.0.0.1"}, Launch("none", "single")),
    ],
    ids=[
        "alone",
        "mpirun",
        "gloo",
        "pmi",
        "pmi-local-unknown",
        "pmi-alone",
        "srun",
        "salloc",
        "mpirun+pmix",
        "stray-address",
    ],
)
def test_each_launcher_is_understood(env: dict[str, str], expected: Launch) -> None:
    assert read_launch(env) == expected


@pytest.mark.parametrize(
    ("env", "says"),
    [
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is missing"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is missing"),
        (without(GLOO, "HOROVOD_SIZE"), "HOROVOD_SIZE is missing, while HOROVOD_RANK=3"),
        ({"PMIX_RANK": "0"}, "SLURM_NTASKS is missing"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "8"}, "0..size-1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK=-1"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "local rank 2 of 2"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "9"}, "of 9"),
        (GLOO | {"HOROVOD_SIZE": "0", "HOROVOD_RANK": "0"}, "HOROVOD_SIZE=0"),
        (GLOO | {"HOROVOD_RANK": "three"}, "HOROVOD_RANK='three' is not a number"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1"}, "torchrun"),
        ({"TF_CONFIG": "{}"}, "TF_CONFIG"),
    ],
)
def test_what_does_not_fit_together_is_refused(env: dict[str, str], says: str) -> None:
    with pytest.raises(WorldError, match=says) as refusal:
        read_launch(env)
    assert any(way_out in str(refusal.value).lower() for way_out in ("unset", "start"))


@pytest.mark.parametrize(
    ("slurm", "local_size"),
    [
        ({"SLURM_STEP_TASKS_PER_NODE": "7"}, 7),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "0"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}, 2),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "3"}, 1),
        ({"SLURM_STEP_TASKS_PER_NODE": "1,2,4", "SLURM_NODEID": "2"}, 4),
        # The step's own list comes before the job's.
        ({"SLURM_STEP_TASKS_PER_NODE": "3,4", "SLURM_TASKS_PER_NODE": "7", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_TASKS_PER_NODE": "3,4", "SLURM_NODEID": "0"}, 3),
        # Unknown:
        ({}, 0),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,4"}, 0),
        ({"SLURM_STEP_TASKS_PER_NODE": "3,4", "SLURM_NODEID": "2"}, 0),
        ({"SLURM_STEP_TASKS_PER_NODE": "three", "SLURM_NODEID": "0"}, 0),
        # --ntasks-per-node is what was asked for at most, not what is there.
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_NODEID": "0"}, 0),
    ],
    ids=lambda v: ",".join(f"{k}={x}" for k, x in v.items()) or "nothing" if isinstance(v, dict) else "",
)
def test_how_many_tasks_of_slurm_share_this_host(slurm: dict[str, str], local_size: int) -> None:
    launch = read_launch({"PMIX_RANK": "0", "SLURM_NTASKS": "7", "SLURM_LOCALID": "0"} | slurm)
    assert launch.local_size == local_size
    assert launch.spans_hosts == (local_size < 7)
