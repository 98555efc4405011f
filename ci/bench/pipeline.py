"""A pipeline of two ranks on this host: how near it comes to the ideal, to its own simulation, and to half the memory.

python -m ci.bench.pipeline [--quick] [--json FILE] [--only throughput,sleep,facts]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from ci.bench.harness import (
    BIN,
    REPOSITORY,
    BenchError,
    Process,
    Results,
    Target,
    Variant,
    arguments,
    finish,
    interleave,
)
from ci.bench.local import MPIRUN, local_variants, thread_env
from ci.bench.turns import take_turns
from ci.bench.workers.pipeline import MICROBATCHES, SLEEP_BATCH, SLEEP_SECONDS
from hvdscale.model import Costs, Edge, Graph, Node, make_schedule, partition, simulate

RANKS = 2
ROLES = {"independent": "peer", "torch": "peer", "1f1b": "ours", "zb": "peer"}
NAMES = {
    "independent": "one rank, the whole model",
    "torch": "torch pipelining 1F1B (gloo)",
    "1f1b": "hvdscale 1F1B",
    "zb": "hvdscale zero bubble",
}
METRICS = tuple(f"m={m}" for m in MICROBATCHES)
PARTS = ("throughput", "sleep", "facts")


def throughput(options: argparse.Namespace) -> int:
    """Steps of the same two stages; the limit is one rank's step over p * m / (m + p - 1)."""
    variants, note = local_variants("ci.bench.workers.pipeline", RANKS, ROLES, NAMES, options.steps)
    results = take_turns(variants, options.rounds, options.steps, options.deadline)
    share = {f"m={m}": (m + RANKS - 1) / (RANKS * m) for m in MICROBATCHES}
    alone = results.samples[NAMES["independent"]]
    limit = Variant("ideal p m / (m + p - 1)", "limit", fixed=share)
    ideal = {metric: [seconds * share[metric] for seconds in times] for metric, times in alone.items()}
    samples = {limit.name: ideal, **results.samples}
    both = Results((limit, *results.variants), samples)
    targets = (
        Target(limit.name, 0.9, METRICS),
        Target(NAMES["torch"], 1.0, METRICS),
    )
    code = finish("A training step of 8 blocks in 2 stages", both, targets, options, [note])
    ratio = results.ratio("m=4", of=NAMES["1f1b"], to=NAMES["zb"])
    print(f"m=4: zero bubble {ratio:.2f} times 1F1B, target at least 1.05: {'met' if ratio >= 1.05 else 'missed'}")
    return code or int(options.strict and ratio < 1.05)


def sleep(options: argparse.Namespace) -> int:
    """Four ranks whose stages only sleep: measured against simulated, which must agree within 8 %."""
    ranks = 4
    command = (sys.executable, "-m", "ci.bench.workers.pipeline", "--way", "asleep", "--steps", str(options.steps))
    measured = Variant(
        "measured", "ours", ranks, (Process((*MPIRUN, "--oversubscribe", "-np", str(ranks), *command), thread_env(1)),)
    )
    predicted = {}
    for name in ("gpipe", "1f1b", "interleaved"):
        schedule = make_schedule(name, ranks, SLEEP_BATCH, 2 if name == "interleaved" else 1)
        predicted[name] = simulate(schedule, Costs.even(schedule.stages, SLEEP_SECONDS)).makespan
    variants = (Variant("simulated", "limit", fixed=predicted), measured)
    results = interleave(variants, 1, options.deadline)
    targets = (Target("simulated", 1 / 1.08),)
    note = f"Stages sleep {SLEEP_SECONDS * 1e3:.0f} ms forward and twice that backward, {SLEEP_BATCH} micro-batches."
    return finish("4 ranks asleep", results, targets, options, [note])


def facts(options: argparse.Namespace) -> int:
    """What a rank holds and peaks at, how fast activations travel, how long large models take to cut."""
    whole = _launch("held", 1, options.deadline)
    held = _launch("held", RANKS, options.deadline)
    moved = _launch("transfer", RANKS, options.deadline)
    missed = []
    for name in held[0]:
        print(f"{name}: {', '.join(f'{h[name]:.3f}' for h in held)} on {RANKS} ranks, {whole[0][name]:.3f} on one")
    missed += [max(h["share of parameters and optimizer state"] for h in held) > 1.1 / RANKS]
    post, bare = moved[0]["post MB/s"], moved[0]["bare mpi4py MB/s"]
    print(f"16 MiB there and back: {post:.0f} MB/s through the post, {bare:.0f} by bare mpi4py: {post / bare:.2f}")
    missed.append(post < 0.8 * bare)
    for what, graph, parts, limit_seconds in (("chain", _chain(10_000), 16, 2), ("graph", _graph(2_000), 4, 20)):
        start = time.perf_counter()
        found = partition(graph, parts)
        took = time.perf_counter() - start
        first, *_ = str(found).splitlines()
        print(f"{what}: {took:.2f} s, at most {limit_seconds}: {first}")
        missed.append(took > limit_seconds)
    print(f"{len(missed) - sum(missed)} of {len(missed)} targets met")
    return int(options.strict and any(missed))


def _launch(what: str, ranks: int, deadline_seconds: float) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory(prefix="hvdscale-bench-") as folder:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "HOROVOD_"))}
        env |= {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(REPOSITORY),
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "BENCH_FOLDER": folder,
            **thread_env(1),
        }
        command = [*MPIRUN, "-np", str(ranks), sys.executable, "-m", "ci.bench.workers.pipeline_facts", "--what", what]
        ended = subprocess.run(
            command, env=env, cwd=REPOSITORY, timeout=deadline_seconds, capture_output=True, text=True, check=False
        )
        if ended.returncode:
            raise BenchError(f"{what} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
        return [json.loads(path.read_text()) for path in sorted(Path(folder).glob("facts-*.json"))]


def _chain(n: int) -> Graph:
    costs = np.random.default_rng(0).random(n)
    return Graph.chain([Node(f"n{i}", float(cost)) for i, cost in enumerate(costs)], 5)


def _graph(n: int) -> Graph:
    random = np.random.default_rng(3)
    edges = {(max(0, i - int(random.integers(1, 30 if j else 3))), i) for i in range(1, n) for j in range(2)}
    size = random.integers(1, 1000, n)
    nodes = tuple(Node(f"n{i}", float(cost)) for i, cost in enumerate(random.integers(1, 20, n)))
    return Graph(nodes, tuple(Edge(a, b, int(size[a])) for a, b in sorted(edges)))


def main() -> int:
    parser = arguments(__doc__ or "", rounds=6, steps=2, quick=(1, 2))
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    options = parser.parse_args()
    wanted = options.only.split(",")
    if not set(wanted) <= set(PARTS):
        parser.error(f"--only takes some of {', '.join(PARTS)}")
    return max([globals()[part](options) for part in PARTS if part in wanted])


if __name__ == "__main__":
    raise SystemExit(main())
