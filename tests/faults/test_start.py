"""A job that was started the wrong way, or used before it began, says what is wrong and ends."""

from __future__ import annotations

import json
import re

import pytest

from tests.launcher import launch

HEADER = """
import torch, hvdscale.torch as hvd
"""


WRONG = {
    "OMPI_COMM_WORLD_RANK=0": ({"OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE is missing"),
    "OMPI_COMM_WORLD_SIZE=2": ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is missing"),
    "HOROVOD_RANK=1": ({"HOROVOD_RANK": "1"}, "HOROVOD_SIZE is missing"),
    "HOROVOD_RANK=2,HOROVOD_SIZE=2": ({"HOROVOD_RANK": "2", "HOROVOD_SIZE": "2"}, "ranks that cannot be"),
    "HOROVOD_RANK=one,HOROVOD_SIZE=2": ({"HOROVOD_RANK": "one", "HOROVOD_SIZE": "2"}, "one"),
    "torchrun": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "torchrun"),
}

# Each set of variables in a process of its own, forked where PyTorch, which takes seconds, has been imported.
EACH = """
import json, os, sys
for variables in json.loads(sys.argv[1]):
    child = os.fork()
    if not child:
        os.environ.update(variables)
        hvd.init()
        sys.exit()
    print(f"<ended with {os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])}>", flush=True)
"""


@pytest.fixture(scope="module")
def ends() -> dict[str, tuple[int, str]]:
    """By name: the exit code of a process with these variables, and what it said."""
    variables = json.dumps([each for each, _ in WRONG.values()])
    output = launch(["-c", HEADER + EACH, variables], launcher="alone", deadline_seconds=120).check()
    said = re.split(r"<ended with (-?\d+)>", output)  # text, code, text, code, ...
    return {name: (int(said[2 * i + 1]), said[2 * i]) for i, name in enumerate(WRONG)}


@pytest.mark.parametrize("name", WRONG)
def test_rank_variables_that_do_not_fit(ends: dict[str, tuple[int, str]], name: str) -> None:
    code, output = ends[name]
    assert code == 1, output
    assert "WorldError" in output
    assert WRONG[name][1] in output.split("WorldError")[-1]


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
