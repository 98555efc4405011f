"""One process: epochs of one way to feed a loader, as rank 0 of 8."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ci.bench.workers.ranks import leave_result

__all__ = ["ARRAYS", "PIPELINE", "PLAIN", "WORKERS"]

PLAIN, WORKERS, ARRAYS, PIPELINE = "DataLoader", "DataLoader, 2 workers", "DataLoader of arrays", "tf.data pipeline"
RANKS, BATCH, FEATURES = 8, 256, 64

Epoch = Callable[[int], Iterable[Any]]
"""The batches of the epoch with this number."""


def rows(n: int) -> tuple[np.ndarray, np.ndarray]:
    numbers = np.arange(n)
    return np.broadcast_to(numbers[:, None], (n, FEATURES)).astype(np.float32), numbers


def torch_way(n: int) -> dict[str, Epoch]:
    import torch
    from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

    data = TensorDataset(*map(torch.from_numpy, rows(n)))
    sampler = DistributedSampler(data, RANKS, 0, shuffle=True, seed=1)

    def of(workers: int) -> Epoch:
        loader = DataLoader(data, BATCH, sampler=sampler, num_workers=workers, persistent_workers=workers > 0)

        def epoch(number: int) -> Iterable[Any]:
            sampler.set_epoch(number)
            return loader

        return epoch

    return {PLAIN: of(0), WORKERS: of(2), ARRAYS: of(0)}


def our_torch_way(n: int) -> dict[str, Epoch]:
    import torch
    from torch.utils.data import TensorDataset

    import hvdscale.torch as hvd

    arrays = rows(n)
    data, plan = TensorDataset(*map(torch.from_numpy, arrays)), hvd.ShardPlan(n, RANKS, seed=1)

    def of(source: Any, workers: int) -> Epoch:
        loader = hvd.shard_dataset(source, plan, BATCH, shard=0, workers=workers)
        return lambda number: loader

    return {PLAIN: of(data, 0), WORKERS: of(data, 2), ARRAYS: of(arrays, 0)}


def tensorflow_way(n: int) -> dict[str, Epoch]:
    import tensorflow as tf

    data = tf.data.Dataset.from_tensor_slices(rows(n)).shuffle(n, seed=1).shard(RANKS, 0).batch(BATCH).prefetch(2)
    return {PIPELINE: lambda number: data}


def our_tensorflow_way(n: int) -> dict[str, Epoch]:
    import hvdscale.tensorflow as hvd

    data = hvd.shard_dataset(rows(n), hvd.ShardPlan(n, RANKS, seed=1), BATCH, shard=0)
    return {PIPELINE: lambda number: data}


WAYS = {
    "torch": torch_way,
    "tensorflow": tensorflow_way,
    "hvdscale.torch": our_torch_way,
    "hvdscale.tensorflow": our_tensorflow_way,
}


def seconds(epoch: Epoch, samples: int) -> float:
    """Of the second epoch: workers have started and everything is traced."""
    took = 0.0
    for number in range(2):
        start, got = time.perf_counter(), 0
        for batch in epoch(number):
            got += len(batch[1])
        took = time.perf_counter() - start
        assert got == samples, f"{got} samples came, {samples} must"
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--samples", type=int, required=True)
    options = parser.parse_args()
    ways = WAYS[options.way](options.samples)
    leave_result(0, **{name: seconds(epoch, options.samples // RANKS) for name, epoch in ways.items()})


if __name__ == "__main__":
    main()
