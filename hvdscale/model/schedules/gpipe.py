"""All forward passes, then all backward passes (Huang et al., "GPipe", arXiv 1811.06965).

    rank 0: F0 F1 F2 .  .  .  .  B0 B1 B2
    rank 1: .  F0 F1 F2 .  .  B0 B1 B2
    rank 2: .  .  F0 F1 F2 B0 B1 B2

Backward passes go in the order of the micro-batches, as in a process that accumulates gradients alone. A rank holds the
activations of all micro-batches.
"""

from __future__ import annotations

from hvdscale.model.actions import Action, Schedule

__all__ = ["gpipe"]


def gpipe(ranks: int, microbatches: int, chunks: int = 1) -> Schedule:
    """``chunks`` stages on each rank."""
    stages = ranks * chunks
    rows = []
    for rank in range(ranks):
        own = range(rank, stages, ranks)
        forward = [Action("F", stage, m) for stage in own for m in range(microbatches)]
        backward = [Action("B", stage, m) for stage in reversed(own) for m in range(microbatches)]
        rows.append((*forward, *backward))
    return Schedule("gpipe", ranks, stages, microbatches, tuple(rows))
