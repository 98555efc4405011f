"""One rank of the all-reduce bench: Horovod's all-reduce of float32 vectors of the given sizes, through torch."""

from __future__ import annotations

import argparse
import importlib

import torch

from ci.bench.workers.ranks import leave_result, median_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("horovod", "hvdscale"), required=True)
    parser.add_argument("sizes", nargs="+", metavar="NAME:BYTES:REPEATS")
    options = parser.parse_args()
    hvd = importlib.import_module(f"{options.way}.torch")
    hvd.init()
    seconds = {}
    for spec in options.sizes:
        name, size, repeats = spec.split(":")
        vector = torch.ones(int(size) // 4)

        def step(vector: torch.Tensor = vector, name: str = name) -> None:
            hvd.allreduce_(vector, name=name, op=hvd.Average)

        seconds[name] = median_seconds(step, int(repeats), warmup=1)
        if not torch.equal(vector, torch.ones_like(vector)):
            raise ArithmeticError(f"the average of ones over {hvd.size()} ranks is not one at {name}")
    leave_result(hvd.rank(), **seconds)


if __name__ == "__main__":
    main()
