"""The language model of ``torch_lm.py`` cut into stages: each rank holds some of its layers, and its blocks stay whole.

    mpirun -np 2 python examples/pipeline_lm.py --pp 2
    mpirun -np 4 python examples/pipeline_lm.py --pp 2 --microbatches 8 --schedule zb    # two copies, on other text

The losses are those of ``torch_lm.py`` on as many ranks as there are copies, with the same ``--batch-size``.
Copies average their gradients at every step: of the flags of the agreement only ``--sync every-step`` is taken.
"""

import argparse

import numpy as np
import torch
from lm.batches import Share
from lm.flags import parse_flags, run
from lm.mesh import add_pipeline_flags, mesh_of, pipeline_of
from lm.plans import plan_of
from lm.report import Report
from lm.together import load_together
from torch import Tensor
from torch.nn import functional as F
from torch_lm import Block, LanguageModel, mean_of_ranks, schedule

import hvdscale.torch as hvd
from hvdscale.errors import PlanError


def two_stages(parser: argparse.ArgumentParser) -> None:
    add_pipeline_flags(parser, pp=2)


def mean_over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.long().flatten())


def evaluate(model: hvd.ShardedModel, share: Share, batch_size: int, report: Report) -> None:
    inputs, targets = share.held_out
    total = 0.0
    for i in range(0, len(inputs), batch_size):
        x, y = tensors(inputs[i : i + batch_size], targets[i : i + batch_size])
        total += model.eval_step(x, y).item() * y.numel()
    report.evaluated(total / max(targets.size, 1), targets.size)


def tensors(inputs: np.ndarray, targets: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def main() -> None:
    flags = parse_flags(__doc__, extend=two_stages)
    if plan_of(flags) != hvd.EveryStep():
        raise PlanError("This example averages gradients at every step. Leave --sync and --update out.")
    hvd.init(process_sets="dynamic")
    rank, ranks = hvd.rank(), hvd.size()
    mesh = mesh_of(flags, ranks)
    share = load_together(flags, mesh.coordinates(rank).dp, mesh.dp, mean_of_ranks)

    torch.manual_seed(flags.seed)
    whole = LanguageModel(share.vocabulary, flags.context, flags.layers, flags.width, flags.heads)
    parameters = sum(p.numel() for p in whole.parameters())
    model = hvd.shard_model(
        whole,
        mesh,
        by="graph",
        whole=(Block,),
        loss=mean_over_tokens,
        sample=tensors(*share.batches[0])[0],
        **pipeline_of(flags),
    )
    optimizer = torch.optim.AdamW(model.parameters(), flags.lr, weight_decay=0.01)
    optimizer = hvd.DistributedOptimizer(optimizer, model=model)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, flags.steps, flags.warmup))

    tokens = flags.batch_size * flags.context // mesh.pp
    report = Report(rank, ranks, flags.steps, tokens, mean_of_ranks, flags.logdir)
    report.say(f"{ranks} ranks on PyTorch {torch.__version__}")
    report.say(f"{parameters:,} parameters; {share.description}")
    report.say(model.describe())
    evaluate(model, share, flags.batch_size, report)
    for step in range(flags.steps):
        optimizer.zero_grad()
        loss = model.train_step(*tensors(*share.batches[step]))
        hvd.clip_grad_norm_(model, 1.0)
        optimizer.step()
        rate.step()
        report.step(loss.item())
        if (step + 1) % flags.eval_every == 0 or step + 1 == flags.steps:
            evaluate(model, share, flags.batch_size, report)
    report.finish(flags.plot, flags.record)


if __name__ == "__main__":
    run(main)
