"""``hvdscale run`` becomes the launcher: output, exit codes and signals of a real job pass through."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launcher import LAUNCHERS, Finished, launch

SAY = """
import os, sys
from hvdscale.runtime.launch import read_launch
launch = read_launch()
threads = os.environ.get("OMP_NUM_THREADS")
print(f"<rank {launch.rank} of {launch.size} {launch.controller} {threads} {sys.argv[1:]}>\\n", end="")
"""

FAIL = """
import os, sys, time
rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("HOROVOD_RANK")))
if rank == 1:
    raise ValueError("the reason of the failure")
time.sleep(60)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "job.py"


def run(*arguments: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> Finished:
    """``hvdscale run`` under the hard deadline of the tests' launcher."""
    words = [str(argument) for argument in arguments]
    return launch(["-m", "hvdscale", "run", *words], launcher="alone", deadline_seconds=90, cwd=cwd, env=env)


@pytest.mark.parametrize(("ranks", "controller"), [(1, "mpi"), (2, "mpi"), (3, "mpi"), (2, "gloo")])
def test_every_rank_runs_the_script_with_its_arguments(script: Path, ranks: int, controller: str) -> None:
    script.write_text(SAY)
    output = run("-np", str(ranks), "--controller", controller, script, "--lr", "0.1", "a b").check()
    for rank in range(ranks):
        assert f"<rank {rank} of {ranks} {controller} " in output
    assert output.count("['--lr', '0.1', 'a b']>") == ranks


def test_a_module_runs_as_with_python_m(script: Path) -> None:
    script.write_text(SAY)
    output = run("-np", "2", "-m", "job", "x", cwd=script.parent, env={"PYTHONPATH": f"{Path.cwd()}:."}).check()
    assert output.count("['x']>") == 2


def test_the_users_number_of_threads_wins(script: Path) -> None:
    script.write_text(SAY)
    assert run("-np", "2", script, env={"OMP_NUM_THREADS": "7"}).check().count(" mpi 7 ") == 2


@pytest.mark.parametrize("code", [1, 3])
def test_the_exit_code_of_a_rank_is_the_jobs(script: Path, code: int) -> None:
    script.write_text(f"import sys; sys.exit({code})")
    assert run("-np", "2", script).returncode == code


def test_the_traceback_of_the_failing_rank_is_the_last_thing_shown(script: Path) -> None:
    script.write_text(FAIL)
    finished = run("-np", "2", script)
    assert finished.returncode == 1
    assert finished.output.rstrip().endswith("ValueError: the reason of the failure")
    assert finished.seconds < 30


def test_it_works_with_nothing_of_mpi_in_the_environment(script: Path) -> None:
    """No OMPI_ALLOW_RUN_AS_ROOT, no activated environment: root too needs nothing but the command."""
    script.write_text(SAY)
    command = [sys.executable, "-m", "hvdscale", "run", "-np", "2", str(script)]
    bare = {"PATH": "/usr/bin:/bin", "HOME": os.environ.get("HOME", "/"), "PYTHONPATH": str(Path.cwd())}
    with started(command, bare) as process:
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "<rank 1 of 2 mpi " in output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_ends_every_rank(script: Path, tmp_path: Path, number: signal.Signals) -> None:
    script.write_text(f"""
import os, pathlib, time
pathlib.Path({str(tmp_path)!r}, f"{{os.environ['OMPI_COMM_WORLD_RANK']}}.pid").write_text(str(os.getpid()))
time.sleep(60)
""")
    command = [sys.executable, "-m", "hvdscale", "run", "-np", "2", str(script)]
    with started(command, {**os.environ, "PYTHONPATH": str(Path.cwd())}) as process:
        ranks = [int(text) for text in wait_for(tmp_path, 2)]
        process.send_signal(number)
        process.communicate(timeout=120)
    assert process.returncode != 0
    deadline = time.monotonic() + 10
    while any(alive(rank) for rank in ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(rank) for rank in ranks)


def test_the_printed_command_really_starts_the_job(script: Path) -> None:
    script.write_text(SAY)
    printed = run("-np", "2", "--dry-run", script).check().strip()
    assert LAUNCHERS["mpirun"][0] in printed
    with started(["bash", "-c", printed], {**os.environ, "PYTHONPATH": str(Path.cwd())}) as process:
        output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    assert "<rank 1 of 2 mpi " in output


@contextmanager
def started(command: list[str], env: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(folder: Path, count: int) -> list[str]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        texts = [path.read_text() for path in folder.glob("*.pid")]
        if len(texts) == count and all(texts):
            return texts
        time.sleep(0.05)
    raise AssertionError(f"only {len(texts)} of {count} ranks came up")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
