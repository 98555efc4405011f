"""Several stages on each rank, taken in turns (Narayanan et al., "Megatron-LM", section 2.2, arXiv 2104.04473).

With ``v`` stages on each of ``p`` ranks the pipeline fills and drains ``v`` times faster than in 1F1B:

    rank 0: F0@0 F1@0 F0@2 F1@2 F2@0 ...
    rank 1:      F0@1 F1@1 F0@3 B0@3 ...

Micro-batches pass a rank's stages in groups. Where they do not divide into groups of ``p``, some are larger: behind a
smaller one, ranks would wait for each other.
"""

from __future__ import annotations

from itertools import pairwise

from hvdscale.model.actions import Action, Schedule

__all__ = ["interleaved"]


def interleaved(ranks: int, microbatches: int, chunks: int = 2) -> Schedule:
    """``chunks`` stages on each rank."""
    total = chunks * microbatches
    groups = _groups(ranks, microbatches)
    rows = []
    for rank in range(ranks):
        own = [rank + chunk * ranks for chunk in range(chunks)]
        forward = [Action("F", stage, m) for group in groups for stage in own for m in group]
        backward = [Action("B", stage, m) for group in groups for stage in reversed(own) for m in group]
        ahead = min(total, 2 * (ranks - rank - 1) + (chunks - 1) * max(map(len, groups)))
        row = forward[:ahead]
        for f, b in zip(forward[ahead:], backward, strict=False):
            row += [f, b]
        rows.append((*row, *backward[total - ahead :]))
    return Schedule("interleaved", ranks, ranks * chunks, microbatches, tuple(rows))


def _groups(ranks: int, microbatches: int) -> list[range]:
    """Micro-batches in groups of at least ``ranks`` (all of them, where there are fewer), as equal as can be."""
    count = max(1, microbatches // ranks)
    bounds = [microbatches * g // count for g in range(count + 1)]
    return [range(a, b) for a, b in pairwise(bounds)]
