"""From nothing to an installed Horovod wheel: check, fetch, edit, compile, store, install."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from hvdscale.errors import BuildError
from hvdscale.runtime.horovod_build.cache import (
    BuiltWheel,
    Store,
    build_facts,
    build_key,
    cache_folder,
    sha256_of,
)
from hvdscale.runtime.horovod_build.cuda import gpu_environment
from hvdscale.runtime.horovod_build.edits import HOROVOD
from hvdscale.runtime.horovod_build.source import Source, environment, fetch_source, unpack
from hvdscale.runtime.horovod_build.toolchain import Toolchain, find_toolchain, tool_path
from hvdscale.runtime.process import Finished, stream
from hvdscale.runtime.settings import usable_cores

__all__ = ["BuiltWheel", "Progress", "build_horovod", "install_wheel"]

_PERCENT = re.compile(r"^\s*\[\s*(\d{1,3})%\]")
_CAUSE = re.compile(r"error: |CMake Error|undefined reference|No space left on device|Killed|MemoryError")
_SHOWN_LINES = 15


@dataclass(frozen=True)
class Progress:
    """Where a build is: the name of its stage and, while compiling, the share done in 0..1."""

    stage: str
    fraction: float | None = None


Report = Callable[[Progress], None]


def build_horovod(
    frameworks: Sequence[str] | None = None,
    *,
    wheel_dir: Path | None = None,
    force: bool = False,
    env: Mapping[str, str] | None = None,
    source: Source = HOROVOD,
    archive: Path | None = None,
    gpu: str = "auto",
    report: Report = lambda progress: None,
) -> BuiltWheel:
    """Build Horovod for the installed ``frameworks`` (default: all of them), or find the wheel built earlier.

    Args:
        wheel_dir: also copy the wheel and its record there.
        force: build again even if the wheel is there.
        env: environment of the build (default: this process's).
        source: the release to build.
        archive: its file, on a machine that cannot fetch it.
        gpu: ``"nccl"``, ``"none"``, or ``"auto"``: NCCL where torch is made for CUDA and all it needs is here.
        report: called at every change of stage and of the share compiled.

    Raises:
        BuildError: something is missing, the source is not the pinned one, or the compilation failed.
    """
    env = dict(os.environ if env is None else env)
    report(Progress("checking what is needed"))
    toolchain = find_toolchain(frameworks, env, gpu)
    if toolchain.cuda is not None and toolchain.cuda.note:
        report(Progress(toolchain.cuda.note))
    if wheel_dir is not None:
        _check_folder(wheel_dir)
    facts = build_facts(source, toolchain)
    key = build_key(facts)
    store = Store(cache_folder(env))
    with store.lock(key):
        built = None if force else store.find(key)
        if built is None:
            built = _build(store, key, source, archive, facts, toolchain, env, report)
    if wheel_dir is not None:
        built = _copy(built, wheel_dir)
    return built


def _build(
    store: Store,
    key: str,
    source: Source,
    archive: Path | None,
    facts: Mapping[str, object],
    toolchain: Toolchain,
    env: Mapping[str, str],
    report: Report,
) -> BuiltWheel:
    log_path = store.folder / f"{key}.log"
    names = [name for name, _ in toolchain.frameworks]
    cuda = toolchain.cuda
    with store.workspace(key) as workspace, log_path.open("w") as log:
        plain_env = {**environment(env, names, usable_cores() + 1), "PATH": tool_path(env)}
        build_env = gpu_environment(plain_env, cuda, workspace)

        def run(command: Sequence[str], folder: Path) -> Finished:
            return stream(command, env=build_env, cwd=folder, on_line=_watcher(log, report))

        report(Progress("fetching the source"))
        fetched = fetch_source(source, store.folder / "source", run, archive)
        report(Progress(f"applying {len(source.all_edits(cuda is not None))} edits"))
        root = unpack(source, fetched, workspace, cuda is not None)
        report(Progress("compiling", 0.0))
        wheel = _compile(root, workspace / "wheel", run, log_path)
        report(Progress("storing the wheel"))
        record = {**facts, "compiler": toolchain.compiler, "cmake": toolchain.cmake}
        return store.put(key, wheel, record, workspace)


def _compile(root: Path, target: Path, run: Callable[[Sequence[str], Path], Finished], log_path: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    finished = run([*pip, "--wheel-dir", str(target), str(root)], root)
    wheels = list(target.glob("horovod-*.whl"))
    if finished.returncode != 0 or len(wheels) != 1:
        raise BuildError(f"Horovod did not compile. The whole log: {log_path}\n\n{_cause(finished.output)}")
    return wheels[0]


def _watcher(log: TextIO, report: Report) -> Callable[[str], None]:
    """Write every line to the log; report the highest percentage make has shown."""
    highest = 0

    def on_line(line: str) -> None:
        nonlocal highest
        log.write(line + "\n")
        match = _PERCENT.match(line)
        if match and int(match[1]) > highest:
            highest = int(match[1])
            report(Progress("compiling", highest / 100))

    return on_line


def _cause(output: str) -> str:
    """The lines from the first error on; the end of the output if none says it is one."""
    lines = [line for line in output.splitlines() if line.strip()]
    first = next((i for i, line in enumerate(lines) if _CAUSE.search(line)), max(0, len(lines) - _SHOWN_LINES))
    return "\n".join(line[:200] for line in lines[first : first + _SHOWN_LINES])


def _check_folder(folder: Path) -> None:
    """Make sure that the wheel can be put there, before minutes are spent on it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"The wheel cannot be put into {folder} ({error.strerror}). Choose another folder.") from error
    if not os.access(folder, os.W_OK):
        raise BuildError(f"The wheel cannot be put into {folder}: no permission to write. Choose another folder.")


def _copy(built: BuiltWheel, folder: Path) -> BuiltWheel:
    target = folder / built.path.name
    part = folder / f".{target.name}.{os.getpid()}"
    shutil.copyfile(built.path, part)
    part.replace(target)
    target.with_suffix(".json").write_text(json.dumps(dict(built.record), indent=2) + "\n")
    return BuiltWheel(target, built.record, built.reused)


def install_wheel(built: BuiltWheel, *, force: bool = False) -> bool:
    """Install the wheel into this environment; return whether it was not the one installed already.

    Raises:
        BuildError: pip refused it.
    """
    if not force and _installed_sha256() == sha256_of(built.path):
        return False
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--force-reinstall"]
    finished = stream([*pip, str(built.path)])
    if finished.returncode != 0:
        raise BuildError(f"pip could not install {built.path}:\n{_cause(finished.output)}")
    return True


def _installed_sha256() -> str | None:
    """SHA-256 of the wheel the installed Horovod came from, as pip recorded it."""
    try:
        text = importlib.metadata.distribution("horovod").read_text("direct_url.json")
        archive = json.loads(text or "{}").get("archive_info", {})
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    recorded = archive.get("hashes", {}).get("sha256") or archive.get("hash", "").removeprefix("sha256=")
    return recorded or None
