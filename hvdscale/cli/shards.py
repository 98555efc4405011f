"""``hvdscale shards``: what a plan over a file of keys or a line-delimited text gives to each shard."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from hvdscale.errors import PlanError

if TYPE_CHECKING:
    from hvdscale.data import Move, ShardPlan

__all__ = ["add_parser"]

_DESCRIPTION = """\
Show how a ShardPlan divides a file: the size of each shard, how uneven they are, and what a resize would move.

Each line is one sample. With the policy "hash" the line is also its key, so FILE may be a list of keys (document
names, user numbers, ...) or the text itself. "ordered" and "random" need only the number of lines."""

_EPILOG = """\
examples:
  hvdscale shards keys.txt --shards 8                         shards by key, one key a line
  hvdscale shards keys.txt --shards 64 --resize 65            how much moves when a machine joins
  hvdscale shards corpus/*.txt --shards 4 --policy random     lines of several files as one text
  hvdscale shards users.txt --shards 3 --keys integers        the same shards as integer keys have in Python
  hvdscale shards keys.txt --shards 3 --weights 1,1,2         the third machine takes half
  cut -f1 table.tsv | hvdscale shards - --shards 8 --json     keys from a pipe, figures as JSON"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``shards`` to the command line."""
    parser = subparsers.add_parser(
        "shards",
        help="show how a plan divides a file of keys or lines",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="lines to shard; - is standard input")
    parser.add_argument("--shards", type=int, required=True, metavar="K", help="number of shards")
    parser.add_argument("--policy", choices=("hash", "ordered", "random"), default="hash", help="default: hash")
    parser.add_argument("--seed", type=int, default=0, help="of the hash or of the random order (default: 0)")
    parser.add_argument(
        "--keys", choices=("text", "integers"), default="text", help="what a line is as a key (default: text)"
    )
    parser.add_argument("--even", action="store_true", help="even out the shards of keys by how many samples they have")
    parser.add_argument("--unique", action="store_true", help="refuse keys that occur twice")
    parser.add_argument("--weights", type=_numbers, metavar="W,W,...", help="one positive number per shard")
    parser.add_argument("--resize", type=int, metavar="K", help="also show the plan over K shards, and what moves")
    parser.add_argument("--resize-weights", type=_numbers, metavar="W,W,...", help="weights after --resize")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hvdscale.data import ShardPlan

    if arguments.resize_weights and arguments.resize is None:
        raise PlanError("--resize-weights are the weights after --resize; give that too.")
    count, keys = _read(arguments)
    plan = ShardPlan(
        count,
        arguments.shards,
        arguments.policy,
        seed=arguments.seed,
        keys=keys,
        weights=arguments.weights,
        unique_keys=arguments.unique,
        even=arguments.even,
    )
    after, move = (None, None)
    if arguments.resize is not None:
        after, move = plan.resize(arguments.resize, arguments.resize_weights)
    if arguments.json:
        print(json.dumps(_figures(plan, after, move)))
        return 0
    print(plan.report())
    if keys:
        (key, times), *_ = (counted := Counter(keys)).most_common(1)
        print(
            f"{len(counted):,} distinct keys; the most frequent, {_shown(key)}, comes {times:,} times on its one shard."
        )
    if after is not None:
        print(f"\nResized to {after.shards} shards: {move}.\n{after.report()}")
    return 0


def _figures(plan: ShardPlan, after: ShardPlan | None, move: Move | None) -> dict[str, Any]:
    report = plan.report()
    figures: dict[str, Any] = {
        "n": plan.n,
        "policy": plan.policy,
        "shards": plan.shards,
        "sizes": report.sizes.tolist(),
        "mean": report.mean,
        "skew": report.skew,
    }
    if after is not None and move is not None:
        figures["resized"] = {**_figures(after, None, None), "moved": move.fraction, "least_possible": move.ideal}
    return figures


def _read(arguments: argparse.Namespace) -> tuple[int, list[Any] | None]:
    """The number of lines, and the lines as keys where the policy needs them."""
    if arguments.policy != "hash":
        if arguments.unique:
            raise PlanError(f'Only policy "hash" has keys to be unique; the policy is "{arguments.policy}".')
        return sum(1 for _ in _lines(arguments.files)), None
    if arguments.keys == "text":
        keys: list[Any] = list(_lines(arguments.files))
    else:
        keys = [_integer(number, line) for number, line in enumerate(_lines(arguments.files), 1)]
    return len(keys), keys


def _integer(number: int, line: bytes) -> int:
    try:
        return int(line)
    except ValueError:
        raise PlanError(
            f"With --keys integers each line is one; line {number} is {_shown(line)}. Try --keys text."
        ) from None


def _shown(key: bytes | int) -> str:
    """A key as text, of a line at most: lines may be whole documents."""
    from hvdscale.data.checks import shortened

    return shortened(key.decode(errors="replace") if isinstance(key, bytes) else key)


def _lines(names: list[str]) -> Iterator[bytes]:
    """Lines of all files without their ends, and a progress bar where it takes a while and someone looks."""
    from rich.console import Console
    from rich.progress import Progress

    for name in names:
        if Path(name).is_dir():
            raise PlanError(f"Lines are read from files; {name} is a directory. Give its files: {Path(name) / '*'}")
    total = sum(Path(name).stat().st_size for name in names if name != "-")
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        bar = progress.add_task("reading", total=total or None)
        for name in names:
            if name == "-":
                yield from _stripped(sys.stdin.buffer)
                continue
            with open(name, "rb") as file:
                for block in iter(lambda f=file: f.readlines(1 << 22), []):  # type: ignore[misc]
                    progress.advance(bar, sum(map(len, block)))
                    yield from _stripped(block)


def _stripped(lines: BinaryIO | list[bytes]) -> Iterator[bytes]:
    return (line.rstrip(b"\r\n") for line in lines)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be numbers with commas between, not {text!r}") from None
