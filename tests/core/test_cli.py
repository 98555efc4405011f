"""Promises of the command line: helpful help, errors in one message, nothing heavy imported to say so."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from hvdscale import __version__
from hvdscale.cli import doctor
from hvdscale.cli.main import main
from hvdscale.runtime.horovod_build import HOROVOD


@dataclass(frozen=True)
class Shown:
    returncode: int | str | None
    stdout: str
    stderr: str


Run = Callable[..., Shown]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line, as ``hvdscale`` would run it."""

    def run(*arguments: str) -> Shown:
        try:
            code: int | str | None = main(list(arguments))
        except SystemExit as end:
            code = end.code
        return Shown(code, *capsys.readouterr())

    return run


def test_version(run: Run) -> None:
    shown = run("--version")
    assert (shown.returncode, shown.stdout.strip()) == (0, f"hvdscale {__version__}")


def test_help_names_every_command(run: Run) -> None:
    shown = run("--help")
    assert shown.returncode == 0
    first_words = {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert {"build-horovod", "doctor", "run"} <= first_words


def test_help_of_the_build_explains_every_edit(run: Run) -> None:
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
def test_each_help_has_an_example_or_a_promise(run: Run, command: str, says: str) -> None:
    shown = run(command, "--help")
    assert shown.returncode == 0
    assert says in shown.stdout


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
def test_wrong_usage_exits_with_2(run: Run, arguments: list[str], says: str) -> None:
    shown = run(*arguments)
    assert shown.returncode == 2
    assert says in shown.stderr


def test_an_error_is_one_message_without_a_traceback(run: Run) -> None:
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
