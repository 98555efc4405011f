"""What is installed here and whether it fits together, found without importing a framework."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdscale._version import __version__
from hvdscale.errors import BuildError, WorldError
from hvdscale.runtime.horovod import BUILD_COMMAND, HorovodBuild, find_horovod, installed_version, require_horovod
from hvdscale.runtime.horovod_build.cuda import torch_cuda
from hvdscale.runtime.launch import Launch
from hvdscale.runtime.settings import Setting, apply_settings, choose_settings, usable_cores

__all__ = ["ADVISORIES", "Advisory", "Finding", "Status", "inspect", "keras_backend", "local_settings"]

Status = Literal["ok", "note", "fail"]

_FRAMEWORKS = ("torch", "tensorflow")


@dataclass(frozen=True)
class Finding:
    """One fact. ``note`` is worth knowing, ``fail`` must be mended; ``advice`` is the next step."""

    section: str
    name: str
    value: str
    status: Status = "ok"
    advice: str = ""


@dataclass(frozen=True)
class Advisory:
    """A known security hole of Horovod 0.28.1 and before, and the ways of launching it touches."""

    identifier: str
    hole: str
    touches: tuple[str, ...]
    avoids: tuple[str, ...] = ("mpirun", "srun", "hvdscale run (which is mpirun)")


ADVISORIES = (
    Advisory(
        "CVE-2024-10190",
        "the elastic rendezvous server runs code it is sent; it listens on all interfaces",
        ("elastic jobs: horovodrun --host-discovery-script",),
    ),
    Advisory(
        "CVE-2026-31234",
        "the key-value store of horovod.run() runs code it is sent; it listens on all interfaces",
        ("horovod.run() from Python",),
    ),
)


def inspect(env: Mapping[str, str] | None = None) -> list[Finding]:
    """Every fact about Python, frameworks, Horovod, MPI and the machine, in the order they are shown."""
    env = os.environ if env is None else env
    return [*_software(env), *_horovod(), *_mpi(env), *_machine()]


def keras_backend(env: Mapping[str, str] | None = None) -> tuple[str, str]:
    """The backend Keras will pick, and what decides it."""
    env = os.environ if env is None else env
    if env.get("KERAS_BACKEND"):
        return env["KERAS_BACKEND"], "KERAS_BACKEND"
    folder = Path(env["KERAS_HOME"]) if env.get("KERAS_HOME") else Path.home() / ".keras"
    try:
        recorded = json.loads((folder / "keras.json").read_text()).get("backend")
    except (OSError, ValueError, AttributeError):
        recorded = None
    return (str(recorded), str(folder / "keras.json")) if recorded else ("tensorflow", "Keras's default")


def local_settings(ranks: int = 2, env: Mapping[str, str] | None = None) -> tuple[Setting, ...]:
    """The settings in force when ``ranks`` ranks are started here with mpirun, each with its reason."""
    chosen = choose_settings(Launch("mpirun (Open MPI)", "mpi", 0, ranks, 0, ranks), usable_cores())
    return apply_settings(chosen, dict(os.environ if env is None else env), mpi_running=False)


def _software(env: Mapping[str, str]) -> list[Finding]:
    found = [
        Finding("Software", "hvdscale", __version__),
        Finding("Software", "Python", f"{platform.python_version()} ({sys.executable})"),
    ]
    for name in (*_FRAMEWORKS, "keras"):
        version = installed_version(name)
        advice = "" if version else f"pip install 'hvdscale[{name}]', if you use it"
        found.append(Finding("Software", name, version or "not installed", "ok" if version else "note", advice))
    if not any(installed_version(name) for name in _FRAMEWORKS):
        advice = "pip install 'hvdscale[torch]' or 'hvdscale[tensorflow]'"
        found.append(Finding("Software", "frameworks", "neither torch nor tensorflow is installed", "fail", advice))
    if installed_version("keras"):
        found.append(_backend(*keras_backend(env)))
    return found


def _backend(backend: str, why: str) -> Finding:
    value = f"{backend} (from {why})"
    if backend not in _FRAMEWORKS:
        return Finding("Software", "Keras backend", value, "fail", "set KERAS_BACKEND to torch or tensorflow")
    if installed_version(backend) is None:
        return Finding("Software", "Keras backend", f"{value}, not installed", "fail", "set KERAS_BACKEND to the other")
    return Finding("Software", "Keras backend", value)


def _horovod() -> list[Finding]:
    build = find_horovod()
    if build is None:
        return [Finding("Horovod", "build", "not installed", "fail", BUILD_COMMAND)]
    built_for = ", ".join(f"{name} {version}" for name, version in build.built_for.items()) or "no framework"
    found = [Finding("Horovod", "build", f"{build.version}, built for {built_for}")]
    for name in filter(installed_version, _FRAMEWORKS):
        try:
            require_horovod(name)
        except BuildError as error:
            found.append(Finding("Horovod", f"fits {name}", str(error), "fail", BUILD_COMMAND))
        else:
            found.append(Finding("Horovod", f"fits {name}", f"yes, {installed_version(name)} is installed"))
    return [*found, *_gpus(build)]


def _gpus(build: HorovodBuild) -> list[Finding]:
    """How tensors on GPUs will travel; nothing to say where torch knows no CUDA."""
    cuda = torch_cuda()
    if cuda is None:
        return []
    if build.gpu not in ("", "none"):
        return [Finding("Horovod", "tensors on GPUs", f"by {build.gpu}; torch is for CUDA {cuda}")]
    value = f"copied through the host's memory: built without NCCL (torch is for CUDA {cuda})"
    advice = f"for GPUs: {BUILD_COMMAND} --frameworks torch --gpu nccl"
    return [Finding("Horovod", "tensors on GPUs", value, "note", advice)]


def _mpi(env: Mapping[str, str]) -> list[Finding]:
    path = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    remedy = "pip install 'hvdscale[mpi]'"
    mpirun = shutil.which("mpirun", path=path)
    found = []
    if mpirun is None:
        found.append(Finding("MPI", "mpirun", "not found", "fail", remedy))
    else:
        found.append(Finding("MPI", "mpirun", f"{_version_of(mpirun)}: {mpirun}"))
        first = shutil.which("mpirun", path=env.get("PATH", ""))
        if first != mpirun:
            advice = f"put {Path(mpirun).parent} first on PATH (activate the environment), or use `hvdscale run`"
            found.append(Finding("MPI", "mpirun on PATH", first or "none", "note", advice))
    version = installed_version("mpi4py")
    found.append(
        Finding("MPI", "mpi4py", version or "not installed", "ok" if version else "fail", "" if version else remedy)
    )
    return found


def _version_of(mpirun: str) -> str:
    try:
        shown = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=30, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WorldError(f"{mpirun} does not run ({error}). Reinstall MPI: pip install 'hvdscale[mpi]'") from error
    return next((line.strip() for line in shown.splitlines() if line.strip()), "version unknown")


def _machine() -> list[Finding]:
    found = [Finding("Machine", "cores", f"{usable_cores()} usable of {os.cpu_count()}")]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[key].split()[0]) / 2**20 for key in ("MemTotal", "MemAvailable"))
    except (OSError, ValueError, KeyError):
        return found
    return [*found, Finding("Machine", "memory", f"{free:.1f} GiB free of {total:.1f} GiB")]
