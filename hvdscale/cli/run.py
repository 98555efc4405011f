"""``hvdscale run``: a thin front to mpirun and horovodrun; it becomes the launcher, so signals and exit codes pass."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from hvdscale.errors import WorldError

__all__ = ["add_parser"]

_DESCRIPTION = """\
Start a training script on N ranks with mpirun (or horovodrun --gloo) and tuned settings.

The settings are those hvd.init() would choose; variables you have set yourself win. `mpirun` and `horovodrun`
work just as well with the same script: --dry-run prints the command this one stands for."""

_EPILOG = """\
examples:
  hvdscale run -np 2 train.py --epochs 3             2 ranks here
  hvdscale run -np 2 -m mypackage.train              a module
  hvdscale run -np 8 -H node1:4,node2:4 train.py     4 ranks on each of two hosts, over ssh
  hvdscale run -np 2 --controller gloo train.py      without MPI
  hvdscale run -np 2 --dry-run train.py              only print the command"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``run`` to the command line."""
    parser = subparsers.add_parser(
        "run",
        help="start a script on N ranks with tuned settings",
        usage="hvdscale run -np N [-H HOSTS] [--controller mpi|gloo] [--dry-run] (SCRIPT | -m MODULE) [ARGUMENT ...]",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-np", "-n", "--ranks", dest="ranks", type=int, required=True, metavar="N", help="ranks in all")
    parser.add_argument("-H", "--hosts", metavar="HOSTS", help="name:slots,name:slots (default: this host)")
    parser.add_argument("--controller", choices=("mpi", "gloo"), default="mpi", help="how ranks meet (default: mpi)")
    parser.add_argument("--dry-run", action="store_true", help="print the shell command and stop")
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, metavar="MODULE", help="run a module, as python -m"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, metavar="SCRIPT", help="the script and its arguments")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hvdscale.runtime.command import Job, compose, parse_hosts, replace_process

    job = Job(
        arguments.ranks,
        _program(arguments),
        parse_hosts(arguments.hosts) if arguments.hosts is not None else (),
        arguments.controller,
    )
    command = compose(job)
    if arguments.dry_run:
        print(command)
        return 0
    sys.stdout.flush()
    replace_process(command)


def _program(arguments: argparse.Namespace) -> tuple[str, ...]:
    if arguments.module is not None:
        return ("-m", *arguments.module) if arguments.module else ()
    program = tuple(arguments.program)
    if program and not Path(program[0]).is_file():
        raise WorldError(f"No such script: {program[0]}. Give a file, or -m and a module.")
    return program
