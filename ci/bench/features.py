"""A 3 M-parameter transformer split by features over 2 ranks: the memory it saves, and the time it costs.

python -m ci.bench.features [--quick] [--json FILE]
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Variant, arguments, finish, interleave
from ci.bench.local import MPIRUN, thread_env

RANKS = 2
WAYS = {"whole": "one process", "data": "by data, dp=2", "features": "by features, tp=2"}
ROLES = {"whole": "limit", "data": "peer", "features": "ours"}
SHARE_AT_MOST = 1.1 / RANKS


def main() -> int:
    options = arguments(__doc__ or "", rounds=3, steps=12, quick=(1, 5)).parse_args()
    variants = []
    for way, name in WAYS.items():
        ranks = 1 if way == "whole" else RANKS
        command = (sys.executable, "-m", "ci.bench.workers.features", "--way", way, "--steps", str(options.steps))
        launch = command if ranks == 1 else (*MPIRUN, "-np", str(ranks), *command)
        processes = (Process(launch, thread_env(RANKS // ranks)),)
        variants.append(Variant(name, ROLES[way], ranks, processes))  # type: ignore[arg-type]
    results = interleave(variants, options.rounds, options.deadline)
    shares = {name: results.median(name, "share") for name in WAYS.values()}
    for samples in results.samples.values():
        samples.pop("share")  # type: ignore[attr-defined]
    ours = shares[WAYS["features"]]
    verdict = "met" if ours <= SHARE_AT_MOST else "missed"
    held = ", ".join(f"{name} {share:.3f}" for name, share in shares.items())
    notes = [
        "The same tokens in a step of every variant, on 2 threads in all.",
        f"Parameters and optimizer state on a rank, as a part of the whole: {held}.",
        f"By features at most 1.1 / {RANKS} = {SHARE_AT_MOST:.2f} of the whole: {ours:.3f}, {verdict}",
    ]
    code = finish("Training step of a transformer in torch, 2 cores", results, (), options, notes)
    return code or int(options.strict and verdict == "missed")


if __name__ == "__main__":
    raise SystemExit(main())
