"""One rank of the features bench: a small transformer in torch, whole, by data or by features, on the same batches."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvdscale.torch as hvd
from ci.bench.workers.ranks import leave_result, median_seconds, meet

WIDTH, LAYERS, HEADS, CONTEXT, VOCABULARY, BATCH = 256, 4, 4, 128, 256, 8


class Transformer(nn.Module):
    """Bytes in, logits of the next byte out; 3.3 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True) for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places.weight
        for block in self.blocks:
            x = block(x, self.mask)
        return self.head(x)


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", choices=("whole", "data", "features"), required=True)
    parser.add_argument("--steps", type=int, required=True)
    options = parser.parse_args()
    hvd.init()
    ranks = hvd.size()
    torch.manual_seed(0)
    mesh = hvd.Mesh(tp=ranks) if options.way == "features" else hvd.Mesh(dp=ranks)
    model = Transformer()
    whole = sum(p.numel() for p in model.parameters())
    sharded = hvd.shard_model(model, mesh, by="features", loss=loss_of)
    optimizer = hvd.DistributedOptimizer(torch.optim.AdamW(sharded.parameters(), 3e-4), model=sharded)
    data = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    data = data.chunk(mesh.dp)[mesh.coordinates(hvd.rank()).dp]  # the same tokens a step in every way

    def step() -> None:
        optimizer.zero_grad()
        sharded.train_step(data[:, :-1], data[:, 1:])
        optimizer.step()

    meet(hvd.rank(), ranks)
    seconds = median_seconds(step, options.steps, warmup=3)
    held = sum(p.numel() * p.element_size() for p in sharded.parameters())
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor) and t.dim()]
    held += sum(t.numel() * t.element_size() for t in state)
    leave_result(hvd.rank(), step=seconds, share=held / (3 * 4 * whole))


if __name__ == "__main__":
    main()
