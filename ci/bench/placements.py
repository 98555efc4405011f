"""What the benches of where the update happens print: steps against one of them, and verdicts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from ci.bench.harness import Results

__all__ = ["Judged", "conclude", "speed_over", "steps_table"]

Judged = dict[str, object]


def speed_over(results: Results, peer: str, ours: str, bound: float) -> Judged:
    """Whether the step of ``peer`` takes at least ``bound`` times as long as that of ``ours``."""
    reached = results.ratio("step", of=peer, to=ours)
    return {"target": f"speed over {peer}", "reached": reached, "bound": bound, "met": reached >= bound}


def steps_table(title: str, results: Results, against: tuple[str, str], shares: str = "") -> Table:
    """Each variant's step, ``against`` that of one: (its short name, its name); ``shares``: heading of the metric."""
    short, whose = against
    drawn = Table(title=title)
    drawn.add_column("update")
    for name in ("step", "min .. max", f"time / {short}", *([shares] if shares else [])):
        drawn.add_column(name, justify="right")
    for variant in results.variants:
        steps = results.samples[variant.name]["step"]
        drawn.add_row(
            variant.name,
            f"{results.median(variant.name, 'step') * 1e3:.1f} ms",
            f"{min(steps) * 1e3:.1f} .. {max(steps) * 1e3:.1f}",
            f"{results.ratio('step', of=variant.name, to=whose):.2f}",
            *([f"{results.median(variant.name, 'share'):.3f}"] if shares else []),
        )
    return drawn


def conclude(
    table: Table,
    notes: Sequence[str],
    rows: Sequence[Judged],
    results: Results,
    options: argparse.Namespace,
    failures: Sequence[str] = (),
) -> int:
    """Print all, write ``--json``, and give the exit code. ``failures``: what peers that do not run here said."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table)
    for line in (*notes, *(f"Left out, since it does not run here: {said}" for said in failures)):
        console.print(line, highlight=False, markup=False)
    for row in rows:
        verdict = "met" if row["met"] else "[bold red]missed[/]"
        console.print(f"{row['target']}: {row['reached']:.3f}, target {row['bound']:.3f}: {verdict}", highlight=False)
    if options.json:
        left = {"samples": results.samples, "targets": list(rows), "failures": list(failures)}
        options.json.write_text(json.dumps(left, indent=2) + "\n")
    return int(options.strict and (bool(failures) or not all(row["met"] for row in rows)))
