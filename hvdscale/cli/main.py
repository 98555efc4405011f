"""The ``hvdscale`` command: reads arguments, calls one subcommand, prints its errors as one message."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence

from hvdscale._version import __version__
from hvdscale.cli import build, doctor, plan, run, shards, timeline
from hvdscale.errors import HvdscaleError

__all__ = ["main"]

_COMMANDS = (build, doctor, plan, run, shards, timeline)
_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: this process's) and return the exit code."""
    arguments = _parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names and keys go to any terminal
    try:
        code: int = arguments.handler(arguments)
        sys.stdout.flush()
    except HvdscaleError as error:
        print(f"hvdscale: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (`| head`) has left; Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"hvdscale: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hvdscale: interrupted", file=sys.stderr)
        return _INTERRUPTED
    return code


def _leave(number: int, frame: object) -> None:
    """End through the usual clean-up, so that no compiler and no rank is left behind."""
    raise SystemExit(128 + number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvdscale",
        description="Scale a training script with Horovod on today's PyTorch, TensorFlow and Keras.",
        epilog="Start with `hvdscale build-horovod --install`, then `hvdscale doctor`.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"hvdscale {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(subparsers)
    return parser
