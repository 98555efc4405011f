"""Dividing a batch into micro-batches, and what the ranks of a pipeline tell each other about it before each step."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from itertools import pairwise

from hvdscale.errors import DesyncError, PlanError
from hvdscale.runtime.transport import Transport

__all__ = ["Claim", "agree_on_batch", "cut"]


def cut(samples: int, microbatches: int) -> list[slice]:
    """Contiguous pieces as equal as can be; the first ones are larger by one where they are not equal.

    Fewer samples than micro-batches: one each, and fewer pieces.

    Raises:
        PlanError: no sample.
    """
    if samples < 1:
        raise PlanError("A training step needs at least one sample; the batch has none.")
    pieces = min(samples, microbatches)
    base, more = divmod(samples, pieces)
    bounds = [0]
    for piece in range(pieces):
        bounds.append(bounds[-1] + base + (piece < more))
    return [slice(a, b) for a, b in pairwise(bounds)]


@dataclass(frozen=True)
class Claim:
    """What one rank brings to a step.

    Args:
        does: what it is about to do, such as ``"train"``.
        x: shapes and dtypes of its input, as text; empty where it has none.
        y: likewise of its target.
        samples: how many; 0 where it has none.
        error: what is wrong with its arguments; empty if nothing.
    """

    does: str
    x: str = ""
    y: str = ""
    samples: int = 0
    error: str = ""


def agree_on_batch(transport: Transport, mine: Claim, targets: bool) -> Claim:
    """The step as all ranks of the pipeline see it: one small all-gather.

    The first rank must have the input and the last one the target, if ``targets``; the others may have either.

    Raises:
        PlanError: an error of any rank, or something is missing; on every rank with the same text.
        DesyncError: two ranks are about to do different things, or bring different batches.
    """
    encoded = json.dumps(asdict(mine)).encode()
    claims = [Claim(**json.loads(data)) for data in transport.allgather(encoded)] if transport.size > 1 else [mine]
    ranks = transport.ranks
    for rank, claim in zip(ranks, claims, strict=True):
        if claim.error:
            raise PlanError(claim.error if len(claims) == 1 else f"rank {rank}: {claim.error}")
    agreed = {}
    for what in ("does", "x", "y", "samples"):
        values = {getattr(claim, what): rank for rank, claim in zip(ranks, claims, strict=True) if getattr(claim, what)}
        if len(values) > 1:
            (a, rank_a), (b, rank_b), *_ = values.items()
            raise DesyncError(
                f"All ranks of a pipeline take the same step; for {what!r} rank {rank_a} has {a} and rank {rank_b} "
                f"{b}. "
                "Give all of them the same batch; they may leave out what their stage does not read."
            )
        agreed[what] = next(iter(values), mine.samples if what == "samples" else "")
    if not claims[0].x:
        raise PlanError(f"The first stage reads the input; rank {ranks[0]}, which has it, was given none.")
    if targets and not claims[-1].y:
        raise PlanError(f"The last stage reads the target; rank {ranks[-1]}, which has it, was given none.")
    return Claim(str(agreed["does"]), str(agreed["x"]), str(agreed["y"]), int(agreed["samples"]))
