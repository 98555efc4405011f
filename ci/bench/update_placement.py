"""Two ranks on this host train a 3 M-parameter GPT with AdamW: what does it cost to keep its state in one place only?

python -m ci.bench.update_placement [--quick] [--json FILE]
"""

from __future__ import annotations

from ci.bench.harness import Results, arguments
from ci.bench.local import local_variants
from ci.bench.placements import Judged, conclude, speed_over, steps_table
from ci.bench.turns import take_turns

RANKS = 2
ROLES = {"local": "ours", "sharded": "ours", "central": "ours", "ddp": "peer", "zero": "peer", "fsdp": "peer"}
NAMES = {
    "local": "EveryStep()",
    "sharded": 'EveryStep("sharded")',
    "central": 'EveryStep("central")',
    "ddp": "torch DDP",
    "zero": "DDP + ZeroRedundancyOptimizer",
    "fsdp": "FSDP (fully_shard)",
}
# Its time over that of "sharded" must be at least this.
FASTER = {"zero": 1.0, "fsdp": 1.0}
SHARE, SHARES = 1.05 / RANKS, "largest share of the state on a rank"


def judged(results: Results) -> list[Judged]:
    ours = NAMES["sharded"]
    share = results.median(ours, "share")
    held: Judged = {"target": SHARES, "reached": share, "bound": SHARE, "met": share <= SHARE}
    return [*(speed_over(results, NAMES[peer], ours, bound) for peer, bound in FASTER.items()), held]


def main() -> int:
    options = arguments(__doc__ or "", rounds=6, steps=4, quick=(3, 3)).parse_args()
    variants, note = local_variants("ci.bench.workers.update_placement", RANKS, ROLES, NAMES, options.steps)
    results = take_turns(variants, options.rounds, options.steps, options.deadline)
    title = "GPT training step in torch, AdamW, 2 ranks on one host"
    table = steps_table(title, results, ("local", NAMES["local"]), SHARES)
    return conclude(table, [note], judged(results), results, options)


if __name__ == "__main__":
    raise SystemExit(main())
