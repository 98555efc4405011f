"""ci/setup, run with a Python that only takes notes: interrupted anywhere it completes, done it does nothing."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.launcher import REPOSITORY

SOURCES = ("ci/setup", "ci/requirements.txt", "pyproject.toml", "setup.py", "hvdscale/runtime/horovod_build")

# Notes its arguments in $NOTES. `-m venv DIR` puts itself there. Where a note holds $KILL_AT, the set-up is killed.
PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$NOTES"
if [[ "$1 $2" == "-m venv" ]]; then
  mkdir -p "$3/bin"
  cp "$0" "$3/bin/python"
fi
if [[ -n "${KILL_AT-}" && "$*" == *"$KILL_AT"* ]]; then kill -9 "$PPID"; fi
exit 0
"""

INSTALLED = ["torch==", "--requirement ci/requirements.txt", "--editable .", "hvdscale build-horovod --install"]

Setup = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what ci/setup looks at."""
    for name in SOURCES:
        target = tmp_path / "tree" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, target)
    return tmp_path / "tree"


@pytest.fixture
def setup(tree: Path, tmp_path: Path, notes: Path) -> Setup:
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("c++", "cmake"):
        (tools / tool).symlink_to(python)

    def run(kill_at: str = "") -> subprocess.CompletedProcess[str]:
        notes.write_text("")
        path = f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin"
        env = {"PATH": path, "PYTHON": str(python), "NOTES": str(notes), "KILL_AT": kill_at}
        command = ["bash", str(tree / "ci" / "setup")]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=180, check=False)

    return run


def done(notes: Path) -> list[str]:
    """What was asked of Python, without questions that change nothing."""
    return [
        line for line in notes.read_text().splitlines() if not line.startswith(("-c ", "-m pip --version", "--ver"))
    ]


def assert_all_was_installed(notes: Path) -> None:
    lines = [line for line in done(notes) if "venv" not in line.split()[:2]]
    assert len(lines) == len(INSTALLED), lines
    for line, wanted in zip(lines, INSTALLED, strict=True):
        assert wanted in line


def test_everything_is_installed_once(setup: Setup, notes: Path) -> None:
    first = setup()
    assert first.returncode == 0, first.stderr
    assert done(notes)[0].startswith("-m venv")
    assert_all_was_installed(notes)
    second = setup()
    assert (second.returncode, second.stderr, done(notes)) == (0, "", [])


@pytest.mark.parametrize(
    ("kill_at", "anew"),
    [
        ("-m venv", False),
        ("torch==", True),
        ("--requirement", True),
        ("--editable", True),
        ("build-horovod", False),
    ],
)
def test_interrupted_it_completes(kill_at: str, anew: bool, setup: Setup, tree: Path, notes: Path) -> None:
    """A virtual environment in which pip was writing may hold half a package: it is made anew."""
    assert setup(kill_at).returncode == -9
    assert kill_at in done(notes)[-1]
    half = tree / ".venv" / "half a package"
    half.touch()
    second = setup()
    assert second.returncode == 0, second.stderr
    assert half.exists() != anew
    assert_all_was_installed(notes)
    assert setup().returncode == 0
    assert done(notes) == []


@pytest.mark.parametrize("name", ["ci/requirements.txt", "pyproject.toml", "hvdscale/runtime/horovod_build/source.py"])
def test_a_change_of_what_it_installs_is_seen(name: str, setup: Setup, tree: Path, notes: Path) -> None:
    setup()
    with (tree / name).open("a") as file:
        file.write("\n# changed\n")
    assert setup().returncode == 0
    assert_all_was_installed(notes)


def test_an_environment_that_lost_its_python_is_made_anew(setup: Setup, tree: Path, notes: Path) -> None:
    setup()
    (tree / ".venv/bin/python").write_text("#!/bin/false\n")
    finished = setup()
    assert finished.returncode == 0, finished.stderr
    assert "making .venv anew" in finished.stderr
    assert_all_was_installed(notes)


def test_a_python_that_does_not_run_is_named(setup: Setup, tmp_path: Path) -> None:
    (tmp_path / "python").write_text("#!/bin/false\n")
    finished = setup()
    assert finished.returncode != 0
    assert f"PYTHON={tmp_path / 'python'} does not run" in finished.stderr
