"""``hvdscale timeline``: the traces that ``HVDSCALE_TIMELINE`` left, as one file, and what the time went into."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hvdscale.runtime.trace import merge, spent

__all__ = ["add_parser"]

_DESCRIPTION = """\
Join the timelines of all ranks, which HVDSCALE_TIMELINE=trace.json left as trace.rank0.json, trace.rank1.json, ...,
and show what each rank's time went into. Perfetto (https://ui.perfetto.dev) opens each file, and the joined one."""

_EPILOG = """\
examples:
  HVDSCALE_TIMELINE=runs/trace.json hvdscale run -np 2 train.py
  hvdscale timeline runs/trace.rank*.json                          seconds by rank
  hvdscale timeline runs/trace.rank*.json --merge runs/trace.json  one file for Perfetto"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``timeline`` to the command line."""
    parser = subparsers.add_parser(
        "timeline",
        help="join the timelines of ranks, and show where time went",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="a rank's timeline")
    parser.add_argument("--merge", type=Path, metavar="OUT", help="write all events to this one file")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    events = merge(arguments.files)
    table = Table()
    for name in ("rank", "computing", "in rounds", "under way", "hidden behind computing"):
        table.add_column(name, justify="right")
    for rank, seconds in spent(events).items():
        share = f" ({seconds.hidden / seconds.under_way:.0%})" if seconds.under_way else ""
        figures = (seconds.computing, seconds.rounds, seconds.under_way)
        table.add_row(str(rank), *(f"{figure:.3f} s" for figure in figures), f"{seconds.hidden:.3f} s{share}")
    Console().print(table)
    if arguments.merge:
        arguments.merge.write_text("[\n" + ",\n".join(map(json.dumps, events)) + "\n]\n")
        print(f"{len(events):,} events of {len(arguments.files)} files in {arguments.merge}")
    return 0
