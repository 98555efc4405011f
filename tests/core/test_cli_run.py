"""Promises of ``hvdscale run``: the exact command, the settings ``init()`` would choose, one-line errors."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import pytest

from hvdscale.cli.main import main
from hvdscale.errors import WorldError
from hvdscale.runtime import command
from hvdscale.runtime.command import Command, Host, Job, compose, parse_hosts
from hvdscale.runtime.launch import Launch
from hvdscale.runtime.settings import FRONT, apply_settings, choose_settings, usable_cores

SCRIPT = ("train.py", "--lr", "0.1")


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A user's environment in which both launchers are on PATH."""
    return {"PATH": f"{Path(sys.executable).parent}{os.pathsep}/usr/bin", "HOME": str(tmp_path)}


def words_after(argv: tuple[str, ...], flag: str) -> list[str]:
    return [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == flag]


def test_mpirun_is_quiet_and_leaves_threads_unbound(env: dict[str, str]) -> None:
    argv = compose(Job(2, SCRIPT), env).argv
    assert Path(argv[0]).name == "mpirun"
    assert Path(argv[0]).is_absolute()
    assert words_after(argv, "-np") == ["2"]
    assert words_after(argv, "--bind-to") == ["none"]
    assert "--quiet" in argv
    assert argv[-4:] == (sys.executable, *SCRIPT)


@pytest.mark.parametrize(("user", "expected"), [(0, True), (1000, False)])
def test_root_is_allowed_only_as_root(
    env: dict[str, str], monkeypatch: pytest.MonkeyPatch, user: int, expected: bool
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    assert ("--allow-run-as-root" in compose(Job(2, SCRIPT), env).argv) is expected


@pytest.mark.parametrize(
    ("ranks", "hosts", "managed", "expected"),
    [
        (4, (), False, False),
        (5, (), False, True),
        (5, (), True, False),
        (4, (Host("a", 2), Host("b", 2)), False, False),
        (5, (Host("a", 2), Host("b", 2)), False, True),
    ],
)
def test_oversubscribe_when_ranks_exceed_slots(
    env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    hosts: tuple[Host, ...],
    managed: bool,
    expected: bool,
) -> None:
    monkeypatch.setattr(command, "_physical_cores", lambda: 4)
    users = {**env, "SLURM_JOB_ID": "7"} if managed else env
    assert ("--oversubscribe" in compose(Job(ranks, SCRIPT, hosts), users).argv) is expected


def test_settings_are_those_that_init_would_choose(env: dict[str, str]) -> None:
    made = compose(Job(2, SCRIPT), env)
    chosen = choose_settings(Launch("mpirun (Open MPI)", "mpi", 0, 2, 0, 2), usable_cores())
    assert made.settings == chosen
    assert made.variables == {**{s.name: s.value for s in chosen}, FRONT: ",".join(s.name for s in chosen)}


def test_the_users_settings_win_and_are_left_alone(env: dict[str, str]) -> None:
    users = {**env, "OMP_NUM_THREADS": "7", "OMPI_MCA_mpi_yield_when_idle": "0"}
    assert not {"OMP_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"} & set(compose(Job(2, SCRIPT), users).variables)


def test_settings_of_run_are_not_taken_for_the_users(env: dict[str, str]) -> None:
    users = {**env, "OMP_NUM_THREADS": "7"}
    made = compose(Job(2, SCRIPT), users)
    seen = apply_settings(
        choose_settings(Launch("mpirun (Open MPI)", "mpi", 0, 2, 0, 2), usable_cores()),
        {**users, **made.variables},
        mpi_running=False,
    )
    origins = {setting.name: setting.origin for setting in seen}
    assert origins.pop("OMP_NUM_THREADS") == "user"
    assert origins
    assert set(origins.values()) == {"hvdscale"}


def test_other_hosts_get_the_environment_and_settle_their_own_threads(env: dict[str, str]) -> None:
    users = {**env, "PYTHONPATH": "/p", "KERAS_BACKEND": "torch", "HVDSCALE_X": "1", "TF_X": "1", "SECRET": "s"}
    made = compose(Job(4, SCRIPT, (Host("a", 2), Host("b", 2))), users)
    exported = words_after(made.argv, "-x")
    assert {"PATH", "PYTHONPATH", "KERAS_BACKEND", "HVDSCALE_X", "TF_X", FRONT} <= set(exported)
    assert not {"SECRET", "HOME"} & set(exported)
    assert words_after(made.argv, "-H") == ["a:2,b:2"]
    assert not any("THREADS" in name for name in made.variables)
    assert "OMPI_MCA_coll_tuned_use_dynamic_rules" in made.variables


def test_hosts_that_are_all_here_need_no_export(env: dict[str, str]) -> None:
    assert "-x" not in compose(Job(2, SCRIPT, (Host("localhost", 2),)), env).argv


@pytest.mark.parametrize(("users", "added"), [({}, "1"), ({"TF_CPP_MIN_LOG_LEVEL": "0"}, None)])
def test_horovodrun_is_kept_from_showing_notices(env: dict[str, str], users: dict[str, str], added: str | None) -> None:
    command = compose(Job(2, ("train.py",), (), "gloo"), {**env, **users})
    assert command.variables.get("TF_CPP_MIN_LOG_LEVEL") == added


def test_gloo_goes_through_horovodrun(env: dict[str, str]) -> None:
    argv = compose(Job(3, ("-m", "pkg.train"), (Host("a", 2), Host("b", 1)), "gloo"), env).argv
    assert Path(argv[0]).name == "horovodrun"
    assert argv[1:] == ("--gloo", "-np", "3", "-H", "a:2,b:1", sys.executable, "-m", "pkg.train")


def test_the_printed_command_is_the_command(env: dict[str, str]) -> None:
    made = compose(Job(2, ("train.py", "--name", "it's $HOME; rm *")), env)
    words = shlex.split(str(made))
    count = len(made.variables)
    assert dict(word.split("=", 1) for word in words[:count]) == made.variables
    assert tuple(words[count:]) == made.argv


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", (Host("a", 1),)),
        ("a:2,b-1.example.org:16", (Host("a", 2), Host("b-1.example.org", 16))),
        ("10.0.0.1:1, 10.0.0.2:1", (Host("10.0.0.1", 1), Host("10.0.0.2", 1))),
    ],
)
def test_host_lists(text: str, hosts: tuple[Host, ...]) -> None:
    assert parse_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "a:", "a:0", "a:-1", "a:x", "a b", "-a", "a:1:2", "a,,b", "a:1,a:2"])
def test_bad_host_lists(text: str) -> None:
    with pytest.raises(WorldError, match="Bad host list"):
        parse_hosts(text)


def test_a_rank_cannot_start_a_job(env: dict[str, str]) -> None:
    with pytest.raises(WorldError, match="a rank already"):
        compose(Job(2, SCRIPT), {**env, "OMPI_COMM_WORLD_RANK": "1"})


def test_a_missing_launcher_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(command.sys, "executable", str(tmp_path / "python"))
    for controller, name, remedy in (("mpi", "mpirun", "hvdscale[mpi]"), ("gloo", "horovodrun", "build-horovod")):
        with pytest.raises(WorldError, match=name) as error:
            compose(Job(2, SCRIPT, (), controller), {"PATH": str(tmp_path)})
        assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-np", "2", "missing.py"], "No such script: missing.py"),
        (["-np", "2"], "Nothing to run"),
        (["-np", "2", "-m"], "Nothing to run"),
        (["-np", "0", __file__], "at least 1 rank"),
        (["-np", "-3", __file__], "at least 1 rank"),
        (["-np", "2", "-H", "a:b", __file__], "Bad host list"),
        (["-np", "2", "-H", "", __file__], "Bad host list"),
    ],
    ids=lambda value: " ".join(map(os.path.basename, value)) if isinstance(value, list) else "",
)
def test_errors_are_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", *arguments]) == 1
    shown = capsys.readouterr().err
    assert says in shown
    assert len(shown.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "program"),
    [
        ([__file__], [__file__]),
        ([__file__, "-np", "3", "--dry-run", "-m", "x"], [__file__, "-np", "3", "--dry-run", "-m", "x"]),
        (["-m", "pkg.mod"], ["-m", "pkg.mod"]),
        (["-m", "pkg.mod", "--lr", "1", "-m", "x"], ["-m", "pkg.mod", "--lr", "1", "-m", "x"]),
    ],
)
def test_everything_after_the_script_is_the_scripts(
    arguments: list[str], program: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "-np", "2", "--dry-run", *arguments]) == 0
    words = shlex.split(capsys.readouterr().out)
    assert words[words.index(sys.executable) + 1 :] == program


def test_a_command_without_settings_sets_nothing() -> None:
    assert Command(("mpirun", "a b"), ()).variables == {}
    assert str(Command(("mpirun", "a b"), ())) == "mpirun 'a b'"
