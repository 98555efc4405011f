"""One rank of ``test_one_plan_everywhere``: reads with the loaders of adapters or with none, and leaves what it read.

    python -m tests.parallel.one_plan FOLDER FIRST_LEG WAY [WAY]

WAY is torch, tensorflow, keras or bare: a bare MPI process has mpi4py and the core alone. Each way reads every kind
of plan for two epochs and leaves the sample numbers as bytes. Then it goes on with the run that the leg before it left
in FOLDER, over as many ranks as there are now, some of which get further than others.
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
BATCHES = (11, 9, 4, 5, 3)  # that rank 0 reads in each leg; rank r reads r + 1 times as many

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
    for tail in ("exact", "pad"):  # of the last global batch's one sample, two shards get nothing
        of = ShardPlan(N, SHARDS, seed=4, tail=tail)  # type: ignore[arg-type]
        found[f"balanced {tail}"] = BalancedPlan(of, np.arange(N) % 70 + 1)
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
        data: Any = np.arange(N)
        if hvd.__name__ == "hvdscale.keras":
            data = (data, data)  # under tail "pad" Keras must have something to weigh
        self._loader = hvd.shard_dataset(data, plan, 5, shard=shard)

    def take(self, count: int) -> Iterator[Read]:
        from tests.contract.data import batches_of

        return batches_of(self._loader, count)

    def epochs(self, count: int) -> Iterator[Read]:
        from tests.contract.data import one_pass

        while self._loader.epoch < count:
            yield from one_pass(self._loader)

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()


def reads_every_plan(folder: Path, way: str, hvd: Any, rank: int, ranks: int) -> None:
    for name, plan in plans().items():
        for shard in range(rank, SHARDS, ranks):
            batches = (Loaded(hvd, plan, shard) if hvd else Bare(plan, shard)).epochs(2)
            numbers = [number for _, batch in batches for number in batch]
            (folder / f"{name}, shard {shard}, {way}").write_bytes(np.array(numbers, "<i8").tobytes())


def takes_over(folder: Path, leg: int, hvd: Any, rank: int, ranks: int) -> None:
    states = [json.loads(file.read_text()) for file in sorted(folder.glob(f"state {leg - 1} *"))]
    plan = ShardPlan.resume(states, ranks) if leg else RUN
    own = Loaded(hvd, plan, rank) if hvd else Bare(plan, rank)
    read = [(epoch, number) for epoch, batch in own.take(BATCHES[leg] * (rank + 1)) for number in batch]
    (folder / f"read {leg} {rank}").write_text(json.dumps(read))
    (folder / f"state {leg} {rank}").write_text(json.dumps(own.state_dict()))


def main() -> None:
    folder, first, ways = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    for leg, way in enumerate(ways, first):
        hvd: Any = None
        if way == "bare":
            from mpi4py import MPI

            rank, ranks = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
            loaded = {"torch", "tensorflow", "keras", "horovod"} & set(sys.modules)
            assert not loaded, f"the core alone has loaded {loaded}"
        else:
            hvd = importlib.import_module(f"hvdscale.{way}")
            hvd.init()
            rank, ranks = hvd.rank(), hvd.size()
        reads_every_plan(folder, f"leg {leg}", hvd, rank, ranks)
        takes_over(folder, leg, hvd, rank, ranks)
        if hvd:
            hvd.world().transport.allgather(b"")  # all have left their states
    if hvd:
        hvd.shutdown()


if __name__ == "__main__":
    main()
