"""A job that goes wrong ends: soon, with an error code, and with the reason as its last word."""

from __future__ import annotations

import re
import time

import pytest

from tests.launcher import launch

HEADER = """
import time, sys, torch, hvdscale.torch as hvd
"""

# Rank 1 fails while rank 0 waits for it, in a backward pass or in a collective.
IN_A_STEP = (
    HEADER
    + """
hvd.init()
model = torch.nn.Linear(4, 4)
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
for step in range(3):
    if step == 2 and hvd.rank() == 1:
        print(f"failing at {time.time()}", flush=True)
        raise ValueError("broken on purpose")
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("a rank went on")
"""
)

IN_A_COLLECTIVE = (
    HEADER
    + """
hvd.init()
hvd.allreduce(torch.ones(3))
if hvd.rank() == 1:
    print(f"failing at {time.time()}", flush=True)
    raise ValueError("broken on purpose")
hvd.broadcast_optimizer_state(torch.optim.SGD([torch.ones(2)]), root_rank=0)
hvd.allreduce(torch.ones(3))
print("a rank went on")
"""
)


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "horovodrun-gloo"])
@pytest.mark.parametrize("script", [IN_A_STEP, IN_A_COLLECTIVE], ids=["in a step", "in a collective"])
def test_an_exception_on_one_rank_ends_the_job(script: str, launcher: str) -> None:
    finished = launch(["-c", script], launcher=launcher, deadline_seconds=120)
    ended = time.time()
    output = finished.output
    assert finished.returncode not in (None, 0), output
    failed = float(re.search(r"failing at ([\d.]+)", output).group(1))
    assert ended - failed < 20, f"the job lived on for {ended - failed:.0f} s\n{output}"
    assert "a rank went on" not in output
    # horovodrun ends with a traceback of its own, which names its script.
    tracebacks = [
        text for text in output.split("Traceback (most recent call last)")[1:] if "bin/horovodrun" not in text
    ]
    assert len(tracebacks) == 1, output
    assert "ValueError: broken on purpose" in tracebacks[0]
    assert re.findall(r"\[rank (\d)\] ended the job", output) == ["1"], output


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
    finished = launch(["-c", HEADER + "hvd.init()"], launcher="alone", env=variables, deadline_seconds=60)
    assert finished.returncode not in (None, 0), finished.output
    assert "WorldError" in finished.output
    assert said in finished.output.split("WorldError")[-1]


def test_horovod_and_mpi_seeing_different_worlds() -> None:
    """As when Horovod was built against another MPI than mpirun's: every rank then sees a world of one."""
    script = "import horovod.torch; horovod.torch.size = lambda: 1\n" + HEADER + "hvd.init()"
    finished = launch(["-c", script], deadline_seconds=60)
    assert finished.returncode not in (None, 0), finished.output
    assert "All must see the same world size; the launcher (mpirun (Open MPI)) 2, Horovod 1, MPI 2" in finished.output


def test_using_hvd_before_init() -> None:
    script = HEADER + "hvd.DistributedOptimizer(torch.optim.SGD([torch.ones(1, requires_grad=True)]))"
    finished = launch(["-c", script], launcher="alone", deadline_seconds=60)
    assert finished.returncode not in (None, 0)
    assert "Call hvd.init() first" in finished.output
