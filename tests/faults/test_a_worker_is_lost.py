"""A worker under a parameter server stops or dies: the others hear of it soon, and end, or go on without it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.launcher import Finished, launch

PATIENCE_SECONDS = 4
BOUND_SECONDS = 30  # on an idle machine about PATIENCE_SECONDS; this only tells a job that ends from one that hangs

TORCH = """
import os, signal, sys, time, torch, hvdscale.torch as hvd
hvd.init()
torch.manual_seed(0)
model = torch.nn.Linear(4, 4)
plan = hvd.ParameterServer({staleness}, servers=1, on_failure="{on_failure}", patience_seconds={patience})
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model=model, sync=plan)
for step in range(30):
    if step == 5:
        print(f"failing at {{time.time()}}", flush=True)
        {deeds}
    time.sleep(0.02)
    model(torch.ones(1, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
optimizer.sync.flush()
lost = int(optimizer.sync.metrics()["ranks_lost"])
print(f"rank {{hvd.rank()}} finished with {{lost}} lost, weights {{model.weight.sum().item():.6f}}", flush=True)
"""

KERAS = """
import os, signal, keras, numpy as np, time, hvdscale.keras as hvd
hvd.init()
keras.utils.set_random_seed(0)
model = keras.Sequential([keras.Input([4]), keras.layers.Dense(4)])
plan = hvd.ParameterServer({staleness}, servers=1, on_failure="{on_failure}", patience_seconds={patience})
model.compile(hvd.DistributedOptimizer(keras.optimizers.SGD(0.01), model=model, sync=plan), "mse")

def at_step(step, logs):
    if step == 5:
        print(f"failing at {{time.time()}}", flush=True)
        {deeds}
    time.sleep(0.02)

data = np.ones([120, 4], "float32")
watch = keras.callbacks.LambdaCallback(on_train_batch_begin=at_step)
model.fit(data, data, batch_size=4, verbose=0, callbacks=[watch])
model.optimizer.sync.flush()
lost = int(model.optimizer.sync.metrics()["ranks_lost"])
print(f"rank {{hvd.rank()}} finished with {{lost}} lost, weights {{model.get_weights()[0].sum():.6f}}", flush=True)
"""

KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
STOPPED = "os.kill(os.getpid(), signal.SIGSTOP)"


def run(
    body: str,
    deeds: dict[int, str],
    on_failure: str,
    capsys: pytest.CaptureFixture[str],
    *,
    ranks: int = 3,
    launcher: str = "mpirun-recovery",
    staleness: int | None = 4,
) -> Finished:
    """Train; ``deeds`` says by rank what it does at step 5. Shows how long after that the job was over."""
    text = "\n        ".join(f"if hvd.rank() == {rank}: {deed}" for rank, deed in deeds.items())
    script = body.format(deeds=text, on_failure=on_failure, staleness=staleness, patience=PATIENCE_SECONDS)
    env = {"KERAS_BACKEND": "tensorflow"} if "keras" in body else {}
    finished = launch(["-c", script], ranks=ranks, launcher=launcher, env=env, deadline_seconds=120)
    seconds = time.time() - max(map(float, re.findall(r"failing at ([\d.]+)", finished.output)))
    with capsys.disabled():
        print(f"\n{on_failure}, {deeds}: the job was over {seconds:.1f} s later", end=" ")
    assert seconds < BOUND_SECONDS, finished.output
    return finished


STOPS = [
    ("mpirun", "sys.exit(3)", "rank 2 left the job"),
    ("mpirun-recovery", KILLED, f"rank 2 has given no sign of life for {PATIENCE_SECONDS} s"),
]


@pytest.mark.parametrize(("launcher", "deed", "said"), STOPS, ids=["sys.exit", "kill -9"])
def test_with_stop_the_job_ends_and_names_it(
    launcher: str, deed: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = run(TORCH, {2: deed}, "stop", capsys, launcher=launcher)
    assert finished.returncode is not None, finished.output
    assert finished.returncode or launcher == "mpirun-recovery"  # there mpirun returns 0, whatever ranks return
    assert said in finished.output
    assert "finished" not in finished.output


LOST = [(TORCH, STOPPED, True), (KERAS, KILLED, False)]


@pytest.mark.parametrize(("body", "deed", "is_ended"), LOST, ids=["torch, stopped", "keras-tensorflow, killed"])
def test_with_continue_the_others_go_on(
    body: str, deed: str, is_ended: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One is killed or stands still, one fails with an error of its own: two of four end with the same weights."""
    deeds = {3: deed, 2: 'raise ValueError("broken on purpose")'}
    finished = run(body, deeds, "continue", capsys, ranks=4)
    assert finished.returncode == 0, finished.output
    ends = re.findall(r"rank (\d) finished with 2 lost, weights (-?\d+\.\d{6})", finished.output)
    assert sorted(rank for rank, _ in ends) == ["0", "1"], finished.output
    assert len({weights for _, weights in ends}) == 1
    assert finished.output.count("[rank 2] left the job, which goes on") == 1, finished.output
    assert len(re.findall(r"\[rank 0\] rank (?:3|2, 3) is gone; training goes on without it", finished.output)) == 1
    assert finished.output.count("ValueError: broken on purpose") == 1
    assert len(re.findall(r"\[rank 0\] ended process \d+ of rank 3, which stood still", finished.output)) == is_ended


def test_a_rank_whose_script_fails_goes_on_serving(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 holds the weights: its error is printed, and its thread answers until the others are done."""
    finished = run(TORCH, {0: 'raise ValueError("broken on purpose")'}, "continue", capsys, staleness=0)
    assert "[rank 0] left the job, which goes on" in finished.output
    assert len(re.findall(r"rank [12] finished with 1 lost", finished.output)) == 2, finished.output


def test_nobody_waits_for_ever_in_a_collective_without_a_lost_rank(capsys: pytest.CaptureFixture[str]) -> None:
    finished = run(TORCH + "hvd.allreduce(torch.ones(1))\nprint('met all')", {2: KILLED}, "continue", capsys)
    assert finished.returncode is not None
    assert "finished with 1 lost" in finished.output
    assert "it waited in a collective, which needs all ranks, and rank 2 is gone" in finished.output
    assert "met all" not in finished.output


def test_weights_lost_with_their_rank_end_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    finished = run(TORCH, {0: KILLED}, "continue", capsys)
    assert finished.returncode is not None
    assert f"rank 0 has given no sign of life for {PATIENCE_SECONDS} s" in finished.output
    assert "finished" not in finished.output


RESUMED = """
import os, signal, sys, torch, hvdscale.torch as hvd
hvd.init()

def start():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    plan = hvd.ParameterServer(0, every=2, outer_momentum=0.5)
    plain = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    return model, hvd.DistributedOptimizer(plain, model=model, sync=plan)

def train(model, optimizer, first, last):
    for step in range(first, last):
        optimizer.zero_grad()
        model(torch.full((1, 4), 1.0 + hvd.rank() + step)).square().sum().backward()
        optimizer.step()

model, optimizer = start()
path = f"{sys.argv[1]}/{hvd.rank()}.pt"
if os.path.exists(path):
    train(model, optimizer, 0, 9)  # the run that nothing interrupts
    optimizer.sync.flush()
    again, optimizer = start()
    state = torch.load(path)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    optimizer.sync.load_state_dict(state["sync"])
    train(again, optimizer, 5, 9)
    optimizer.sync.flush()
    same = all(map(torch.equal, model.parameters(), again.parameters()))
    print("goes on as before" if same else "goes on otherwise")
else:
    train(model, optimizer, 0, 5)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "sync": optimizer.sync.state_dict()}
    torch.save(state, path)
    hvd.allreduce(torch.ones(1))  # all have saved
    if hvd.rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(model, optimizer, 5, 9)
    optimizer.sync.flush()
    print("nobody was missed")
"""


def test_a_job_that_was_killed_goes_on_from_its_files(tmp_path: Path) -> None:
    """In new processes, from a step in the middle of a period."""
    killed = launch(["-c", RESUMED, str(tmp_path)], launcher="mpirun", deadline_seconds=120)
    assert killed.returncode not in (0, None), killed.output
    assert "nobody was missed" not in killed.output
    assert launch(["-c", RESUMED, str(tmp_path)], deadline_seconds=120).check().count("goes on as before") == 2
