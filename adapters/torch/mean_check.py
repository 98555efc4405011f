"""Whether a loss is a mean over samples, so that those of micro-batches add up to that of the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvdscale.torch.bundles import map_tensors, select

__all__ = ["mean_error", "rows"]

_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}  # others: 2e-2


def rows(value: Any) -> int:
    """The first dimension of the tensors in ``value``; 0 where there is none, -1 where they differ."""
    sizes: set[int] = set()
    map_tensors(lambda t: sizes.add(t.shape[0] if t.ndim else -1), value)
    return sizes.pop() if len(sizes) == 1 else -1 if sizes else 0


@torch.no_grad()
def mean_error(loss: Callable[[Any, Any], Any], count: Callable[[Any], float], output: Any, target: Any) -> str:
    """What is wrong with the loss, tried on one micro-batch: twice the same samples must give the same mean.

    Empty where nothing is, or where it cannot be told (outputs without a dimension of samples, values not finite).
    """
    samples = rows(target)
    if samples < 1 or rows(output) != samples:
        return ""
    output = map_tensors(lambda t: t.detach(), output)
    once = loss(output, target)
    if not isinstance(once, Tensor) or once.numel() != 1:
        return f"loss returns one number, the mean over samples; it returned {_shown(once)}. Use reduction='mean'."
    near = _TOLERANCE.get(once.dtype, 2e-2)
    twice = loss(*(map_tensors(lambda t: torch.cat([t, t]), value) for value in (output, target)))
    if not _equal(float(twice), float(once), near):
        return (
            "loss must be a mean over samples, so that those of micro-batches add up; for the same samples twice it "
            f"gave {float(twice):.6g} in place of {float(once):.6g}. Use reduction='mean'."
        )
    if samples > 1:
        halves = [slice(0, samples // 2), slice(samples // 2, None)]
        pieces = [(select(output, half), select(target, half)) for half in halves]
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


def _equal(a: float, b: float, near: float) -> bool:
    if a != a or b != b or abs(a) == float("inf") or abs(b) == float("inf"):
        return True  # not finite: nothing can be said
    return abs(a - b) <= near * max(abs(a), abs(b), 1e-6)


def _shown(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
