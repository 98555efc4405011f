"""One rank of ``test_one_plan_everywhere``: reads with the loader of one adapter or none, and leaves what it read.

    python -m tests.parallel.one_plan FOLDER WAY BATCHES

WAY is torch, tensorflow, keras or bare: a bare MPI process has mpi4py and the core alone. First every kind of plan is
read for two epochs, the sample numbers left as bytes. Then the run whose states lie in FOLDER goes on over as many
ranks as there are now: rank r reads BATCHES * (r + 1) batches of it.
"""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hvdscale.data import BalancedPlan, ShardPlan

N = 211
SHARDS = 3
KINDS = (("ordered", "exact"), ("random", "exact"), ("hash", "exact"), ("random", "pad"), ("hash", "drop"))
RUN = ShardPlan(N, 2, "random", seed=9)

Read = tuple[int, list[int]]  # the epoch of a batch, and the sample numbers in it


def plans() -> dict[str, ShardPlan | BalancedPlan]:
    """Plans of every kind, by name."""
    keys = [f"document {i % 50}" for i in range(N)]
    found: dict[str, ShardPlan | BalancedPlan] = {
        f"{policy} {tail}": ShardPlan(N, SHARDS, policy, seed=4, tail=tail, keys=keys if policy == "hash" else None)  # type: ignore[arg-type]
        for policy, tail in KINDS
    }
    found["weights"] = ShardPlan(N, SHARDS, weights=range(1, SHARDS + 1))
    found["resized"] = ShardPlan(N, 5, seed=4).resize(SHARDS)[0]
    found["balanced"] = BalancedPlan(ShardPlan(N, SHARDS, seed=4), np.arange(N) % 70 + 1)
    return found


class Bare:
    """What a process reads that has the core and mpi4py alone, in the shape of a loader."""

    def __init__(self, plan: Any, shard: int) -> None:
        self._reader = plan.reader(shard, 5)

    def take(self, count: int) -> Iterator[Read]:
        for batch in itertools.islice(self._reader, count):
            if len(batch):
                yield batch.epoch, batch.indices.tolist()

    def epochs(self, count: int) -> Iterator[Read]:
        for batch in itertools.takewhile(lambda batch: batch.epoch < count, self._reader):
            if len(batch):
                yield batch.epoch, batch.indices.tolist()

    def state_dict(self) -> dict[str, Any]:
        return self._reader.state_dict()


class Loaded:
    """What the loader of an adapter gives."""

    def __init__(self, hvd: Any, plan: Any, shard: int) -> None:
        self._loader = hvd.shard_dataset(np.arange(N), plan, 5, shard=shard)

    def take(self, count: int) -> Iterator[Read]:
        from tests.contract.data import batches_of

        return batches_of(self._loader, count)

    def epochs(self, count: int) -> Iterator[Read]:
        from tests.contract.data import one_pass

        while self._loader.epoch < count:
            yield from one_pass(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()


def main() -> None:
    folder, way, batches = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    hvd: Any = None
    if way == "bare":
        from mpi4py import MPI

        rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
        refused = {"torch", "tensorflow", "keras", "horovod"} & set(sys.modules)
        assert not refused, f"the core alone has loaded {refused}"
    else:
        hvd = importlib.import_module(f"hvdscale.{way}")
        hvd.init()
        rank, ranks = hvd.rank(), hvd.size()

    def reads(plan: Any, shard: int) -> Bare | Loaded:
        return Bare(plan, shard) if hvd is None else Loaded(hvd, plan, shard)

    for name, plan in plans().items():
        for shard in range(rank, SHARDS, ranks):
            numbers = [number for _, batch in reads(plan, shard).epochs(2) for number in batch]
            (folder / f"{name}, shard {shard}, {way}").write_bytes(np.array(numbers, "<i8").tobytes())

    states = [json.loads(file.read_text()) for file in sorted(folder.glob("state-*"))]
    own = reads(ShardPlan.resume(states, ranks) if states else RUN, rank)
    read = [(epoch, number) for epoch, batch in own.take(batches * (rank + 1)) for number in batch]
    (folder / f"read by {way}, rank {rank}").write_text(json.dumps(read))
    (folder / f"next-state-{rank}").write_text(json.dumps(own.state_dict()))
    if hvd is not None:
        hvd.world().transport.allgather(b"")  # all have resumed and read: they leave together
        hvd.shutdown()


if __name__ == "__main__":
    main()
