"""A job that was started the wrong way, or used before it began, says what is wrong and ends."""

from __future__ import annotations

import pytest

from tests.launcher import launch

HEADER = """
import torch, hvdscale.torch as hvd
"""


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is missing"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is missing"),
        ({"HOROVOD_RANK": "1"}, "HOROVOD_SIZE is missing"),
        ({"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, "ranks that cannot be"),
        ({"HOROVOD_RANK": "one", "HOROVOD_SIZE": "2"}, "one"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "torchrun"),
    ],
    ids=lambda value: ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_rank_variables_that_do_not_fit(variables: dict[str, str], said: str) -> None:
    finished = launch(["-c", HEADER + "hvd.init()"], launcher="alone", env=variables, deadline_seconds=120)
    assert finished.returncode not in (None, 0), finished.output
    assert "WorldError" in finished.output
    assert said in finished.output.split("WorldError")[-1]


def test_horovod_and_mpi_seeing_different_worlds() -> None:
    """As when Horovod was built against another MPI than mpirun's: every rank then sees a world of one."""
    script = "import horovod.torch; horovod.torch.size = lambda: 1\n" + HEADER + "hvd.init()"
    finished = launch(["-c", script], deadline_seconds=120)
    assert finished.returncode not in (None, 0), finished.output
    assert "All must see the same world size; the launcher (mpirun (Open MPI)) 2, Horovod 1, MPI 2" in finished.output


def test_using_hvd_before_init() -> None:
    script = HEADER + "hvd.DistributedOptimizer(torch.optim.SGD([torch.ones(1, requires_grad=True)]))"
    finished = launch(["-c", script], launcher="alone", deadline_seconds=120)
    assert finished.returncode not in (None, 0)
    assert "Call hvd.init() first" in finished.output
