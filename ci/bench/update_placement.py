"""Two ranks on this host train a 3 M-parameter GPT with AdamW: what does it cost to keep its state in one place only?

python -m ci.bench.update_placement [--quick] [--json FILE]
"""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.table import Table

from ci.bench.harness import Results, arguments
from ci.bench.local import local_variants
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
SHARE = 1.05 / RANKS


def judged(results: Results) -> list[dict[str, object]]:
    ours = NAMES["sharded"]
    rows: list[dict[str, object]] = [
        {
            "target": f"speed over {NAMES[peer]}",
            "reached": results.ratio("step", of=NAMES[peer], to=ours),
            "bound": bound,
            "met": results.ratio("step", of=NAMES[peer], to=ours) >= bound,
        }
        for peer, bound in FASTER.items()
    ]
    share = results.median(ours, "share")
    target = "largest share of the state on a rank"
    return [*rows, {"target": target, "reached": share, "bound": SHARE, "met": share <= SHARE}]


def table(results: Results) -> Table:
    drawn = Table(title="GPT training step in torch, AdamW, 2 ranks on one host")
    drawn.add_column("update")
    for name in ("step", "min .. max", "time / local", "largest share of the state on a rank"):
        drawn.add_column(name, justify="right")
    for variant in results.variants:
        steps = results.samples[variant.name]["step"]
        drawn.add_row(
            variant.name,
            f"{results.median(variant.name, 'step') * 1e3:.1f} ms",
            f"{min(steps) * 1e3:.1f} .. {max(steps) * 1e3:.1f}",
            f"{results.ratio('step', of=variant.name, to=NAMES['local']):.2f}",
            f"{results.median(variant.name, 'share'):.3f}",
        )
    return drawn


def main() -> int:
    options = arguments(__doc__ or "", rounds=6, steps=4, quick=(3, 3)).parse_args()
    variants, note = local_variants("ci.bench.workers.update_placement", RANKS, ROLES, NAMES, options.steps)
    results = take_turns(variants, options.rounds, options.steps, options.deadline)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(results))
    console.print(note, highlight=False)
    rows = judged(results)
    for row in rows:
        verdict = "met" if row["met"] else "[bold red]missed[/]"
        console.print(f"{row['target']}: {row['reached']:.3f}, target {row['bound']:.3f}: {verdict}", highlight=False)
    if options.json:
        options.json.write_text(json.dumps({"samples": results.samples, "targets": rows}, indent=2) + "\n")
    return int(options.strict and not all(row["met"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
