"""Promises of the build: kept per user under a key of everything it depends on, whole or not there at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hvdscale.errors import BuildError
from hvdscale.runtime.horovod_build import HOROVOD, BuiltWheel, Progress, Source, build_horovod
from hvdscale.runtime.horovod_build.cache import build_facts, build_key, sha256_of
from hvdscale.runtime.horovod_build.toolchain import Toolchain
from tests.core.fake_tools import GOOD_TOOLS, make_archive, make_files, make_tools

TOOLCHAIN = Toolchain((("torch", "2.13.0"), ("tensorflow", "2.21.0")), "g++ 12", "cmake 3.25", "Open MPI 4.1.8")


class Machine:
    """A private cache, and an index that serves only ``files`` as Horovod."""

    def __init__(self, folder: Path, files: dict[str, str] | None = None) -> None:
        self.source = make_archive(folder / "index", files or make_files())
        self.cache = folder / "cache" / "hvdscale" / "horovod"
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("PIP_")},
            "PATH": f"{make_tools(folder / 'bin', GOOD_TOOLS)}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(folder / "cache"),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(folder / "index"),
        }

    def build(self, source: Source | None = None, **arguments: object) -> BuiltWheel:
        env = {**self.env, **arguments.pop("env", {})}
        return build_horovod(["torch"], env=env, source=source or self.source, **arguments)

    def leftovers(self) -> list[str]:
        return [path.name for path in self.cache.glob("*.building-*")]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def test_a_build_is_stored_with_its_record_and_used_again(machine: Machine, tmp_path: Path) -> None:
    stages: list[Progress] = []
    first = machine.build(report=stages.append)
    assert not first.reused
    assert first.path.parent.parent == machine.cache
    record = json.loads((first.path.parent / "build.json").read_text())
    assert record["source_sha256"] == machine.source.sha256
    assert record["edits_sha256"] == HOROVOD.edits_digest()
    assert set(record["frameworks"]) == {"torch"}
    assert record["wheel_sha256"] == sha256_of(first.path)
    assert {"python", "platform", "mpi", "compiler"} <= set(record)
    assert [p.fraction for p in stages if p.fraction is not None] == [0.0, 0.4, 1.0]
    assert machine.leftovers() == []

    second = machine.build(report=lambda progress: None, wheel_dir=tmp_path / "wheels")
    assert second.reused
    assert second.path == tmp_path / "wheels" / first.path.name
    assert sha256_of(second.path) == sha256_of(first.path)
    assert json.loads(second.path.with_suffix(".json").read_text()) == record


def test_the_compilation_gets_the_frameworks_asked_for(machine: Machine) -> None:
    machine.build()
    (log,) = machine.cache.glob("*.log")
    shown = log.read_text()
    assert "HOROVOD_WITH_PYTORCH=1" in shown
    assert "HOROVOD_WITHOUT_TENSORFLOW=1" in shown
    assert "HOROVOD_WITH_TENSORFLOW=None" in shown


def test_force_builds_again(machine: Machine) -> None:
    machine.build()
    again = machine.build(force=True)
    assert not again.reused
    assert again.path.is_file()
    assert machine.leftovers() == []


def test_a_damaged_wheel_is_built_again(machine: Machine) -> None:
    first = machine.build()
    first.path.write_bytes(first.path.read_bytes()[:-1])
    again = machine.build()
    assert not again.reused
    assert sha256_of(again.path) == again.record["wheel_sha256"]


def test_a_source_with_the_wrong_hash_is_refused_and_not_kept(machine: Machine) -> None:
    with pytest.raises(BuildError, match=HOROVOD.sha256):
        machine.build(source=HOROVOD)
    assert not list(machine.cache.rglob(HOROVOD.archive))
    assert not machine.build().reused


def test_an_index_without_the_source_is_an_error_that_names_pip(machine: Machine) -> None:
    with pytest.raises(BuildError, match="pip config list"):
        machine.build(env={"PIP_FIND_LINKS": os.devnull})


def test_a_source_damaged_on_disk_is_fetched_again(machine: Machine) -> None:
    machine.build()
    kept = machine.cache / "source" / HOROVOD.archive
    kept.write_bytes(b"half")
    machine.build(force=True)
    assert sha256_of(kept) == machine.source.sha256


def test_a_failed_compilation_shows_the_error_and_the_log(machine: Machine) -> None:
    with pytest.raises(BuildError, match="whole log: ") as error:
        machine.build(env={"FAIL_WITH": "mpi_ops.cc:7:1: fatal error: no_such_header.h: No such file"})
    message = str(error.value)
    assert "mpi_ops.cc:7:1: fatal error: no_such_header.h" in message
    assert len(message.splitlines()) <= 18
    log = Path(message.splitlines()[0].split("whole log: ")[1])
    assert "fatal error: no_such_header.h" in log.read_text()
    assert machine.leftovers() == []


def test_an_edit_that_does_not_match_leaves_nothing_behind(tmp_path: Path) -> None:
    machine = Machine(tmp_path, make_files(without="CMakeLists.txt"))
    with pytest.raises(BuildError, match="must match exactly once"):
        machine.build()
    assert machine.leftovers() == []
    assert not list(machine.cache.rglob("*.whl"))


@pytest.mark.parametrize("place", ["file", "file/inside"])
def test_a_folder_that_cannot_hold_the_wheel_is_refused_before_anything_is_built(
    machine: Machine, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot be put into"):
        machine.build(wheel_dir=tmp_path / place)
    assert not machine.cache.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_an_interrupted_build_is_completed_by_the_next(
    machine: Machine, tmp_path: Path, number: signal.Signals
) -> None:
    pause = tmp_path / "pause"
    pause.touch()
    arguments = (machine.source.version, machine.source.sha256)
    driver = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        "from hvdscale.runtime.horovod_build import HOROVOD, Source, build_horovod\n"
        f"build_horovod(['torch'], source=Source(*{arguments!r}, HOROVOD.edits), report=lambda p: print(p, flush=True))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", driver],
        env={**machine.env, "PAUSE_WHILE": str(pause)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert any("fraction=0.4" in line for line in process.stdout)
        process.send_signal(number)
        process.wait(20)
    finally:
        process.kill()
        pause.unlink()  # lets go of what a killed build left running
    assert process.returncode != 0
    assert not list(machine.cache.glob("*/*.whl"))
    built = machine.build()
    assert not built.reused
    assert machine.leftovers() == []


def test_a_second_build_of_the_same_waits_for_the_first(machine: Machine, tmp_path: Path) -> None:
    pause = tmp_path / "pause"
    pause.touch()
    driver = (
        "import sys\n"
        "from hvdscale.runtime.horovod_build import HOROVOD, Source, build_horovod\n"
        f"source = Source({machine.source.version!r}, {machine.source.sha256!r}, HOROVOD.edits)\n"
        "print(build_horovod(['torch'], source=source).reused)"
    )
    env = {**machine.env, "PAUSE_WHILE": str(pause)}
    both = [
        subprocess.Popen([sys.executable, "-c", driver], env=env, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    try:
        time.sleep(2)
        pause.unlink()
        answers = sorted(process.communicate(timeout=180)[0].strip() for process in both)
    finally:
        for process in both:
            process.kill()
    assert answers == ["False", "True"]


@pytest.mark.parametrize(
    "other",
    [
        {"frameworks": (("torch", "2.13.1"), ("tensorflow", "2.21.0"))},
        {"frameworks": (("torch", "2.13.0"),)},
        {"mpi": "Open MPI 4.1.9"},
    ],
    ids=str,
)
def test_the_key_changes_with_versions(other: dict[str, object]) -> None:
    key = build_key(build_facts(HOROVOD, TOOLCHAIN))
    assert build_key(build_facts(HOROVOD, replace(TOOLCHAIN, **other))) != key


@pytest.mark.parametrize("other", [{"sha256": "0" * 64}, {"edits": HOROVOD.edits[:2]}, {"version": "0.28.2"}], ids=str)
def test_the_key_changes_with_the_source(other: dict[str, object]) -> None:
    key = build_key(build_facts(HOROVOD, TOOLCHAIN))
    assert build_key(build_facts(replace(HOROVOD, **other), TOOLCHAIN)) != key


def test_the_key_is_the_same_for_the_same_facts_whatever_built_it() -> None:
    key = build_key(build_facts(HOROVOD, TOOLCHAIN))
    assert build_key(build_facts(HOROVOD, replace(TOOLCHAIN, compiler="clang 18", cmake="cmake 4"))) == key
