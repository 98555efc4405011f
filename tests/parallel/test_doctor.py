"""``hvdscale doctor`` proves what it says with real two-rank jobs, and fails when one of them does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdscale.cli.trials import Trial, planned_trials, run_trial
from hvdscale.runtime.horovod import installed_version
from tests.launcher import launch


def test_all_is_well_here() -> None:
    finished = launch(["-m", "hvdscale", "doctor", "--json"], launcher="alone", deadline_seconds=400)
    assert finished.returncode == 0, finished.output
    report = json.loads(finished.output[finished.output.index("{") :])
    assert report["well"] is True
    found = {(finding["section"], finding["name"]): finding for finding in report["findings"]}
    for section, name in [
        ("Software", "Python"),
        ("Software", "Keras backend"),
        ("Horovod", "build"),
        ("Horovod", "fits torch"),
        ("Horovod", "fits tensorflow"),
        ("MPI", "mpirun"),
        ("MPI", "mpi4py"),
        ("Machine", "cores"),
        ("Trials", "mpirun with mpi4py"),
        ("Trials", "all-reduce, torch"),
        ("Trials", "all-reduce, tensorflow"),
        ("Trials", "Keras fit, torch"),
        ("Trials", "Keras fit, tensorflow"),
    ]:
        assert found[section, name]["status"] == "ok", found[section, name]
    assert found["Software", "torch"]["value"] == installed_version("torch")
    assert {setting["name"] for setting in report["settings"]} >= {"OMP_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"}
    assert all(setting["reason"] for setting in report["settings"])
    advisories = {advisory["identifier"]: advisory for advisory in report["advisories"]}
    assert set(advisories) == {"CVE-2024-10190", "CVE-2026-31234"}
    assert all(advisory["touches"] and "mpirun" in advisory["avoids"] for advisory in advisories.values())


def test_an_optimizer_that_averages_nothing_fails_the_trial_of_fit() -> None:
    """What stock Horovod does under Keras 3: it trains, says nothing, and ranks drift apart."""
    script = (
        "import hvdscale.keras as hvd, hvdscale.cli.checks.fit as fit\n"
        "hvd.DistributedOptimizer = lambda optimizer: optimizer\n"
        "fit.main()"
    )
    finished = launch(["-c", script], env={"KERAS_BACKEND": "torch"}, deadline_seconds=180)
    assert finished.returncode not in (0, None)
    assert "gradients were not averaged" in finished.output


def test_a_trial_that_works_says_what_it_proved() -> None:
    finding = run_trial(Trial("mpirun with mpi4py", "mpi"))
    assert finding.status == "ok", finding.value
    assert "2 ranks" in finding.value
    assert "Open MPI" in finding.value


def test_a_trial_that_fails_shows_why_and_how_to_repeat_it() -> None:
    finding = run_trial(Trial("all-reduce", "allreduce", ("nosuchframework",), {"KERAS_BACKEND": "torch"}))
    assert finding.status == "fail"
    assert "exit code 1" in finding.value
    assert "No module named 'hvdscale.nosuchframework'" in finding.value
    assert "KERAS_BACKEND=torch hvdscale run -np 2 -m hvdscale.cli.checks.allreduce nosuchframework" in finding.advice


def test_a_trial_that_does_not_end_is_ended_at_the_deadline() -> None:
    start = time.monotonic()
    finding = run_trial(Trial("stuck", "allreduce", ("torch",)), deadline_seconds=0.3)
    assert finding.status == "fail"
    assert "not done after" in finding.value
    assert time.monotonic() - start < 15


def test_a_trial_leaves_no_rank_behind() -> None:
    run_trial(Trial("stuck", "mpi", (), {"MARK_OF_THIS_TEST": "here"}), deadline_seconds=0.5)
    time.sleep(1)
    marked = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        try:
            if b"MARK_OF_THIS_TEST=here" in environ.read_bytes():
                marked.append(environ.parent.name)
        except OSError:
            continue
    assert marked == []


def test_without_a_framework_or_mpi_it_says_so_and_fails() -> None:
    """A Python that sees none of this environment's packages but rich: everything is missing, nothing crashes."""
    script = (
        "import sys, importlib.metadata as m, importlib.util as u\n"
        "from hvdscale.cli.main import main\n"
        "names = ('torch', 'tensorflow', 'tensorflow-cpu', 'keras', 'horovod', 'mpi4py')\n"
        "version, find = m.version, u.find_spec\n"
        "def missing(name):\n"
        "    if name in names: raise m.PackageNotFoundError(name)\n"
        "    return version(name)\n"
        "m.version = missing\n"
        "u.find_spec = lambda name, *rest: None if name in names else find(name, *rest)\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=180, check=False)
    assert shown.returncode == 1, shown.stderr
    report = json.loads(shown.stdout)
    failed = {finding["name"]: finding["advice"] for finding in report["findings"] if finding["status"] == "fail"}
    assert report["well"] is False
    assert set(failed) == {"frameworks", "build", "mpi4py"}
    assert failed["build"] == "hvdscale build-horovod --install"
    assert all(failed.values())


@pytest.mark.parametrize(
    ("backend", "status"), [("torch", "ok"), ("tensorflow", "ok"), ("jax", "fail")], ids=lambda value: value
)
def test_the_keras_backend_in_force_is_judged(backend: str, status: str) -> None:
    from hvdscale.runtime.inspection import inspect

    findings = {finding.name: finding for finding in inspect({**os.environ, "KERAS_BACKEND": backend})}
    assert findings["Keras backend"].status == status
    assert findings["Keras backend"].value.startswith(f"{backend} (from KERAS_BACKEND")


def test_every_installed_framework_is_tried_twice() -> None:
    names = [trial.name for trial in planned_trials()]
    assert names == [
        "mpirun with mpi4py",
        "all-reduce, torch",
        "all-reduce, tensorflow",
        "Keras fit, torch",
        "Keras fit, tensorflow",
    ]
