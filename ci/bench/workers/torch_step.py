"""One rank of the torch bench: a small GPT trained on random bytes, its ranks joined in the way ``--way`` names."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable

import torch
from torch import nn

from ci.bench.workers.ranks import digest, in_step, leave_result, median_seconds, meet

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY, BATCH = 256, 4, 4, 128, 256, 8


class Block(nn.Module):
    """Pre-norm attention and a four times wider perceptron."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [batch, context, width], in and out
        batch, length, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, 3, HEADS, width // HEADS).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Bytes in, logits of the next byte out; 3.3 million parameters."""

    def __init__(self, width: int = WIDTH, layers: int = LAYERS, context: int = CONTEXT) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # [batch, context] -> [batch, context, vocabulary]
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.head(self.norm(self.blocks(self.tokens(ids) + self.places(places))))


def join(way: str, model: GPT, optimizer: torch.optim.Optimizer) -> tuple[int, int, nn.Module, torch.optim.Optimizer]:
    """(rank, ranks, model, optimizer) as this way of training hands them back."""
    if way in ("independent", "in_step"):
        return int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"]), model, optimizer
    if way == "ddp":
        rank, ranks = int(os.environ["BENCH_RANK"]), int(os.environ["BENCH_RANKS"])
        store = f"file://{os.environ['BENCH_FOLDER']}/store"
        torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)
        return rank, ranks, nn.parallel.DistributedDataParallel(model), optimizer
    if way == "horovod":
        import horovod.torch as hvd

        hvd.init()
        hvd.broadcast_parameters(model.state_dict(), root_rank=0)
        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
        return hvd.rank(), hvd.size(), model, optimizer
    import hvdscale.torch as hvd

    hvd.init()
    optimizer = hvd.DistributedOptimizer(optimizer, model=model)
    return hvd.rank(), hvd.size(), model, optimizer


def random_batch(rank: int) -> torch.Tensor:
    """Bytes, another draw on each rank; int64 [batch, context + 1]."""
    return torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(rank))


def training_step(model: nn.Module, optimizer: torch.optim.Optimizer, data: torch.Tensor) -> Callable[[], float]:
    """A function that trains once on ``data`` and returns the loss."""

    def step() -> float:
        optimizer.zero_grad()
        logits = model(data[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), data[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("independent", "in_step", "ddp", "horovod", "hvdscale"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = GPT(options.width, options.layers).to(options.device)
    rank, ranks, joined, optimizer = join(options.way, model, torch.optim.AdamW(model.parameters(), lr=3e-4))
    step = training_step(joined, optimizer, random_batch(rank).to(options.device))
    if options.way == "in_step":
        step = in_step(step, rank, ranks)
    meet(rank, ranks)
    seconds = median_seconds(step, options.steps, warmup=3)
    weights = (
        None
        if options.way in ("independent", "in_step")
        else digest(p.detach().cpu().numpy() for p in model.parameters())
    )
    leave_result(rank, weights, step=seconds)


if __name__ == "__main__":
    main()
