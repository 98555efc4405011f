"""One rank of the bench of relaxed synchronisation: mean seconds of a step, rounds included, and the bytes it sent."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from ci.bench.relaxed_plans import INDEPENDENT, POST_LOCAL
from ci.bench.workers.ranks import digest, leave_result, mean_seconds, meet
from ci.bench.workers.relaxed_ways import Trainer, first_model, join
from ci.bench.workers.torch_step import random_batch
from ci.rig import Traffic

WARMUP_STEPS = 2


def figures(trainer: Trainer) -> np.ndarray:
    """Bytes sent and seconds waited so far."""
    metrics = trainer.metrics()
    return np.array([metrics.get("bytes_sent", 0.0), metrics.get("seconds", 0.0)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--way", required=True)
    parser.add_argument("--steps", type=int, required=True, help="whole periods, so that rounds count in full")
    options = parser.parse_args()
    model = first_model()
    trainer = join(options.way, model, torch.optim.AdamW(model.parameters(), 3e-4))
    tokens = random_batch(trainer.rank)

    def step() -> float:
        return trainer.step(tokens[:, :-1], tokens[:, 1:])

    for _ in range(WARMUP_STEPS):
        step()
    trainer.flush()  # a round of everything: connections are open and memory is there
    before, counted = Traffic.sent_here(), figures(trainer)
    first_steps = trainer.period if trainer.overlap else 0
    for _ in range(first_steps):
        step()  # what is on its way at the end is on its way at the beginning, too
    meet(trainer.rank, trainer.ranks)
    seconds = mean_seconds(step, options.steps)
    if trainer.overlap:
        with trainer.evaluating():
            pass  # waits for what is on its way, and sends nothing
    timed_part = options.steps / (first_steps + options.steps)
    counts = figures(trainer) - counted
    sent = Traffic.sent_here().since(before)  # nothing on a machine that is no host of the rig
    facts = {
        "wire_bytes": sent.total_bytes * timed_part,
        "data_bytes": sent.data_bytes * timed_part,
        "counted_bytes": counts[0] * timed_part,
        "waited_seconds": counts[1] * timed_part,
    }
    trainer.flush()  # so that ranks can be compared
    kept_in_step = options.way not in (INDEPENDENT, POST_LOCAL)
    weights = digest(p.detach().numpy() for p in model.parameters()) if kept_in_step else None
    leave_result(trainer.rank, weights, facts, step=seconds)


if __name__ == "__main__":
    main()
