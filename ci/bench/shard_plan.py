"""The order in which ranks read: time and memory to the first batch, a whole epoch, and rates of the core.

    python -m ci.bench.shard_plan [--quick] [--json FILE]

One process per way, as rank 0 of 8, over 10^7 samples (--quick: 10^6). The peers make the whole order before the
first batch, so their time and memory grow with the samples; at 10^9 theirs are extrapolated, ours is measured.
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Results, Target, Variant, arguments, finish, interleave
from ci.bench.local import thread_env
from ci.bench.workers.shard_plan import BILLION

SAMPLES, QUICK_SAMPLES = 10**7, 10**6
PEERS = {
    "torch DistributedSampler": "torch",
    "Horovod ElasticSampler": "horovod",
    "tf.data shuffle().shard()": "tensorflow",
}
OURS, PROMISED = "hvdscale", "promised"
FIRST, EPOCH, BILLION_FIRST = "first batch", "epoch", "first batch of 10^9"
MEMORY, BILLION_MEMORY = "memory of the epoch", "memory to the first batch of 10^9"
RATES = {"integer": "10^6 integer keys", "string": "10^6 string keys", "random": "10^6 of an order"}
PROMISES = {
    BILLION_FIRST: 0.05,
    BILLION_MEMORY: 50e6,
    RATES["integer"]: 1e6 / 100e6,
    RATES["string"]: 1e6 / 8e6,
    RATES["random"]: 1e6 / 30e6,
}
TARGETS = (
    Target("torch DistributedSampler", 5.0, (EPOCH, FIRST)),
    Target("Horovod ElasticSampler", 5.0, (EPOCH, FIRST)),
    Target("tf.data shuffle().shard()", 5.0, (EPOCH, FIRST)),
    Target(PROMISED, 1.0, tuple(PROMISES)),
)


def times_of(measured: Results, samples: int) -> Results:
    """What was measured, by the names of the table; peers at 10^9 extrapolated from ``samples``."""
    table: dict[str, dict[str, list[float]]] = {PROMISED: {name: [value] for name, value in PROMISES.items()}}
    for variant in measured.variants:
        found = measured.samples[variant.name]
        row = {FIRST: list(found["first"]), EPOCH: list(found["epoch"]), MEMORY: list(found["bytes"])}
        if variant.role == "ours":
            row[BILLION_FIRST] = list(found["billion_first"])
            row[BILLION_MEMORY] = list(found["billion_bytes"])
            row |= {name: list(found[key]) for key, name in RATES.items()}
        else:
            row[BILLION_FIRST] = [value * BILLION / samples for value in found["first"]]
            row[BILLION_MEMORY] = [value * BILLION / samples for value in found["bytes"]]
        table[variant.name] = row
    promised = Variant(PROMISED, "limit", fixed=PROMISES)
    return Results((promised, *measured.variants), table, frozenset({MEMORY, BILLION_MEMORY}))


def variant(name: str, role: str, way: str, samples: int) -> Variant:
    command = (sys.executable, "-m", "ci.bench.workers.shard_plan", "--way", way, "--samples", str(samples))
    return Variant(name, role, processes=(Process(command, thread_env(1)),))  # type: ignore[arg-type]


def main() -> int:
    options = arguments(__doc__ or "", rounds=3, steps=1, quick=(1, 1)).parse_args()
    samples = QUICK_SAMPLES if options.quick else SAMPLES
    variants = [variant(name, "peer", way, samples) for name, way in PEERS.items()]
    measured = interleave([*variants, variant(OURS, "ours", "hvdscale", samples)], options.rounds, options.deadline)
    notes = [
        f"Rank 0 of 8, one process on 1 thread, {samples:,} samples, batches of 256; what the peers need for 10^9 is "
        f"extrapolated from {samples:,} samples. 10^6 keys to their shards, 10^6 samples of a random order: best of 3.",
    ]
    return finish("The order of samples", times_of(measured, samples), TARGETS, options, notes)


if __name__ == "__main__":
    raise SystemExit(main())
