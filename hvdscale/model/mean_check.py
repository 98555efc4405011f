"""Whether a loss is a mean over samples, so that those of micro-batches add up to that of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from hvdscale.model.nests import Nests

__all__ = ["mean_error"]

T = TypeVar("T")

_TOLERANCE = {"float64": 1e-6, "float32": 1e-3}  # others: 2e-2


def mean_error(
    loss: Callable[[Any, Any], Any],
    count: Callable[[Any], Any],
    output: Any,
    target: Any,
    nests: Nests[T],
    twofold: Callable[[T], T],
) -> str:
    """What is wrong with the loss, tried on one micro-batch: twice the same samples must give the same mean.

    Empty where nothing is, or where it cannot be told (outputs without a dimension of samples, values not finite).

    Args:
        twofold: a tensor twice, one behind the other.
    """
    samples = nests.rows(target)
    if samples < 1 or nests.rows(output) != samples:
        return ""
    once = loss(output, target)
    if not _is_number(once, nests):
        return f"loss returns one number, the mean over samples; it returned {_shown(once, nests)}. Use a mean."
    near = _TOLERANCE.get(nests.dtype(once), 2e-2)
    twice = loss(nests.map(twofold, output), nests.map(twofold, target))
    if not _equal(float(twice), float(once), near):
        return (
            "loss must be a mean over samples, so that those of micro-batches add up; for the same samples twice it "
            f"gave {float(twice):.6g} in place of {float(once):.6g}. Use a mean (reduction='mean')."
        )
    if samples > 1:
        halves = [slice(0, samples // 2), slice(samples // 2, None)]
        pieces = [(nests.select(output, half), nests.select(target, half)) for half in halves]
        counts = [float(count(piece[1])) for piece in pieces]
        if sum(counts) <= 0:
            return ""
        mean = sum(float(loss(*p)) * c for p, c in zip(pieces, counts, strict=True) if c) / sum(counts)
        if not _equal(mean, float(once), near):
            return (
                f"the loss of a micro-batch must be the mean of its halves; it is {float(once):.6g}, and they give "
                f"{mean:.6g} with weights {counts[0]:g} and {counts[1]:g}. Where it is a mean over fewer terms than "
                "samples (ignored or padded positions), say how many: count=lambda y: (y != ignored).sum()."
            )
    return ""


def _is_number(value: Any, nests: Nests[Any]) -> bool:
    return isinstance(value, nests.tensor) and all(length == 1 for length in value.shape)


def _equal(a: float, b: float, near: float) -> bool:
    if a != a or b != b or abs(a) == float("inf") or abs(b) == float("inf"):
        return True  # not finite: nothing can be said
    return abs(a - b) <= near * max(abs(a), abs(b), 1e-6)


def _shown(value: Any, nests: Nests[Any]) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, nests.tensor) else f"a {type(value).__name__}"
