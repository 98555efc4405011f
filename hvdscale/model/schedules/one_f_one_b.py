"""One forward, one backward (Narayanan et al., "PipeDream", arXiv 1806.03377; with a flush: arXiv 2006.09503).

    rank 0: F0 F1 F2 .  .  B0 F3 .  B1 ...
    rank 1: .  F0 F1 .  B0 F2 B1 ...
    rank 2: .  .  F0 B0 F1 B1 ...

As fast as GPipe, but rank ``r`` of ``p`` holds the activations of at most ``p - r`` micro-batches.
"""

from __future__ import annotations

from hvdscale.model.actions import Action, Schedule

__all__ = ["one_f_one_b"]


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """One stage on each rank."""
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, microbatches)
        row = [Action("F", rank, m) for m in range(ahead)]
        for m in range(microbatches - ahead):
            row += [Action("F", rank, ahead + m), Action("B", rank, m)]
        row += [Action("B", rank, m) for m in range(microbatches - ahead, microbatches)]
        rows.append(tuple(row))
    return Schedule("1f1b", ranks, ranks, microbatches, tuple(rows))
