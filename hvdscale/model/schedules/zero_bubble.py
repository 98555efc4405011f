"""The backward pass in two, the second half where a rank would wait (Qi et al., "Zero Bubble", arXiv 2401.10241).

    rank 0: F0 F1 F2 .  .  I0 W0 F3 I1 W1 ...
    rank 1: .  F0 F1 .  I0 F2 I1 W0 F3 I2 W1 ...
    rank 2: .  .  F0 I0 F1 I1 F2 I2 W0 ...

This is ZB-H1. Only the gradients of inputs are on the way back to the first rank; those of weights can wait. Rank
``r`` computes them ``r`` micro-batches late, so every rank holds the activations of as many micro-batches as the first
one does in 1F1B.
"""

from __future__ import annotations

from hvdscale.model.actions import Action, Schedule

__all__ = ["zero_bubble"]


def zero_bubble(ranks: int, microbatches: int) -> Schedule:
    """One stage on each rank."""
    rows = []
    for rank in range(ranks):
        ahead = min(ranks - 1 - rank, microbatches)
        row = [Action("F", rank, m) for m in range(ahead)]
        for m in range(microbatches):
            if ahead + m < microbatches:
                row.append(Action("F", rank, ahead + m))
            row.append(Action("I", rank, m))
            if m >= rank:
                row.append(Action("W", rank, m - rank))
        row += [Action("W", rank, m) for m in range(max(0, microbatches - rank), microbatches)]
        rows.append(tuple(row))
    return Schedule("zb", ranks, ranks, microbatches, tuple(rows))
