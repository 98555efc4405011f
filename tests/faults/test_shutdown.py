"""hvd.shutdown() gives back what was lent: communicators, connections, threads; the job goes on, or ends at once."""

from __future__ import annotations

import pytest

from tests.launcher import launch

DEADLINE_SECONDS = 120  # seconds on an idle machine; this only tells a job that ends from one that hangs

SCRIPT = """
import sys, threading, time, torch, hvdscale.torch as hvd

def train(plan, **given):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model=model, sync=plan, **given)
    for step in range(5):
        model(torch.ones(1, 4)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.sync.flush()

def communicators(transport):
    "Of mpi4py; none under Gloo."
    if not hasattr(transport, "_lent"):
        return []
    inside = [*transport._subsets.values(), *transport._attached]
    return [transport.communicator, *transport._lent, *(c for other in inside for c in communicators(other))]

def threads():
    return [t.name for t in threading.enumerate() if t.name in ("hvdscale-post", "hvdscale-service")]

for turn in range(int(sys.argv[1])):
    two = hvd.ProcessSet([0, 1])
    hvd.init(process_sets=[two])
    train(hvd.LocalSGD(2, overlap=1))
    train(hvd.ParameterServer(0))
    train(hvd.LocalSGD(2), process_set=two)
    found = communicators(hvd.world().transport)
    assert threads()
    hvd.allreduce(torch.ones(1))  # Horovod's shutdown on one rank ends what the others are about
    hvd.shutdown()
    assert not any(found), [bool(comm) for comm in found]
    until = time.monotonic() + 15  # a connection ends when the peer has closed, too
    while threads() and time.monotonic() < until:
        time.sleep(0.02)
    assert not threads(), threads()
print(f"ended well with {len(found)} communicators", flush=True)
"""


# Horovod itself cannot join a second time over Gloo's rendezvous.
@pytest.mark.parametrize(("launcher", "turns", "communicators"), [("mpirun", 2, 5), ("horovodrun-gloo", 1, 0)])
def test_shutdown_gives_back_what_was_lent_and_the_job_ends(launcher: str, turns: int, communicators: int) -> None:
    finished = launch(["-c", SCRIPT, str(turns)], ranks=3, launcher=launcher, deadline_seconds=DEADLINE_SECONDS)
    output = finished.check()
    assert output.count(f"ended well with {communicators} communicators") >= 2, output


LATE = """
import time, numpy as np, torch, hvdscale.torch as hvd
from hvdscale.runtime.post import open_post

class Slow:
    def close(self):
        time.sleep(0.3)

for turn in range(2):
    hvd.init()
    transport = hvd.world().transport
    if turn == 0 and hvd.rank() == 0:
        transport.attach(Slow())  # what is closed after it sends its last message late
    post = open_post(transport)
    peer = 1 - post.rank
    for number in range(20 * turn):
        out = np.zeros(1, np.uint8)
        sent = post.send(np.uint8([number]), peer, 7)
        post.receive(out, peer, 7).wait()
        sent.wait()
        assert out[0] == number, (out, number)
    hvd.allreduce(torch.ones(1))  # all leave together
    hvd.shutdown()
print("heard everything", flush=True)
"""


def test_a_last_message_that_comes_late_is_not_taken_for_one_of_the_next_job() -> None:
    """MPI gives a communicator's number to the next one as soon as it is freed."""
    assert launch(["-c", LATE], deadline_seconds=DEADLINE_SECONDS).check().count("heard everything") == 2
