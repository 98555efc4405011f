"""Dividing a batch into micro-batches, and what the ranks of a pipeline tell each other about it before each step."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from hvdscale.errors import DesyncError, PlanError
from hvdscale.model.nests import Nests
from hvdscale.runtime.transport import Transport

__all__ = ["Batch", "Claim", "agree_on_batch", "claim_of", "cut", "shares_of"]


@dataclass(frozen=True)
class Batch:
    """One step's data as this rank has it.

    Args:
        x: the input of each micro-batch; empty where another rank has the first stage.
        y: the target of each; empty where another rank has the last stage.
        shares: the part of the whole mean that each micro-batch is; they add up to 1.
        trains: whether layers draw random numbers and gradients are wanted.
        seed: of the step.
        scale: the loss is multiplied by it before the backward pass.
        check: whether the loss has to be seen to be a mean.
    """

    x: Sequence[Any]
    y: Sequence[Any]
    shares: Sequence[float]
    trains: bool
    seed: tuple[int, ...]
    scale: float = 1.0
    check: bool = False


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
        x_digest: of the values of its input, where another rank reads the same; empty where none does.
        y_digest: likewise of its target.
    """

    does: str
    x: str = ""
    y: str = ""
    samples: int = 0
    error: str = ""
    x_digest: str = ""
    y_digest: str = ""


_SAID = {"x_digest": "the values of x", "y_digest": "the values of y"}


def agree_on_batch(transport: Transport, mine: Claim, targets: bool, abreast: int = 1) -> Claim:
    """The step as all ranks of the pipeline see it: one small all-gather.

    The first ``abreast`` ranks must have the input and the last ones the target, if ``targets``; the others may have
    either.

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
    for what in ("does", "x", "y", "samples", "x_digest", "y_digest"):
        values = {getattr(claim, what): rank for rank, claim in zip(ranks, claims, strict=True) if getattr(claim, what)}
        if len(values) > 1:
            (a, rank_a), (b, rank_b), *_ = values.items()
            raise DesyncError(
                f"All ranks of a pipeline take the same step; for {_SAID.get(what, what)!r} rank {rank_a} has {a} and "
                f"rank {rank_b} {b}. "
                "Give all of them the same batch; they may leave out what their stage does not read."
            )
        agreed[what] = next(iter(values), mine.samples if what == "samples" else "")
    for rank, claim in zip(ranks[:abreast], claims[:abreast], strict=True):
        if not claim.x:
            raise PlanError(f"The first stage reads the input; rank {rank}, which has it, was given none.")
    for rank, claim in zip(ranks[-abreast:], claims[-abreast:], strict=True):
        if targets and not claim.y:
            raise PlanError(f"The last stage reads the target; rank {rank}, which has it, was given none.")
    return Claim(str(agreed["does"]), str(agreed["x"]), str(agreed["y"]), int(agreed["samples"]))


def claim_of(does: str, x: Any, y: Any, scale: float, nests: Nests[Any]) -> Claim:
    """What a rank with this batch brings; ``None`` is what it was not given."""
    samples = {name: nests.rows(value) for name, value in (("x", x), ("y", y)) if value is not None}
    error = ""
    for name, count in samples.items():
        if count < 0:
            error = (
                f"the tensors of {name} have one first dimension, the samples; they are "
                f"{nests.text(x if name == 'x' else y)}."
            )
    if not error and len(set(samples.values())) > 1:
        error = f"x and y have as many samples; they have {samples['x']} and {samples['y']}."
    return Claim(
        does if scale == 1.0 else f"{does} with loss_scale={scale:g}",
        "" if x is None else nests.text(x),
        "" if y is None else nests.text(y),
        max(samples.values(), default=0),
        error,
    )


def shares_of(ys: Sequence[Any], count: Callable[[Any], Any]) -> list[float]:
    """The part of the whole mean that each micro-batch is, where ``count(y)`` says of how many terms its own is."""
    counts = [float(count(y)) for y in ys]
    total = sum(counts)
    return [c / total if total else 1 / len(counts) for c in counts]
