"""Epochs of a loader fed by a plan, beside the same loader fed by its framework's own sampler.

    python -m ci.bench.loaders [--quick] [--json FILE]

One process per way, as rank 0 of 8, batches of 256 rows of 64 numbers that lie in memory: what differs is who says
which rows come next. The same ``TensorDataset`` goes through the same ``DataLoader``, without and with workers; then
the same arrays, which ``shard_dataset`` reads a batch at a time, and through ``tf.data``.
"""

from __future__ import annotations

import sys

from ci.bench.harness import Process, Results, Target, Variant, arguments, finish, interleave
from ci.bench.local import thread_env
from ci.bench.workers.loaders import ARRAYS, PIPELINE, PLAIN, WORKERS

SAMPLES, QUICK_SAMPLES = 2**19, 2**16
TORCH, TENSORFLOW, OURS = "torch DistributedSampler", "tf.data shuffle().shard()", "hvdscale"
TARGETS = (Target(TORCH, 1.0, (PLAIN, WORKERS, ARRAYS)), Target(TENSORFLOW, 1.0, (PIPELINE,)))


def variant(name: str, role: str, way: str, samples: int) -> Variant:
    command = (sys.executable, "-m", "ci.bench.workers.loaders", "--way", way, "--samples", str(samples))
    return Variant(name, role, processes=(Process(command, thread_env(1)),))  # type: ignore[arg-type]


def together(measured: Results) -> Results:
    """Ours of both frameworks, which are measured in processes of their own, as one row of the table."""
    *peers, in_torch, in_tensorflow = measured.variants
    samples = {each.name: measured.samples[each.name] for each in peers}
    samples[OURS] = {**measured.samples[in_torch.name], **measured.samples[in_tensorflow.name]}
    return Results((*peers, Variant(OURS, "ours", processes=in_torch.processes)), samples)


def main() -> int:
    options = arguments(__doc__ or "", rounds=3, steps=1, quick=(1, 1)).parse_args()
    samples = QUICK_SAMPLES if options.quick else SAMPLES
    variants = [
        variant(TORCH, "peer", "torch", samples),
        variant(TENSORFLOW, "peer", "tensorflow", samples),
        variant("hvdscale.torch", "ours", "hvdscale.torch", samples),
        variant("hvdscale.tensorflow", "ours", "hvdscale.tensorflow", samples),
    ]
    measured = interleave(variants, options.rounds, options.deadline)
    note = (
        f"Rank 0 of 8 over {samples:,} samples, one process on 1 thread and, where it says so, 2 workers; the second "
        f"of two epochs. '{ARRAYS}': the peer has no other way than its '{PLAIN}'."
    )
    return finish("An epoch of a loader", together(measured), TARGETS, options, [note])


if __name__ == "__main__":
    raise SystemExit(main())
