"""The same language model as ``train_lm.py`` in plain PyTorch, with a loop of its own.

    python examples/torch_lm.py
    mpirun -np 2 python examples/torch_lm.py
    mpirun -np 2 python examples/torch_lm.py --sync diloco --every 16 --wire int8
    mpirun -np 2 python examples/torch_lm.py --sync async --staleness 4
    mpirun -np 2 python examples/torch_lm.py --tp 2

Lines that end in ``# hvd`` are all that distributed training needs.
"""

import math

import numpy as np
import torch
from lm.batches import Share
from lm.flags import parse_flags, process_sets, run
from lm.mesh import add_mesh_flags, mesh_of
from lm.plans import plan_of
from lm.report import Report
from lm.together import load_together
from torch import Tensor, nn
from torch.nn import functional as F

import hvdscale.torch as hvd  # hvd


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # [batch, context, width]
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [batch, heads, context, :]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_2(x))


class LanguageModel(nn.Module):
    """Tokens int[batch, context] to logits float32[batch, context, vocabulary]."""

    def __init__(self, vocabulary: int, context: int, depth: int, width: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        return self.head(self.norm(self.blocks(x)))

    def loss(self, inputs: np.ndarray, targets: np.ndarray) -> Tensor:
        """Mean over tokens, in nats."""
        logits = self(torch.from_numpy(inputs))
        return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).long().flatten())


def schedule(step: int, steps: int, warmup: int) -> float:
    """The part of the highest learning rate at ``step``: linear warm-up, then a cosine down to a tenth."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / (steps - warmup))


def mean_of_ranks(values: np.ndarray) -> np.ndarray:
    return hvd.allreduce(torch.from_numpy(values)).numpy()  # hvd


def evaluate(
    model: LanguageModel, optimizer: torch.optim.Optimizer, share: Share, batch_size: int, report: Report
) -> None:
    inputs, targets = share.held_out
    total = 0.0
    with optimizer.sync.evaluating(), torch.no_grad():  # hvd: the weights that all ranks share
        for i in range(0, len(inputs), batch_size):
            piece = targets[i : i + batch_size]
            total += model.loss(inputs[i : i + batch_size], piece).item() * piece.size
    report.evaluated(total / max(targets.size, 1), targets.size)


def main() -> None:
    flags = parse_flags(__doc__, extend=add_mesh_flags)
    hvd.init(process_sets=process_sets(flags))  # hvd
    rank, ranks = hvd.rank(), hvd.size()  # hvd
    mesh = mesh_of(flags, ranks)
    share = load_together(flags, mesh.coordinates(rank).dp, mesh.dp, mean_of_ranks)

    torch.manual_seed(flags.seed)
    model = LanguageModel(share.vocabulary, flags.context, flags.layers, flags.width, flags.heads)
    parameters = sum(p.numel() for p in model.parameters())
    held = hvd.shard_model(model, mesh, by="features") if mesh.tp > 1 else model  # hvd
    optimizer = torch.optim.AdamW(model.parameters(), flags.lr, weight_decay=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model=held, sync=plan_of(flags))  # hvd
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, flags.steps, flags.warmup))

    tokens = flags.batch_size * flags.context // mesh.tp
    report = Report(rank, ranks, flags.steps, tokens, mean_of_ranks, flags.logdir)
    report.agreement = optimizer.sync.metrics  # hvd
    report.say(f"{ranks} rank{'s' if ranks > 1 else ''} on PyTorch {torch.__version__}")
    report.say(f"{parameters:,} parameters; {share.description}")
    evaluate(model, optimizer, share, flags.batch_size, report)
    for step in range(flags.steps):
        optimizer.zero_grad()
        loss = model.loss(*share.batches[step])
        loss.backward()
        hvd.clip_grad_norm_(held, 1.0)  # hvd
        optimizer.sync.tell(loss.item())  # hvd
        optimizer.step()
        rate.step()
        report.step(loss.item())
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.steps:
            if step + 1 == flags.steps:
                optimizer.sync.flush()  # hvd
            evaluate(model, optimizer, share, flags.batch_size, report)
    report.finish(flags.plot, flags.record)


if __name__ == "__main__":
    run(main)
