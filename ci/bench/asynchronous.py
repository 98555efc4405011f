"""Two ranks train a 3 M-parameter GPT, one of them three times slower: what does it bring not to wait?

python -m ci.bench.asynchronous [--quick] [--json FILE]

Where ranks are equally fast, both ways take turns of a few steps each; with the straggler they are launched one after
the other, for some seconds each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ci.bench.harness import Process, Results, Variant, arguments, interleave
from ci.bench.local import MPIRUN, thread_env
from ci.bench.turns import take_turns

RANKS = 2
OURS, PEER = "asynchronous", "synchronous"
# By the head of the metric's name: its time over ours must be at least this.
TARGETS = {"equal ranks: seconds": 0.95, "straggler: seconds per step": 1.8, "straggler: seconds to loss": 1.0}


def variants(*arguments: str) -> tuple[Variant, ...]:
    """Both ways with these arguments of the worker."""
    worker = (sys.executable, "-m", "ci.bench.workers.asynchronous", *arguments)
    return tuple(
        Variant(way, role, RANKS, (Process((*MPIRUN, "-np", str(RANKS), *worker, "--way", way), thread_env(1)),))  # type: ignore[arg-type]
        for way, role in ((PEER, "peer"), (OURS, "ours"))
    )


def judged(results: Results) -> list[dict[str, object]]:
    rows = []
    for metric in results.samples[PEER]:  # what only servers have is told without a target
        bound = next(bound for head, bound in TARGETS.items() if metric.startswith(head))
        reached = results.ratio(metric, of=PEER, to=OURS)
        rows.append({"metric": metric, "reached": reached, "at_least": bound, "met": reached >= bound})
    return rows


def table(results: Results) -> Table:
    drawn = Table(title="GPT in torch on 2 ranks: all-reduce every step, and ParameterServer(None)")
    drawn.add_column("")
    for name in (PEER, OURS):
        drawn.add_column(name, justify="right")
    for metric in results.metrics:
        cells = (results.samples[name].get(metric) for name in (PEER, OURS))
        drawn.add_row(metric, *("" if cell is None else f"{sorted(cell)[len(cell) // 2]:,.3f}" for cell in cells))
    return drawn


def main() -> int:
    parser = arguments(__doc__ or "", rounds=12, steps=1, quick=(3, 1))
    parser.add_argument("--launches", type=int, default=2, help="of each way with the straggler (%(default)s)")
    parser.add_argument("--seconds", type=float, default=30, help="with the straggler, in a launch (%(default)s)")
    parser.add_argument("--target", type=float, default=2.9, help="evaluation loss to reach (%(default)s)")
    options = parser.parse_args()
    equal = take_turns(variants(), options.rounds, options.steps, options.deadline)
    straggler = ("--seconds", str(options.seconds), "--target", str(options.target))
    slowed = interleave(variants(*straggler), options.launches, options.deadline + options.seconds)
    results = Results(equal.variants, {way: equal.samples[way] | slowed.samples[way] for way in (PEER, OURS)})
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(results))
    console.print("The last rank sleeps after each step for twice as long as a step alone takes. One thread a rank.")
    rows = judged(results)
    for row in rows:
        verdict = "met" if row["met"] else "[bold red]missed[/]"
        console.print(
            f"{row['metric']}: {row['reached']:.2f} of synchronous, target at least {row['at_least']:.2f}: {verdict}",
            highlight=False,
        )
    if options.json:
        Path(options.json).write_text(json.dumps({"samples": results.samples, "targets": rows}, indent=2) + "\n")
    return int(options.strict and not all(row["met"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
