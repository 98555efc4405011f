"""One process, no launcher: what a step costs through hvdscale beside the plain one, and what starting up costs once.

python -m ci.bench.overhead [--quick] [--json FILE]
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Results, Target, Variant, arguments, finish, interleave
from ci.bench.local import thread_env

FRAMEWORKS = {"torch": "torch", "TensorFlow": "tensorflow"}
PLAIN, OURS = "plain", "hvdscale"
# What a figure of the worker is called in the table, where its own name says too little.
SHOWN = {"wrap": "init and wrap", "package": "import hvdscale"}
TARGETS = (Target(PLAIN, 0.99, tuple(f"{name} step" for name in FRAMEWORKS)),)


def sides(measured: Results) -> Results:
    """One launch measures both sides: sort its figures into the plain ones and ours."""
    suffixes = {PLAIN: "_plain", OURS: "_ours"}
    samples = {
        side: {
            f"{name} {SHOWN.get(metric.removesuffix(suffix), metric.removesuffix(suffix))}": values
            for name in FRAMEWORKS
            for metric, values in measured.samples[name].items()
            if metric.endswith(suffix)
        }
        for side, suffix in suffixes.items()
    }
    known = {side: {metric: values[0] for metric, values in by_metric.items()} for side, by_metric in samples.items()}
    return Results((Variant(PLAIN, "limit", fixed=known[PLAIN]), Variant(OURS, "ours", fixed=known[OURS])), samples)


def main() -> int:
    options = arguments(__doc__ or "", rounds=3, steps=60, quick=(1, 25)).parse_args()
    launches = [
        Variant(
            name,
            "peer",
            processes=(
                Process(
                    (
                        *(sys.executable, "-m", "ci.bench.workers.overhead"),
                        *("--framework", framework, "--steps", str(options.steps)),
                    ),
                    thread_env(1),
                ),
            ),
        )
        for name, framework in FRAMEWORKS.items()
    ]
    results = sides(interleave(launches, options.rounds, options.deadline))
    note = "One process on 1 thread; plain and wrapped steps alternate within it. Import, init and wrap happen once."
    return finish("Overhead of hvdscale in one process", results, TARGETS, options, [note])


if __name__ == "__main__":
    raise SystemExit(main())
