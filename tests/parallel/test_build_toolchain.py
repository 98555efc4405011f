"""Promises of the toolchain check: whatever is missing is named, with the command that installs it, before any work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from hvdscale.errors import BuildError
from hvdscale.runtime.horovod_build import toolchain
from hvdscale.runtime.horovod_build.toolchain import Toolchain, find_toolchain
from tests.core.fake_tools import GOOD_TOOLS, make_tools

Find = Callable[..., Toolchain]


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Find:
    """``find_toolchain`` on a machine that has only ``tools``; ``versions`` replace installed ones (None: missing)."""
    # A Python whose folder holds no tools of its own.
    monkeypatch.setattr(toolchain.sys, "executable", str(tmp_path / "python"))

    def find(
        frameworks: list[str] | None = None,
        tools: dict[str, str] | None = None,
        versions: dict[str, str | None] | None = None,
        **env: str,
    ) -> Toolchain:
        known = {"torch": "2.13.0", "tensorflow-cpu": "2.21.0", "setuptools": "80.1.0", **(versions or {})}

        def version(name: str) -> str:
            found = known.get(name)
            if found is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return found

        monkeypatch.setattr(importlib.metadata, "version", version)
        folder = make_tools(tmp_path / "bin", GOOD_TOOLS if tools is None else tools)
        return find_toolchain(frameworks, {"PATH": str(folder), **env})

    return find


def without(name: str) -> dict[str, str]:
    return {tool: body for tool, body in GOOD_TOOLS.items() if tool != name}


OLD_COMPILER = 'case "$*" in *--version*) echo "c++ 8.3.0";; *std=c++20*) exit 1;; esac'

MISSING = [
    # what differs from a good machine, what the error must say
    ({"tools": without("c++")}, ["a C++ compiler", "apt install g++"]),
    ({"tools": {**GOOD_TOOLS, "c++": OLD_COMPILER}}, ["C++20", "8.3.0"]),
    ({"CXX": "nosuchcompiler -O2"}, ["a C++ compiler", "CXX=nosuchcompiler"]),
    ({"tools": without("cmake")}, ["CMake 3.13", "pip install cmake"]),
    ({"tools": {**GOOD_TOOLS, "cmake": 'echo "cmake version 3.10.2"'}}, ["CMake 3.13", "3.10.2"]),
    ({"tools": {**GOOD_TOOLS, "cmake": "exit 1"}}, ["CMake 3.13", "broken"]),
    ({"tools": without("mpicxx")}, ["no mpicxx", "hvdscale[mpi]"]),
    ({"tools": {**GOOD_TOOLS, "mpicxx": "exit 1"}}, ["#include <mpi.h>", "hvdscale[mpi]"]),
    ({"versions": {"setuptools": None}}, ["setuptools: ", "'setuptools<81'"]),
    ({"versions": {"setuptools": "81.0.0"}}, ["setuptools below 81", "installed: 81.0.0", "'setuptools<81'"]),
    ({"versions": {"torch": None, "tensorflow-cpu": None}}, ["torch, tensorflow", "hvdscale[torch,tensorflow]"]),
    ({"frameworks": ["tensorflow"], "versions": {"tensorflow-cpu": None}}, ["tensorflow", "hvdscale[tensorflow]"]),
    ({"frameworks": ["torch", "mxnet"]}, ["Unknown framework 'mxnet'", "torch, tensorflow"]),
]


@pytest.mark.parametrize(("machine", "says"), MISSING, ids=[says[0] + says[1] for _, says in MISSING])
def test_what_is_missing_is_named_with_its_remedy(find: Find, machine: dict[str, object], says: list[str]) -> None:
    with pytest.raises(BuildError) as error:
        find(**machine)
    for words in says:
        assert words in str(error.value)
    assert len(str(error.value).splitlines()) < 24


@pytest.mark.parametrize(("module", "package"), [("pip", "ensurepip"), ("yaml", "PyYAML"), ("wheel", "wheel")])
def test_a_missing_python_package_is_named(
    find: Find, monkeypatch: pytest.MonkeyPatch, module: str, package: str
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == module else real(name, *rest))
    with pytest.raises(BuildError, match=package):
        find()


def test_missing_python_headers_are_named(find: Find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(BuildError, match="python3-dev"):
        find()


def test_everything_that_is_missing_is_named_at_once(find: Find) -> None:
    with pytest.raises(BuildError) as error:
        find(tools={}, versions={"setuptools": "84.0"})
    for words in ("C++ compiler", "CMake", "mpicxx", "setuptools"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("requested", "versions", "expected"),
    [
        (None, {}, {"torch": "2.13.0", "tensorflow": "2.21.0"}),
        (None, {"torch": None}, {"tensorflow": "2.21.0"}),
        (["tensorflow", "torch", "torch"], {}, {"torch": "2.13.0", "tensorflow": "2.21.0"}),
        (["torch"], {}, {"torch": "2.13.0"}),
    ],
)
def test_frameworks_are_those_asked_for_or_installed(
    find: Find, requested: list[str] | None, versions: dict[str, str | None], expected: dict[str, str]
) -> None:
    assert dict(find(requested, versions=versions).frameworks) == expected


def test_the_versions_of_the_tools_are_recorded(find: Find) -> None:
    found = find()
    assert (found.compiler, found.cmake, found.mpi) == (
        "c++ (Fake) 12.2.0",
        "cmake version 3.25.1",
        "mpirun (Open MPI) 4.1.8",
    )
