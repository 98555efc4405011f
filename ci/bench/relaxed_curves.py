"""Four ranks train a 3 M-parameter GPT on real text in several ways: what does meeting seldom cost in tokens?

    python -m ci.bench.relaxed_curves                         shows the curves that are recorded
    python -m ci.bench.relaxed_curves --train "DiLoCo, 32"    trains one way anew (minutes), and records it
    python -m ci.bench.relaxed_curves --missing               trains every way that has no curve yet
    python -m ci.bench.relaxed_curves --small --missing       the same with a model of 0.4 M parameters (seconds each)

A curve depends on no link, so it may be made on a busy machine. Every way reads the same batches, starts from the
same weights and trains with AdamW, its learning rate rising over 40 steps and falling by a cosine over 360. Settings of
AdamW are those in ``relaxed_plans``; ``--lr``, ``--beta1``, ``--eps`` and ``--horizon`` (the end of the cosine) try
others, and are named in the record.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from ci.bench.harness import REPOSITORY, Process, Variant, launch
from ci.bench.local import MPIRUN, thread_env
from ci.bench.relaxed_plans import BEST, FULL_WIRE, PLANS, POST_LOCAL, WIRES, Inner, inner_of

__all__ = ["RECORD", "SYNCHRONOUS", "Curve", "read_curves"]

RANKS, STEPS, LONGER_STEPS = 4, 300, 360
MORE_TOKENS, ABOVE = 0.20, 0.007  # the best plan's, at most
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


def named(way: str, inner: Inner) -> str:
    """The way with what is inside it."""
    until = f", until {inner.horizon}" if inner.horizon != Inner.horizon else ""
    return f"{way}; lr {inner.lr:g}, beta1 {inner.beta1:g}, eps {inner.eps:g}{until}"


def train(way: str, inner: Inner, steps: int, small: bool, deadline_seconds: float) -> dict[str, float]:
    """Loss by step, of this way trained anew."""
    worker = (sys.executable, "-m", "ci.bench.workers.relaxed_curve", "--way", way, "--steps", str(steps))
    worker += tuple(f"--{name}={value}" for name, value in asdict(inner).items())
    worker += ("--small",) if small else ()
    env = {**thread_env(1), "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'examples'}"}
    variant = Variant(way, "ours", RANKS, (Process((*MPIRUN, "--oversubscribe", "-np", str(RANKS), *worker), env),))
    with tempfile.TemporaryDirectory(prefix="hvdscale-bench-") as folder:
        points: dict[str, float] = launch(variant, Path(folder), deadline_seconds)[0]["facts"]
    return points


def judged(curves: Mapping[str, Curve]) -> list[tuple[str, float, float, bool]]:
    """(what, reached, at most, met) of every target whose curves are there."""
    goal = curves[SYNCHRONOUS].at(STEPS)
    rows = []
    if BEST in curves:
        needed = curves[BEST].reaches(goal)
        more = float("inf") if needed is None else needed / STEPS - 1
        above = curves[BEST].at(STEPS) / goal - 1
        rows.append((f"{BEST}: more tokens to the same loss", more, MORE_TOKENS, more <= MORE_TOKENS))
        rows.append((f"{BEST}: loss above synchronous at equal tokens", above, ABOVE, above <= ABOVE))
    for wire, (way, most) in WIRES.items():
        if way in curves and FULL_WIRE in curves:
            above = curves[way].at(STEPS) / curves[FULL_WIRE].at(STEPS) - 1
            rows.append((f"{wire}: loss above fp32 at equal tokens", above, most, above <= most))
    return rows


def table(curves: Mapping[str, Curve], tokens_per_step: int, small: bool) -> Table:
    """Every curve against synchronous training."""
    shown = Table(title=f"Held-out loss of {RANKS} ranks, {tokens_per_step:,} tokens a step")
    told = (f"loss after {STEPS} steps", "above synchronous", "steps to its loss", "more tokens")
    for name in ("way; AdamW inside", *told):
        shown.add_column(name, justify="right" if name in told else "left")
    goal = curves[SYNCHRONOUS].at(STEPS)
    for way, curve in curves.items():
        reached = curve.reaches(goal)
        cells = ("-", "-") if reached is None else (f"{reached:.0f}", f"{reached / STEPS - 1:+.1%}")
        name = way if ";" in way else named(way, inner_of(way, small))
        shown.add_row(name, f"{curve.at(STEPS):.4f}", f"{curve.at(STEPS) / goal - 1:+.2%}", *cells)
    return shown


def draw(curves: Mapping[str, Curve], tokens_per_step: int, path: Path) -> None:
    """The ways' curves as one picture, from where they are close; other settings of AdamW are left out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for way, curve in ((way, curve) for way, curve in curves.items() if ";" not in way):
        tokens = np.array(curve.steps) * tokens_per_step / 1e6
        axes.plot(tokens, curve.losses, ".-", label=way, linewidth=1, color="black" if way == SYNCHRONOUS else None)
    goal = curves[SYNCHRONOUS].at(STEPS)
    axes.axhline(goal, color="gray", linestyle=":", linewidth=1)
    axes.set(xlabel="million tokens", ylabel="held-out loss (nats per token)", ylim=(goal - 0.1, goal + 0.6))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*PLANS, POST_LOCAL]
    parser.add_argument("--train", action="append", default=[], metavar="WAY", choices=known, help=", ".join(known))
    parser.add_argument("--steps", type=int, help=f"steps to train (synchronous {STEPS}, others {LONGER_STEPS})")
    for one in fields(Inner):
        kind = int if one.name == "horizon" else float
        parser.add_argument(f"--{one.name}", type=kind, help=f"another {one.name} of AdamW than the way's own")
    parser.add_argument("--missing", action="store_true", help="train every way that is not recorded")
    parser.add_argument("--small", action="store_true", help="a model of 0.4 M parameters, with a record of its own")
    parser.add_argument("--record", type=Path, help=f"the JSON to read, and to write to ({RECORD.name})")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all recorded curves there")
    parser.add_argument("--deadline", type=float, default=7200, help="seconds a curve may take (%(default)s)")
    options = parser.parse_args()
    record = options.record or (RECORD.with_stem(f"{RECORD.stem}_small") if options.small else RECORD)
    recorded = read_curves(record)
    missing = [way for way in known if way not in recorded] if options.missing else []
    for way in dict.fromkeys([*options.train, *missing]):
        steps = options.steps or (STEPS if way == SYNCHRONOUS else LONGER_STEPS)
        tried = {f.name: value for f in fields(Inner) if (value := getattr(options, f.name)) is not None}
        inner = replace(inner_of(way, options.small), **tried)
        points = train(way, inner, steps, options.small, options.deadline)
        before = json.loads(record.read_text()) if record.exists() else {}
        name = way if inner == inner_of(way, options.small) else named(way, inner)
        record.write_text(json.dumps({**before, name: points}, indent=1) + "\n")
    curves = read_curves(record)
    if SYNCHRONOUS not in curves:
        print(f'Nothing to compare with: train the way "{SYNCHRONOUS}" first.', file=sys.stderr)
        return 1
    tokens_per_step = RANKS * 8 * (64 if options.small else 128)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(curves, tokens_per_step, options.small))
    for what, reached, most, met in judged(curves):
        verdict = "met" if met else "[bold red]missed[/]"
        console.print(f"{what}: {reached:+.2%}, target at most {most:.1%}: {verdict}", highlight=False)
    if options.plot:
        draw(curves, tokens_per_step, options.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
