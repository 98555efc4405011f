"""Four ranks train a 3 M-parameter GPT on real text in several ways: what does meeting seldom cost in tokens?

    python -m ci.bench.relaxed_curves                         shows the curves that are recorded
    python -m ci.bench.relaxed_curves --train "DiLoCo, 32"    trains one way anew (minutes), and records it

A curve depends on no link, so it may be made on a busy machine. Every way reads the same batches, starts from the
same weights and has the same learning rate at each step: AdamW, warm-up over 20 steps, cosine over 360.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ci.bench.harness import REPOSITORY, Process, Variant, launch
from ci.bench.local import MPIRUN, thread_env
from ci.bench.relaxed_plans import DDP, PLANS, POST_LOCAL

__all__ = ["RECORD", "SYNCHRONOUS", "Curve", "read_curves"]

RANKS, STEPS, LONGER_STEPS = 4, 300, 360
TOKENS_PER_STEP = RANKS * 8 * 128
SYNCHRONOUS = "every step"
RECORD = Path(__file__).with_name("relaxed_curves.json")


@dataclass(frozen=True)
class Curve:
    """Held-out loss, in nats per token, after so many steps."""

    steps: tuple[int, ...]
    losses: tuple[float, ...]

    def at(self, step: int) -> float:
        """The loss after ``step`` steps; between two points on the straight line."""
        return float(np.interp(step, self.steps, self.losses))

    def reaches(self, loss: float) -> float | None:
        """Steps until the loss is no higher than ``loss``; ``None``: it never is."""
        for i, after in enumerate(self.losses):
            if after <= loss:
                if not i or self.losses[i - 1] == after:
                    return float(self.steps[i])
                way = (self.losses[i - 1] - loss) / (self.losses[i - 1] - after)
                return self.steps[i - 1] + way * (self.steps[i] - self.steps[i - 1])
        return None


def read_curves(path: Path = RECORD) -> dict[str, Curve]:
    """The recorded curves by the name of their way."""
    recorded = json.loads(path.read_text()) if path.exists() else {}
    return {way: Curve(tuple(map(int, points)), tuple(points.values())) for way, points in recorded.items()}


def train(way: str, steps: int, deadline_seconds: float) -> dict[str, float]:
    """Loss by step, of this way trained anew."""
    worker = (sys.executable, "-m", "ci.bench.workers.relaxed_curve", "--way", way, "--steps", str(steps))
    env = {**thread_env(1), "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'examples'}"}
    variant = Variant(way, "ours", RANKS, (Process((*MPIRUN, "--oversubscribe", "-np", str(RANKS), *worker), env),))
    with tempfile.TemporaryDirectory(prefix="hvdscale-bench-") as folder:
        points: dict[str, float] = launch(variant, Path(folder), deadline_seconds)[0]["facts"]
    return points


def table(curves: Mapping[str, Curve]) -> Table:
    """Every curve against synchronous training."""
    shown = Table(title=f"Held-out loss of 4 ranks, {TOKENS_PER_STEP:,} tokens a step")
    for name in ("way", f"loss after {STEPS} steps", "above synchronous", "steps to its loss", "more tokens"):
        shown.add_column(name, justify="left" if name == "way" else "right")
    goal = curves[SYNCHRONOUS].at(STEPS)
    for way, curve in curves.items():
        reached = curve.reaches(goal)
        cells = ("-", "-") if reached is None else (f"{reached:.0f}", f"{reached / STEPS - 1:+.1%}")
        shown.add_row(way, f"{curve.at(STEPS):.4f}", f"{curve.at(STEPS) / goal - 1:+.2%}", *cells)
    return shown


def draw(curves: Mapping[str, Curve], path: Path) -> None:
    """The curves as one picture, from where they are close."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for way, curve in curves.items():
        tokens = np.array(curve.steps) * TOKENS_PER_STEP / 1e6
        axes.plot(tokens, curve.losses, ".-", label=way, linewidth=1, color="black" if way == SYNCHRONOUS else None)
    goal = curves[SYNCHRONOUS].at(STEPS)
    axes.axhline(goal, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="million tokens", ylabel="held-out loss (nats per token)", ylim=(goal - 0.1, goal + 0.6))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*PLANS, DDP, POST_LOCAL]
    parser.add_argument("--train", action="append", default=[], metavar="WAY", choices=known, help=", ".join(known))
    parser.add_argument("--steps", type=int, help=f"steps to train (synchronous {STEPS}, others {LONGER_STEPS})")
    parser.add_argument("--record", type=Path, default=RECORD, help="the JSON to read, and to write to")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all recorded curves there")
    parser.add_argument("--deadline", type=float, default=7200, help="seconds a curve may take (%(default)s)")
    options = parser.parse_args()
    for way in options.train:
        steps = options.steps or (STEPS if way in (SYNCHRONOUS, DDP) else LONGER_STEPS)
        points = train(way, steps, options.deadline)
        recorded = json.loads(options.record.read_text()) if options.record.exists() else {}
        options.record.write_text(json.dumps({**recorded, way: points}, indent=1) + "\n")
    curves = read_curves(options.record)
    if SYNCHRONOUS not in curves:
        print(f'Nothing to compare with: train the way "{SYNCHRONOUS}" first.', file=sys.stderr)
        return 1
    Console(width=None if sys.stdout.isatty() else 120).print(table(curves))
    if options.plot:
        draw(curves, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
