"""One rank of the bench of updates: a small GPT, its update made in the way ``--way`` names, by AdamW."""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from ci.bench.workers.ranks import digest, leave_result, median_seconds, meet
from ci.bench.workers.torch_step import GPT, Block, random_batch, training_step

WAYS = ("local", "sharded", "central", "ddp", "zero", "fsdp")


def join(way: str, model: GPT) -> tuple[int, int, nn.Module, torch.optim.Optimizer]:
    """(rank, ranks, model, optimizer) as this way of training hands them back."""
    if way in ("local", "sharded", "central"):
        import hvdscale.torch as hvd

        hvd.init()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
        optimizer = hvd.DistributedOptimizer(optimizer, model=model, sync=hvd.EveryStep(way))
        return hvd.rank(), hvd.size(), model, optimizer
    rank, ranks = int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"])
    store = f"file://{os.environ['BENCH_FOLDER']}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    if way == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (ranks,))
        for block in model.modules():
            if isinstance(block, Block):
                fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return rank, ranks, model, torch.optim.AdamW(model.parameters(), lr=3e-4)
    joined = nn.parallel.DistributedDataParallel(model)
    if way == "ddp":
        return rank, ranks, joined, torch.optim.AdamW(model.parameters(), lr=3e-4)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, lr=3e-4)
    return rank, ranks, joined, zero


def state_bytes(optimizer: Any) -> int:
    """What this rank holds of the optimizer's state."""
    held = optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer
    values = [value for entry in held.state.values() for value in entry.values()]
    tensors = [v.to_local() if hasattr(v, "to_local") else v for v in values if isinstance(v, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)


def weights_of(model: nn.Module, way: str) -> list[Any]:
    """The whole weights; with FSDP a rank has its part, which differs from rank to rank."""
    tensors = [p.detach() for p in model.parameters()]
    return [(t.full_tensor() if way == "fsdp" else t).numpy() for t in tensors]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=WAYS, required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT()
    whole = 8 * sum(p.numel() for p in model.parameters())
    rank, ranks, joined, optimizer = join(options.way, model)
    step = training_step(joined, optimizer, random_batch(rank))
    meet(rank, ranks)
    seconds = median_seconds(step, options.steps, warmup=3)
    facts = {"share": state_bytes(optimizer) / whole}
    leave_result(rank, digest(weights_of(model, options.way)), facts, step=seconds)


if __name__ == "__main__":
    main()
