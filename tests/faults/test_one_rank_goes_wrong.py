"""One rank fails, or leaves while others train: the job ends, soon, with an error code, and says who it was."""

from __future__ import annotations

import re
import time

import pytest

from tests.faults.scripts import COLLECTIVE, CONTROL, KERAS, TENSORFLOW, TORCH, script
from tests.launcher import Finished, launch

# On an idle machine it takes about one second; this bound only tells a job that ends from one that hangs.
BOUND_SECONDS = 30

RAISE = 'raise ValueError("broken on purpose")'

FAILURES = [
    ("torch", TORCH, "mpirun"),
    ("torch", TORCH, "horovodrun"),
    ("torch", TORCH, "horovodrun-gloo"),
    ("torch-collective", COLLECTIVE, "mpirun"),
    ("torch-control", CONTROL, "mpirun"),
    ("torch-control", CONTROL, "horovodrun-gloo"),
    ("tensorflow", TENSORFLOW, "mpirun"),
    ("tensorflow", TENSORFLOW, "horovodrun-gloo"),
    ("keras-tensorflow", KERAS, "mpirun"),
    ("keras-tensorflow", KERAS, "horovodrun-gloo"),
    ("keras-torch", KERAS, "mpirun"),
]

# With code 0 nothing but its absence tells that a rank left; Gloo's launcher sees any other code itself.
DEPARTURES = [
    ("torch", TORCH, "mpirun", 3),
    ("torch", TORCH, "mpirun", 0),
    ("torch", TORCH, "horovodrun-gloo", 3),
    ("torch", TORCH, "horovodrun-gloo", 0),
    ("torch-control", CONTROL, "mpirun", 3),
    ("torch-control", CONTROL, "mpirun", 0),
    ("torch-control", CONTROL, "horovodrun-gloo", 0),
    ("tensorflow", TENSORFLOW, "mpirun", 3),
    ("tensorflow", TENSORFLOW, "mpirun", 0),
    ("tensorflow", TENSORFLOW, "horovodrun-gloo", 3),
]


def run(name: str, text: str, launcher: str, capsys: pytest.CaptureFixture[str]) -> Finished:
    """Run to the end of the job; show how long after going wrong that was."""
    env = {"KERAS_BACKEND": name.split("-")[-1]} if name.startswith("keras") else {}
    finished = launch(["-c", text], launcher=launcher, env=env, deadline_seconds=120)
    ended = time.time()
    assert finished.returncode not in (None, 0), finished.output
    assert "a rank went on" not in finished.output
    seconds = ended - float(re.search(r"failing at ([\d.]+)", finished.output).group(1))
    with capsys.disabled():
        print(f"\n{name}, {launcher}: the job ended {seconds:.1f} s later", end=" ")
    assert seconds < BOUND_SECONDS, finished.output
    return finished


@pytest.mark.parametrize(("name", "body", "launcher"), FAILURES, ids=lambda v: v if len(v) < 30 else "")
def test_an_exception_ends_the_job(name: str, body: str, launcher: str, capsys: pytest.CaptureFixture[str]) -> None:
    output = run(name, script(body, RAISE), launcher, capsys).output
    # horovodrun ends with a traceback of its own, which names its script.
    tracebacks = [
        text for text in output.split("Traceback (most recent call last)")[1:] if "bin/horovodrun" not in text
    ]
    assert len(tracebacks) == 1, output
    assert "ValueError: broken on purpose" in tracebacks[0]
    assert re.findall(r"\[rank (\d)\] ended the job", output) == ["1"], output


@pytest.mark.parametrize(
    ("name", "body", "launcher", "code"), DEPARTURES, ids=lambda v: str(v) if len(str(v)) < 30 else ""
)
def test_leaving_early_ends_the_job(
    name: str, body: str, launcher: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    text = script(body, f"sys.exit({code})")
    if launcher == "horovodrun-gloo" and code:  # the launcher has the last word, once a busy machine has ended rank 1
        text = f"from hvdscale.runtime import health; health.ECHO_SECONDS = 20\n{text}"
    output = run(name, text, launcher, capsys).output
    if launcher == "mpirun":
        assert re.search(r"rank 1 (had )?left the job", output), output
        assert re.findall(r"\[rank (\d)\] ended the job", output) == ["0"], output
    elif code:
        assert re.search(rf"Process name: 1\s+Exit code: {code}", output), output
    else:
        assert "Horovod has been shut down" in output


@pytest.mark.parametrize(("name", "body"), [("torch", TORCH), ("tensorflow", TENSORFLOW)])
def test_ranks_that_end_one_after_the_other_are_no_failure(name: str, body: str) -> None:
    """Rank 0 often has a checkpoint to write when the others are done."""
    finished = launch(["-c", script(body, "pass") + "time.sleep(2 * (hvd.rank() == 0))"], deadline_seconds=120)
    assert finished.check().count("a rank went on") == 2
    assert "left the job" not in finished.output


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_rank_that_waits_long_for_the_others_says_so(overlap: int) -> None:
    """In a round, and in the thread beside training in which a fragment travels."""
    body = f"""
import os, time, torch, hvdscale.torch as hvd
hvd.init()
model = torch.nn.Linear(3, 3)
plan = hvd.LocalSGD(2, overlap={overlap})
optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model=model, sync=plan)
for step in range(5):
    if step == 1:
        os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] = "3"
        time.sleep(8 * hvd.rank())
    optimizer.step()
optimizer.sync.flush()
"""
    output = launch(["-c", body], deadline_seconds=120).check()
    assert output.count("Rank 0 has waited 3 s for all ranks to make the same call") == 1
    assert "Rank 1 has waited" not in output
