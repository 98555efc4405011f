"""Two ranks train a 3 M-parameter GPT, one of them three times slower: what does it bring not to wait?

python -m ci.bench.asynchronous [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ci.bench.harness import Process, Results, Variant, arguments, interleave
from ci.bench.local import MPIRUN, thread_env

RANKS = 2
OURS, PEER = "asynchronous", "synchronous"
# By the head of the metric's name: its time over ours must be at least this.
TARGETS = {"equal ranks: seconds per step": 0.95, "straggler: seconds per step": 1.8, "straggler: seconds to loss": 1.0}


def variant(way: str, steps: int, seconds: float, target: float) -> Variant:
    worker = (sys.executable, "-m", "ci.bench.workers.asynchronous", "--way", way, "--steps", str(steps))
    command = (*MPIRUN, "-np", str(RANKS), *worker, "--seconds", str(seconds), "--target", str(target))
    return Variant(way, "ours" if way == OURS else "peer", RANKS, (Process(command, thread_env(1)),))


def judged(results: Results) -> list[dict[str, object]]:
    rows = []
    for metric in results.samples[PEER]:
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
    parser = arguments(__doc__ or "", rounds=3, steps=20, quick=(1, 8))
    parser.add_argument("--seconds", type=float, default=45, help="with the straggler, in a launch (%(default)s)")
    parser.add_argument("--target", type=float, default=3.0, help="evaluation loss to reach (%(default)s)")
    options = parser.parse_args()
    variants = [variant(way, options.steps, options.seconds, options.target) for way in (PEER, OURS)]
    results = interleave(variants, options.rounds, options.deadline + options.seconds)
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
