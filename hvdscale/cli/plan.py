"""``hvdscale plan``: a pipeline's schedule before it runs: how long, how much waiting, how much memory."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from hvdscale.errors import PlanError

if TYPE_CHECKING:
    from hvdscale.model import Simulation

__all__ = ["add_parser"]

_DESCRIPTION = """\
Play a pipeline schedule through and draw it: what a step takes, how much of it ranks wait, and of how many
micro-batches they hold activations. Times are in the unit of --forward (default: one forward pass of a stage)."""

_EPILOG = """\
examples:
  hvdscale plan --ranks 4 --microbatches 8                           1F1B; every schedule: --schedule all
  hvdscale plan --ranks 4 --microbatches 8 --schedule zb             backward passes in two halves
  hvdscale plan --ranks 2 --microbatches 8 --schedule interleaved --chunks 2
  hvdscale plan --ranks 4 --microbatches 8 --recompute --plot plan.png
  hvdscale plan --ranks 3 --microbatches 6 --forward 1,2,1 --backward 2,4,2 --transfer 0.2
  hvdscale plan --ranks 2 --microbatches 4 --actions                 the actions of each rank, with all messages"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``plan`` to the command line."""
    parser = subparsers.add_parser(
        "plan",
        help="play a pipeline schedule through and draw it",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--ranks", type=int, required=True, metavar="P", help="ranks of the pipeline")
    parser.add_argument("--microbatches", type=int, required=True, metavar="M", help="pieces of a batch")
    parser.add_argument(
        "--schedule", default="1f1b", metavar="NAME", help="gpipe, 1f1b, interleaved, zb, or all (default: 1f1b)"
    )
    parser.add_argument("--chunks", type=int, default=1, metavar="V", help="stages on each rank (default: 1)")
    parser.add_argument("--forward", type=_numbers, default=[1.0], metavar="T,T,...", help="of each stage, or of all")
    parser.add_argument(
        "--backward", type=_numbers, metavar="T,T,...", help="of each stage, or of all (default: twice --forward)"
    )
    parser.add_argument("--transfer", type=float, default=0.0, metavar="T", help="of a message (default: 0)")
    parser.add_argument("--recompute", action="store_true", help="keep inputs only, and run forward passes again")
    parser.add_argument("--actions", action="store_true", help="print each rank's actions, messages included")
    parser.add_argument("--width", type=int, default=120, help="of the drawing, in characters")
    parser.add_argument("--plot", metavar="FILE", help="write a picture (.png, .svg, .pdf); needs matplotlib")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON object")
    parser.set_defaults(handler=_run)


def _run(arguments: argparse.Namespace) -> int:
    from hvdscale.model import SCHEDULES, make_schedule
    from hvdscale.model.drawing import as_picture, as_text

    names = SCHEDULES if arguments.schedule == "all" else (arguments.schedule,)
    if len(names) > 1 and arguments.plot:
        raise PlanError("A picture shows one schedule; give one --schedule with --plot.")
    played = {}
    for name in names:
        chunks = arguments.chunks if name in ("gpipe", "interleaved") or len(names) == 1 else 1
        if name == "interleaved" and len(names) > 1:
            chunks = max(chunks, 2)
        played[name] = _play(make_schedule(name, arguments.ranks, arguments.microbatches, chunks), arguments)
    if arguments.json:
        figures = [_figures(one) for one in played.values()]
        print(json.dumps(figures if len(figures) > 1 else figures[0]))
    else:
        for one in played.values():
            print(one.schedule.text() if arguments.actions else as_text(one, arguments.width))
    if arguments.plot:
        as_picture(next(iter(played.values())), arguments.plot)
    return 0


def _play(schedule: object, arguments: argparse.Namespace) -> Simulation:
    from hvdscale.model import Costs, Schedule, chain_links, simulate, with_messages, with_recompute

    assert isinstance(schedule, Schedule)
    links = chain_links(schedule.stages)
    if arguments.recompute:
        schedule = with_recompute(schedule)
    forward = _each("--forward", arguments.forward, schedule.stages)
    backward = _each("--backward", arguments.backward, schedule.stages) if arguments.backward else ()
    if arguments.transfer < 0:
        raise PlanError(f"--transfer must be at least 0; it is {arguments.transfer:g}.")
    return simulate(with_messages(schedule, links), Costs(forward, backward, transfer=arguments.transfer), links)


def _each(flag: str, values: list[float], stages: int) -> tuple[float, ...]:
    if len(values) not in (1, stages) or min(values) <= 0:
        raise PlanError(f"{flag} is one number above 0 for all stages, or one for each of {stages}; it is {values}.")
    return tuple(values * stages if len(values) == 1 else values)


def _figures(played: Simulation) -> dict[str, object]:
    return {
        "schedule": played.schedule.name,
        "ranks": played.schedule.ranks,
        "stages": played.schedule.stages,
        "microbatches": played.schedule.microbatches,
        "makespan": played.makespan,
        "bubble": played.bubble,
        "speedup": played.speedup,
        "peak_activations": list(played.peak_activations),
    }


def _numbers(text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 1,2,1") from None
