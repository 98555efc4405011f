"""Find the installed Horovod and check, without importing it, that it fits the installed framework."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

from hvdscale.errors import BuildError

__all__ = ["HorovodBuild", "find_horovod", "installed_version", "require_horovod"]

BUILD_COMMAND = "hvdscale build-horovod --install"

# Our name of a framework -> the distributions that provide it, and Horovod's own name for it.
_DISTRIBUTIONS = {
    "torch": ("torch",),
    "tensorflow": ("tensorflow", "tensorflow-cpu", "tensorflow-gpu", "tensorflow-intel", "tf-nightly"),
    "keras": ("keras",),
}
_HOROVOD_NAMES = {"torch": "pytorch", "tensorflow": "tensorflow"}


@dataclass(frozen=True)
class HorovodBuild:
    """The installed Horovod: its version and the framework versions it was compiled against.

    ``gpu`` says what was built for GPUs, where torch was one for CUDA: ``"NCCL 2.28.9, CUDA 13.0"`` or ``"none"``.
    """

    version: str
    folder: Path
    built_for: dict[str, str]
    gpu: str = ""


def installed_version(framework: str) -> str | None:
    """Version of an installed framework (``"torch"``, ``"tensorflow"``, ``"keras"``), read without importing it."""
    for distribution in _DISTRIBUTIONS.get(framework, (framework,)):
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def find_horovod() -> HorovodBuild | None:
    """The Horovod on the import path, or ``None``."""
    spec = importlib.util.find_spec("horovod")
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        recorded = json.loads((folder / "metadata.json").read_text())
    except (OSError, ValueError):
        recorded = {}
    try:
        version = importlib.metadata.version("horovod")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    built_for = {ours: recorded[theirs] for ours, theirs in _HOROVOD_NAMES.items() if theirs in recorded}
    return HorovodBuild(version, folder, built_for, recorded.get("gpu", ""))


def require_horovod(framework: str) -> HorovodBuild:
    """Raise unless Horovod is installed and was built for the installed ``framework``.

    Raises:
        BuildError: naming what is missing or which versions differ, and the command that mends it.
    """
    installed = installed_version(framework)
    if installed is None:
        raise BuildError(
            f"hvdscale.{framework} needs {framework}, which is not installed. "
            f"Install it (`pip install 'hvdscale[{framework}]'`), then run `{BUILD_COMMAND}`."
        )
    build = find_horovod()
    if build is None:
        raise BuildError(
            f"hvdscale.{framework} needs Horovod, which is not installed. "
            f"Run `{BUILD_COMMAND}`: it builds Horovod for the frameworks installed here."
        )
    built_for = build.built_for.get(framework)
    if built_for is None:
        has = ", ".join(f"{k} {v}" for k, v in build.built_for.items()) or "no framework"
        raise BuildError(
            f"The installed Horovod {build.version} was built for {has}, not for {framework}. "
            f"Run `{BUILD_COMMAND}` to build it for the frameworks installed here."
        )
    if _series(built_for) != _series(installed):
        raise BuildError(
            f"The installed Horovod {build.version} was built for {framework} {built_for}, but {framework} "
            f"{installed} is installed; its compiled part fits one minor version only. "
            f"Run `{BUILD_COMMAND}` to build it anew, or install {framework} {_series(built_for)}."
        )
    return build


def _series(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])
