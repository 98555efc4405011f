"""``hvdscale build-horovod``: compile Horovod for the frameworks installed here, showing how far it is."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvdscale.runtime.horovod_build import Progress

__all__ = ["add_parser"]

_DESCRIPTION = """\
Build Horovod 0.28.1 from its source for the frameworks installed in this environment.

Horovod's compiled part fits one minor version of each framework, and its last release does not
compile on today's; this command fetches the source through pip, checks its hash, applies three small
edits and compiles. It takes about 5 minutes on 2 cores. The wheel is kept per user and used again
at once as long as frameworks, Python and MPI stay the same.

It needs a C++20 compiler, CMake >= 3.13, MPI (pip install 'hvdscale[mpi]') and setuptools < 81, and
says what is missing before it touches anything."""

_EPILOG = """\
examples:
  hvdscale build-horovod --install                  build for everything installed here, and install it
  hvdscale build-horovod --frameworks torch         only the PyTorch part
  hvdscale build-horovod --frameworks torch --gpu nccl --install   for GPUs, or say what is missing
  hvdscale build-horovod --wheel-dir wheels         also put the wheel and its record into ./wheels
  XDG_CACHE_HOME=/scratch hvdscale build-horovod    keep the wheel somewhere else than ~/.cache

edits made to the source:
"""

_PLAIN_STEP = 0.1


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``build-horovod`` to the command line."""
    parser = subparsers.add_parser(
        "build-horovod",
        help="build Horovod for the frameworks installed here",
        description=_DESCRIPTION,
        formatter_class=_Help,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--frameworks",
        type=lambda text: [name.strip() for name in text.split(",") if name.strip()],
        metavar="LIST",
        help="torch, tensorflow or torch,tensorflow (default: those installed)",
    )
    parser.add_argument("--wheel-dir", type=Path, metavar="DIR", help="also copy the wheel and its record there")
    parser.add_argument(
        "--gpu",
        choices=("auto", "none", "nccl"),
        default="auto",
        help="nccl: GPUs talk to each other by NCCL; none: through the host's memory; "
        "auto (default): nccl where torch is made for CUDA and the CUDA toolkit and NCCL are here",
    )
    parser.add_argument("--source", type=Path, metavar="FILE", help="Horovod's source archive, instead of fetching it")
    parser.add_argument("--install", action="store_true", help="install the wheel into this environment")
    parser.add_argument("--force", action="store_true", help="build again even if the wheel is there already")
    parser.set_defaults(handler=_build)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the edits to the end of the help, read from where they are defined, only when help is shown."""

    def format_help(self) -> str:
        from hvdscale.runtime.horovod_build import HOROVOD

        edits = "".join(f"  {edit.file}: {edit.why}\n" for edit in HOROVOD.edits)
        cuda = "".join(f"  {edit.file}: {edit.why}\n" for edit in HOROVOD.cuda_edits)
        return f"{super().format_help()}\n{_EPILOG}{edits}\nand where torch is made for CUDA:\n{cuda}"


def _build(arguments: argparse.Namespace) -> int:
    from hvdscale.runtime.horovod_build import HOROVOD, build_horovod, install_wheel

    start = time.monotonic()
    with _shown_progress() as report:
        built = build_horovod(
            arguments.frameworks,
            wheel_dir=arguments.wheel_dir,
            force=arguments.force,
            archive=arguments.source,
            gpu=arguments.gpu,
            report=report,
        )
    versions = ", ".join(f"{name} {version}" for name, version in built.record["frameworks"].items())
    how = "found, built earlier" if built.reused else f"built in {time.monotonic() - start:.0f} s"
    gpu = f", GPU: {built.record['gpu']}" if "gpu" in built.record else ""
    print(f"Horovod {HOROVOD.version} for {versions}{gpu}: {how}\n  {built.path}")
    if arguments.install:
        fresh = install_wheel(built, force=arguments.force)
        print(f"{'Installed into' if fresh else 'Already installed in'} {sys.prefix}")
    else:
        print(f"Install it with: {Path(sys.executable).name} -m pip install --no-deps {built.path}")
    return 0


@contextmanager
def _shown_progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal; elsewhere a line for each stage and each tenth of the compilation."""
    if not sys.stdout.isatty():
        yield _plain_lines()
        return
    from rich import progress as shown

    columns = (
        shown.SpinnerColumn(),
        shown.TextColumn("{task.description}"),
        shown.BarColumn(),
        shown.TaskProgressColumn(),
        shown.TimeElapsedColumn(),
    )
    with shown.Progress(*columns, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def report(progress: Progress) -> None:
            bar.update(task, description=progress.stage, total=None if progress.fraction is None else 1.0)
            if progress.fraction is not None:
                bar.update(task, completed=progress.fraction)

        yield report


def _plain_lines() -> Callable[[Progress], None]:
    start = time.monotonic()
    next_share = 0.0
    stage = ""

    def report(progress: Progress) -> None:
        nonlocal next_share, stage
        share = progress.fraction
        if progress.stage == stage and (share is None or share < next_share):
            return
        stage = progress.stage
        percent = "" if share is None else f" {share:4.0%}"
        print(f"[{time.monotonic() - start:5.0f} s] {stage}{percent}", flush=True)
        next_share = (share or 0.0) + _PLAIN_STEP

    return report
