"""An all-reduce through an adapter gives the sum it must, on every rank: ``python -m ... allreduce torch``."""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from hvdscale.errors import TransportError

__all__ = ["main"]

_LENGTH = 1 << 18
_ROUNDS = 7


def main(framework: str) -> None:
    """Sum a vector whose entries are small integers, so that fp32 is exact in any order.

    Raises:
        TransportError: a rank received another sum.
    """
    hvd = importlib.import_module(f"hvdscale.{framework}")
    hvd.init()
    rank, size = hvd.rank(), hvd.size()
    base = (np.arange(_LENGTH) % 1021).astype(np.float32)  # [length]
    expected = base * (size * (size + 1) // 2)
    seconds = []
    for i in range(_ROUNDS):
        mine = _tensor(framework, base * (rank + 1))
        start = time.perf_counter()
        total = hvd.allreduce(mine, op=hvd.Sum, name=f"doctor.{i}").numpy()  # [length]
        seconds.append(time.perf_counter() - start)
        wrong = int((total != expected).sum())
        if wrong:
            raise TransportError(
                f"rank {rank}: {wrong} of {_LENGTH} sums over {size} ranks are wrong; the first should be "
                f"{expected[total != expected][0]} and is {total[total != expected][0]}"
            )
    if rank == 0:
        took = f"{statistics.median(seconds) * 1e3:.1f} ms for {base.nbytes / 2**20:.0f} MiB"
        print(json.dumps({"says": f"{size} ranks, {_ROUNDS} sums exact, {took}"}), flush=True)
    hvd.shutdown()


def _tensor(framework: str, array: np.ndarray) -> Any:
    if framework == "torch":
        import torch

        return torch.from_numpy(array)
    import tensorflow

    return tensorflow.constant(array)


if __name__ == "__main__":
    main(sys.argv[1])
