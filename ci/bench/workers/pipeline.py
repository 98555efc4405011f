"""One rank of the pipeline bench: eight transformer blocks in two stages, or stages that only sleep."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ci.bench.workers.ranks import leave_result, medians_of, meet
from ci.bench.workers.torch_step import WIDTH, Block

BLOCKS, BATCH, CONTEXT = 8, 32, 64  # at m=16 a micro-batch is of 128 tokens
MICROBATCHES = (4, 8, 16)
SLEEP_SECONDS, SLEEP_BATCH = 0.02, 8


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [Block(WIDTH) for _ in range(BLOCKS)]


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(BATCH, CONTEXT, WIDTH, generator=generator) for _ in range(2))  # type: ignore[return-value]


class Sleep(torch.autograd.Function):
    """Takes its time forward, and twice as much backward, and no core."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        time.sleep(SLEEP_SECONDS)
        return x * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(2 * SLEEP_SECONDS)
        return gradients[0], gradients[0].sum()


class Sleeper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x, self.weight)


def independent(microbatches: int) -> tuple[int, int, Callable[[], object]]:
    """The whole model on each rank, micro-batch after micro-batch: what one rank takes while the other is as busy."""
    model = nn.Sequential(*layers())
    x, y = data()

    def step() -> None:
        model.zero_grad()
        for a, b in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
            (nn.functional.mse_loss(model(a), b) / microbatches).backward()

    return int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"]), step


def of_torch(microbatches: int) -> tuple[int, int, Callable[[], object]]:
    """``torch.distributed.pipelining`` over gloo."""
    from torch import distributed
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B

    rank, ranks = int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"])
    if not distributed.is_initialized():
        store = f"file://{os.environ['BENCH_FOLDER']}/store"
        distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
    per = BLOCKS // ranks
    stage_model = nn.Sequential(*layers()[rank * per : (rank + 1) * per])
    stage = PipelineStage(stage_model, rank, ranks, torch.device("cpu"))
    schedule = Schedule1F1B(stage, microbatches, loss_fn=nn.functional.mse_loss)
    x, y = data()

    def step() -> None:
        stage_model.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])

    return rank, ranks, step


def of_hvdscale(microbatches: int, schedule: str) -> tuple[int, int, Callable[[], object]]:
    import hvdscale.torch as hvd

    if not hvd.is_initialized():
        hvd.init()
    mesh = hvd.Mesh(pp=hvd.size())
    loss = nn.functional.mse_loss
    sharded = hvd.shard_model(layers(), mesh, loss=loss, microbatches=microbatches, schedule=schedule)
    x, y = data()

    def step() -> None:
        sharded.zero_grad()
        sharded.train_step(x, y)

    return hvd.rank(), hvd.size(), step


def asleep(schedule: str) -> tuple[int, int, Callable[[], object]]:
    import hvdscale.torch as hvd

    if not hvd.is_initialized():
        hvd.init()
    chunks = 2 if schedule == "interleaved" else 1
    sleepers = [Sleeper() for _ in range(hvd.size() * chunks)]
    mesh = hvd.Mesh(pp=hvd.size())
    loss = nn.functional.mse_loss
    sharded = hvd.shard_model(
        sleepers, mesh, loss=loss, microbatches=SLEEP_BATCH, schedule=schedule, chunks=chunks, sample=None
    )
    x = torch.ones(SLEEP_BATCH, 4)
    return hvd.rank(), hvd.size(), lambda: sharded.train_step(x, x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("independent", "torch", "1f1b", "zb", "asleep"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    made: dict[str, tuple[int, int, Callable[[], object]]] = {}
    if options.way == "asleep":
        made = {schedule: asleep(schedule) for schedule in ("gpipe", "1f1b", "interleaved")}
    else:
        for m in MICROBATCHES if options.way != "zb" else MICROBATCHES[:1]:
            if options.way == "independent":
                made[f"m={m}"] = independent(m)
            elif options.way == "torch":
                made[f"m={m}"] = of_torch(m)
            else:
                made[f"m={m}"] = of_hvdscale(m, options.way)
    rank, ranks, _ = next(iter(made.values()))
    meet(rank, ranks)
    figures = medians_of({name: step for name, (_, _, step) in made.items()}, options.steps, warmup=2)
    leave_result(rank, **figures)


if __name__ == "__main__":
    main()
