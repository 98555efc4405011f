"""Promises of the command line: helpful help, errors in one message, nothing heavy imported to say so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hvdscale import __version__
from hvdscale.cli import doctor
from hvdscale.cli.main import main
from hvdscale.runtime.horovod_build import HOROVOD


def run(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hvdscale", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


def test_version() -> None:
    shown = run("--version")
    assert (shown.returncode, shown.stdout.strip()) == (0, f"hvdscale {__version__}")


def test_help_names_every_command() -> None:
    shown = run("--help")
    assert shown.returncode == 0
    first_words = {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert {"build-horovod", "doctor", "run"} <= first_words


def test_help_of_the_build_explains_every_edit() -> None:
    shown = run("build-horovod", "--help").stdout
    for edit in HOROVOD.edits:
        assert f"{edit.file}: {edit.why}" in shown


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("build-horovod", "hvdscale build-horovod --install                  build for everything installed here"),
        ("doctor", "The exit code is 0 only if all is well."),
        ("run", "hvdscale run -np 8 -H node1:4,node2:4 train.py     4 ranks on each of two hosts, over ssh"),
    ],
)
def test_each_help_has_an_example_or_a_promise(command: str, says: str) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert says in shown.stdout


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, json\n"
        "from hvdscale.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(shown.stdout.splitlines()[-1]))
    assert "hvdscale.cli.main" in loaded
    assert not {"torch", "tensorflow", "keras", "horovod", "mpi4py", "numpy", "rich"} & loaded


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        (["run", "script.py"], "-np"),
        (["run", "-np", "two", "script.py"], "invalid int value"),
        (["run", "-np", "2", "--controller", "smoke", "script.py"], "invalid choice: 'smoke'"),
        (["doctor", "--yaml"], "--yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_usage_exits_with_2(arguments: list[str], says: str) -> None:
    shown = run(*arguments)
    assert shown.returncode == 2
    assert says in shown.stderr


def test_an_error_is_one_message_without_a_traceback() -> None:
    shown = run("build-horovod", "--frameworks", "mxnet")
    assert shown.returncode == 1
    assert shown.stdout.count("Traceback") + shown.stderr.count("Traceback") == 0
    assert shown.stderr.startswith("hvdscale: Unknown framework 'mxnet'")


def test_an_interrupt_exits_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(arguments: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "_doctor", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "hvdscale: interrupted\n"


def test_an_error_of_the_system_is_one_message(tmp_path: Path) -> None:
    """A cache that cannot be made: its parent is a file."""
    (tmp_path / "file").touch()
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    shown = run("build-horovod", env=env)
    assert shown.returncode == 1
    assert shown.stderr.startswith("hvdscale: ")
    assert str(tmp_path / "file") in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_reader_that_leaves_is_not_an_error_message(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    command = f"{sys.executable} -m hvdscale run -np 2 --dry-run {script} | true"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert shown.stderr == ""
