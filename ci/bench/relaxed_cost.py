"""What a round costs the rank itself: CPU time on a 3 M-parameter GPT, the network and other ranks left out.

    python -m ci.bench.relaxed_cost [--quick] [--json FILE]

A pass is one subtraction over a vector of as many float32 values: two loads and a store each. Beside it: the same over
the parameters where they lie, as the optimizer's own in-place add does it. A plain round of an average loads four
values for each parameter and stores four (two where nothing was loaded, so that the processor loads them, too): the
memory traffic of 3.3 passes, before it computes anything. What the wire formats' coding adds is shown without a target.
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Results, Target, Variant, arguments, finish, interleave
from ci.bench.local import thread_env
from hvdscale.sync import DiLoCo, Gossip, LocalSGD, SlowMo

__all__ = ["PLANS"]

PLAIN = {
    "local SGD": LocalSGD(1),
    "DiLoCo": DiLoCo(1),
    "SlowMo": SlowMo(1),
    "gossip in pairs": Gossip(1, peers="pairs"),
}
CODED = {"DiLoCo, bf16": DiLoCo(1, wire="bf16"), "DiLoCo, int8": DiLoCo(1, wire="int8")}
PLANS = {**PLAIN, **CODED}
PASS, ADD, OURS = "one pass", "in-place add", "a round"
PASSES_AT_MOST = 3


def sides(measured: Results) -> Results:
    """The worker's figures as rows: a pass and the optimizer's add beside each plan's round."""
    found = measured.samples["worker"]
    samples = {row: {name: list(found[row]) for name in PLANS} for row in (PASS, ADD)}
    samples[OURS] = {name: list(found[name]) for name in PLANS}
    fixed = {row: {name: values[0] for name, values in columns.items()} for row, columns in samples.items()}
    rows = (Variant(PASS, "limit", fixed=fixed[PASS]), Variant(ADD, "peer", fixed=fixed[ADD]))
    return Results((*rows, Variant(OURS, "ours", fixed=fixed[OURS])), samples)


def main() -> int:
    options = arguments(__doc__ or "", rounds=3, steps=1, quick=(1, 1)).parse_args()
    command = (sys.executable, "-m", "ci.bench.workers.relaxed_cost")
    worker = Variant("worker", "peer", processes=(Process(command, thread_env(1)),))
    results = sides(interleave([worker], options.rounds, options.deadline))
    targets = (Target(PASS, 1 / PASSES_AT_MOST, tuple(PLAIN)),)
    note = f"CPU seconds of one process on 1 thread, best of several. Promised: at most {PASSES_AT_MOST} passes."
    return finish("A round's own cost", results, targets, options, [note])


if __name__ == "__main__":
    raise SystemExit(main())
