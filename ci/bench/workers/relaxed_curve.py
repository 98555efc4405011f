"""One rank of a curve: a small GPT on real text, and its held-out loss as training goes on."""

from __future__ import annotations

import argparse
import math
import time

import torch
from lm.batches import Share, load_share
from lm.flags import parse_flags
from torch import nn

from ci.bench.workers.ranks import leave_result
from ci.bench.workers.relaxed_ways import Trainer, first_model, join

WARMUP_STEPS, LAST_PART = 40, 0.1
EQUAL_STEPS = 300  # where ways are compared at equal tokens
HELD_OUT_WINDOWS = 64  # of each rank
SMALL = {"width": 128, "layers": 2, "context": 64}


def learning_rate(step: int, horizon: int) -> float:
    """The part of the highest rate at ``step``: linear warm-up, then a cosine down to ``LAST_PART`` at ``horizon``."""
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    down = 0.5 - 0.5 * math.cos(math.pi * min(1.0, (step - WARMUP_STEPS) / (horizon - WARMUP_STEPS)))
    return 1 - (1 - LAST_PART) * down


def judged_after(step: int, period: int, overlap: int) -> bool:
    """Where what all ranks said in a round has just arrived: seldom at first, often around ``EQUAL_STEPS``."""
    if step == EQUAL_STEPS:
        return True
    said = step - overlap - (EQUAL_STEPS if step > EQUAL_STEPS else 0)  # flushing began periods anew
    return said > 0 and said % max(16 if step >= 256 else 64, period) == 0


def held_out_loss(trainer: Trainer, share: Share) -> float:
    """Mean over the tokens of all ranks, in nats, of the weights that ranks share."""
    inputs, targets = (torch.from_numpy(array[:HELD_OUT_WINDOWS]) for array in share.held_out)
    with trainer.evaluating(), torch.no_grad():
        losses = [
            nn.functional.cross_entropy(trainer.model(x).flatten(0, 1), y.long().flatten()).item()
            for x, y in zip(inputs.split(8), targets.split(8), strict=True)
        ]
    return float(trainer.mean(torch.tensor([sum(losses) / len(losses)], dtype=torch.float64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True, help="AdamW's highest learning rate")
    parser.add_argument("--eps", type=float, required=True, help="AdamW's epsilon")
    parser.add_argument("--beta1", type=float, required=True, help="AdamW's momentum")
    parser.add_argument("--horizon", type=int, required=True, help="step from which the rate is lowest")
    parser.add_argument("--small", action="store_true", help="a model of 0.4 million parameters, half the context")
    options = parser.parse_args()
    model = first_model(**(SMALL if options.small else {}))
    betas = (options.beta1, 0.999)
    inner = torch.optim.AdamW(model.parameters(), options.lr, betas=betas, eps=options.eps, weight_decay=0.01)
    trainer = join(options.way, model, inner)
    rate = torch.optim.lr_scheduler.LambdaLR(inner, lambda step: learning_rate(step, options.horizon))
    # The examples' defaults: the source of Python's library in bytes, 8 windows of 128 per rank and step; of one order.
    flags = parse_flags("", ["--shard", "random", *(["--context", str(SMALL["context"])] if options.small else [])])
    share = load_share(flags, trainer.rank, trainer.ranks)
    curve: dict[int, float] = {}
    began = time.monotonic()
    for step in range(1, options.steps + 1):
        trainer.step(*map(torch.from_numpy, share.batches[step - 1]))
        rate.step()
        if step in (EQUAL_STEPS, options.steps):
            trainer.flush()  # the weights that one would save there: everything learnt is in them
        if step == options.steps or judged_after(step, trainer.period, trainer.overlap):
            curve[step] = held_out_loss(trainer, share)
            if trainer.rank == 0:
                print(
                    f"{options.way}: {curve[step]:.4f} after {step} steps, {time.monotonic() - began:.0f} s", flush=True
                )
    leave_result(trainer.rank, facts={str(step): loss for step, loss in curve.items()})


if __name__ == "__main__":
    main()
