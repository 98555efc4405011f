"""Two batches a step train a 3 M-parameter Keras GPT with AdamW: a central update, ours and TensorFlow's own.

python -m ci.bench.tensorflow_placement [--quick] [--json FILE]

TensorFlow's strategies run on some of its versions only. One that fails is left out of the table, and what it said is
printed.
"""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.table import Table

from ci.bench.harness import Process, Results, Variant, arguments
from ci.bench.local import free_ports, local_variants, thread_env
from ci.bench.turns import take_turns

RANKS = 2
WORKER = "ci.bench.workers.tensorflow_placement"
OURS = {"local": "EveryStep()", "sharded": 'EveryStep("sharded")', "central": 'EveryStep("central")'}
# Its time over that of "central" must be at least this.
FASTER = {"CentralStorageStrategy": 1.0, "ParameterServerStrategy": 1.0}


def strategies(steps: int, threads: int) -> tuple[Variant, ...]:
    """TensorFlow's own. ``threads``: of all ranks together, as many as ours compute on."""

    def command(way: str) -> tuple[str, ...]:
        return (sys.executable, "-m", WORKER, "--way", way, "--steps", str(steps))

    central = Process(command("central_storage"), thread_env(threads))
    count = RANKS + 2  # the chief, the workers, one parameter server
    env = {**thread_env(max(1, threads // RANKS)), "BENCH_PORTS": ",".join(map(str, free_ports(count)))}
    del env["TF_NUM_INTEROP_THREADS"]  # with one, a worker that waits for variables cannot receive them
    cluster = [Process(command("parameter_server"), {**env, "BENCH_RANK": str(i)}) for i in range(count)]
    return (
        Variant("CentralStorageStrategy", "peer", 1, (central,)),
        # Its processes take each other for dead when they are stopped.
        Variant("ParameterServerStrategy", "peer", 1, tuple(cluster), may_be_stopped=False),
    )


def judged(results: Results) -> list[dict[str, object]]:
    ours, names = OURS["central"], {variant.name for variant in results.variants}
    ratios = {peer: results.ratio("step", of=peer, to=ours) for peer in FASTER if peer in names}
    return [
        {"target": f"speed over {peer}", "reached": ratio, "bound": FASTER[peer], "met": ratio >= FASTER[peer]}
        for peer, ratio in ratios.items()
    ]


def table(results: Results) -> Table:
    drawn = Table(title="GPT training step in TensorFlow, AdamW, both batches of 2 ranks on one host")
    drawn.add_column("update")
    for name in ("step", "min .. max", "time / central"):
        drawn.add_column(name, justify="right")
    for variant in results.variants:
        steps = results.samples[variant.name]["step"]
        drawn.add_row(
            variant.name,
            f"{results.median(variant.name, 'step') * 1e3:.1f} ms",
            f"{min(steps) * 1e3:.1f} .. {max(steps) * 1e3:.1f}",
            f"{results.ratio('step', of=variant.name, to=OURS['central']):.2f}",
        )
    return drawn


def main() -> int:
    options = arguments(__doc__ or "", rounds=6, steps=4, quick=(3, 3)).parse_args()
    ours, note = local_variants(WORKER, RANKS, dict.fromkeys(OURS, "ours"), OURS, options.steps)
    threads = RANKS * int(ours[0].processes[0].env["OMP_NUM_THREADS"])
    failures: list[str] = []
    variants = (*ours, *strategies(options.steps, threads))
    results = take_turns(variants, options.rounds, options.steps, options.deadline, failures)
    console = Console(width=None if sys.stdout.isatty() else 120)
    console.print(table(results))
    failed = [f"Left out, since it does not run here: {said}" for said in failures]
    for line in (note, "CentralStorageStrategy is one process with as many as all ranks of the others.", *failed):
        console.print(line, highlight=False, markup=False)
    rows = judged(results)
    for row in rows:
        verdict = "met" if row["met"] else "[bold red]missed[/]"
        console.print(f"{row['target']}: {row['reached']:.3f}, target {row['bound']:.3f}: {verdict}", highlight=False)
    if options.json:
        left = {"samples": results.samples, "targets": rows, "failures": failures}
        options.json.write_text(json.dumps(left, indent=2) + "\n")
    return int(options.strict and (bool(failures) or not all(row["met"] for row in rows)))


if __name__ == "__main__":
    raise SystemExit(main())
