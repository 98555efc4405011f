"""One process: the order of one rank of 8 in its own way, from nothing to the first batch, then a whole epoch.

Only sample numbers are made, no data is read. Each way makes what its own users iterate over: lists for the torch
and Horovod samplers, tensors for tf.data, arrays for hvdscale.
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ci.bench.workers.ranks import leave_result

RANKS, BATCH = 8, 256
BILLION = 10**9
KEYS = 4 * 10**6
STRINGS = 10**6
MILLION = 10**6


def batched(samples: Iterable[int]) -> Iterator[list[int]]:
    stream = iter(samples)
    return iter(lambda: list(itertools.islice(stream, BATCH)), [])


def torch_way(n: int) -> Callable[[], Iterator[Any]]:
    from torch.utils.data import DistributedSampler

    return lambda: batched(DistributedSampler(range(n), RANKS, 0, shuffle=True, seed=1))


def horovod_way(n: int) -> Callable[[], Iterator[Any]]:
    import horovod.torch.elastic.sampler as elastic

    elastic.rank, elastic.size = (lambda: 0), (lambda: RANKS)  # as if 8 ranks had been launched
    return lambda: batched(elastic.ElasticSampler(range(n), shuffle=True, seed=1))


def tensorflow_way(n: int) -> Callable[[], Iterator[Any]]:
    import tensorflow as tf

    return lambda: iter(tf.data.Dataset.range(n).shuffle(n, seed=1).shard(RANKS, 0).batch(BATCH))


def hvdscale_way(n: int) -> Callable[[], Iterator[Any]]:
    from hvdscale.data import ShardPlan

    return lambda: ShardPlan(n, RANKS, "random", seed=1).reader(0, BATCH).ahead(epochs=1)


WAYS = {"torch": torch_way, "horovod": horovod_way, "tensorflow": tensorflow_way, "hvdscale": hvdscale_way}


class Memory:
    """What a stretch of work adds to this process's memory at its peak (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
        self._before = self._peak_bytes()

    def added_bytes(self) -> int:
        return max(4096, self._peak_bytes() - self._before)  # a page: ratios are taken to it

    @staticmethod
    def _peak_bytes() -> int:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def order(way: str, n: int) -> dict[str, float]:
    """Seconds to the first batch and for the epoch with it, and the bytes both took; imports are done before."""
    start_reading = WAYS[way](n)
    memory = Memory()
    start = time.perf_counter()
    batches = start_reading()
    next(batches)
    first = time.perf_counter() - start
    for _ in batches:
        pass
    return {"first": first, "epoch": time.perf_counter() - start, "bytes": memory.added_bytes()}


def best_seconds(work: Callable[[], Any], turns: int = 3) -> float:
    took = []
    for _ in range(turns):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return min(took)


def rates() -> dict[str, float]:
    """Seconds for a million on one core of what the core promises, and the first batch of a billion samples."""
    from hvdscale.data import ShardPlan

    memory = Memory()
    start = time.perf_counter()
    next(ShardPlan(BILLION, RANKS, "random", seed=1).reader(0, BATCH))
    billion = {"billion_first": time.perf_counter() - start, "billion_bytes": float(memory.added_bytes())}
    plan = ShardPlan(0, 64, "hash", seed=1)
    integers = np.arange(KEYS)
    strings = [f"document-{i:06d}" for i in range(STRINGS)]
    whole = ShardPlan(KEYS, 1, "random", seed=1)
    return {
        **billion,
        "integer": best_seconds(lambda: plan.owner_of_keys(integers)) / KEYS * MILLION,
        "string": best_seconds(lambda: plan.owner_of_keys(strings)) / STRINGS * MILLION,
        "random": best_seconds(lambda: sum(len(block) for block in whole.blocks(0))) / KEYS * MILLION,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--samples", type=int, required=True)
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    figures = rates() if options.way == "hvdscale" else {}
    leave_result(0, **figures, **order(options.way, options.samples))


if __name__ == "__main__":
    main()
