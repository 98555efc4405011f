"""Two batches a step train a 3 M-parameter Keras GPT with AdamW: a central update, ours and TensorFlow's own.

python -m ci.bench.tensorflow_placement [--quick] [--json FILE]

TensorFlow's strategies run on some of its versions only. One that fails is left out of the table, and what it said is
printed.
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Results, Variant, arguments
from ci.bench.local import free_ports, local_variants, thread_env
from ci.bench.placements import Judged, conclude, speed_over, steps_table
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


def judged(results: Results) -> list[Judged]:
    names = {variant.name for variant in results.variants}
    return [speed_over(results, peer, OURS["central"], bound) for peer, bound in FASTER.items() if peer in names]


def main() -> int:
    options = arguments(__doc__ or "", rounds=6, steps=4, quick=(3, 3)).parse_args()
    ours, note = local_variants(WORKER, RANKS, dict.fromkeys(OURS, "ours"), OURS, options.steps)
    threads = RANKS * int(ours[0].processes[0].env["OMP_NUM_THREADS"])
    failures: list[str] = []
    variants = (*ours, *strategies(options.steps, threads))
    results = take_turns(variants, options.rounds, options.steps, options.deadline, failures)
    title = "GPT training step in TensorFlow, AdamW, both batches of 2 ranks on one host"
    table = steps_table(title, results, ("central", OURS["central"]))
    notes = [note, "CentralStorageStrategy is one process with as many as all ranks of the others."]
    return conclude(table, notes, judged(results), results, options, failures)


if __name__ == "__main__":
    raise SystemExit(main())
