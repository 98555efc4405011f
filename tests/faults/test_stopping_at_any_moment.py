"""One rank stops Horovod while another one starts operations: each of them ends, with a result or with an error."""

from __future__ import annotations

import pytest

from tests.launcher import launch

CYCLES = 25

# Rank 0 starts operations as fast as it can, so that one comes in the very moment in which Horovod stops.
TORCH = """
from mpi4py import MPI
import time, torch, horovod.torch as hvd

for cycle in range(CYCLES):
    hvd.init()
    if hvd.rank():
        time.sleep(0.005 + 0.0004 * cycle)
    else:
        started = []
        try:
            while True:
                started.append(hvd.allreduce_async(torch.ones(1), name=f"{cycle} {len(started)}"))
        except RuntimeError as error:
            assert "Horovod has been shut down" in str(error), error
        until = time.monotonic() + 20
        while lost := [handle for handle in started if not hvd.poll(handle)]:
            assert time.monotonic() < until, f"cycle {cycle}: {len(lost)} of {len(started)} operations never end"
    hvd.shutdown()
    MPI.COMM_WORLD.Barrier()
print("every operation ended")
"""

TENSORFLOW = """
import time, tensorflow as tf, hvdscale.tensorflow, horovod.tensorflow as hvd
from mpi4py import MPI

@tf.function
def train(step):
    return [hvd.allreduce(step, name=str(number)) for number in range(20)]

for cycle in range(CYCLES):
    hvd.init()
    if hvd.rank():
        time.sleep(0.005 + 0.0004 * cycle)
    else:
        try:
            while True:
                train(tf.ones(1))
        except tf.errors.UnknownError as error:
            assert "Horovod has been shut down" in str(error), error
    hvd.shutdown()
    MPI.COMM_WORLD.Barrier()
print("every operation ended")
"""


@pytest.mark.parametrize("script", [TORCH, TENSORFLOW], ids=["torch", "tensorflow"])
def test_every_operation_ends(script: str) -> None:
    env = {"HOROVOD_LOG_LEVEL": "fatal"}
    output = launch(["-c", f"CYCLES = {CYCLES}\n{script}"], env=env, deadline_seconds=200).check()
    assert output.count("every operation ended") == 2
