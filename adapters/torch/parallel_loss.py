"""Cross-entropy of logits whose vocabulary is split over a team: only three numbers a token travel.

Shoeybi et al., arXiv 1909.08053, section 3: "communicating scalar losses instead of logits".
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hvdscale.errors import PlanError
from hvdscale.model.layout import Split
from hvdscale.model.mesh import Mesh
from hvdscale.runtime.team import Team
from hvdscale.torch.teams import tensor_team
from hvdscale.torch.tensor_parallel import exchanged, sum_over

__all__ = ["parallel_cross_entropy"]


def parallel_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    vocabulary: int,
    mesh: Mesh,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> Tensor:
    """``F.cross_entropy`` of logits of which each tensor rank holds a part, in nats. Collective over the team.

    Args:
        logits: ``float[..., part of vocabulary]``, as a ``"vocab"`` linear layer gives them.
        targets: ``int[...]``, the same on every rank of the team.
        vocabulary: how many classes there are in all.
        mesh: whose tensor ranks share them.
        ignore_index: targets that count for nothing.
        reduction: ``"mean"`` over targets that count, ``"sum"``, or ``"none"``.

    Returns:
        float32 (float64 of such logits): a number, or ``[...]``; the same on every rank of the team.

    Raises:
        PlanError: logits that are no part of ``vocabulary``, a target that is no class, another ``reduction``.
    """
    team = tensor_team(mesh)
    ((start, stop),) = Split(0).spans(vocabulary, team.size, team.rank)
    if logits.shape != (*targets.shape, stop - start):
        raise PlanError(
            f"logits are this rank's part of {vocabulary} classes, {[*targets.shape, stop - start]}; they have shape "
            f"{list(logits.shape)}. A linear layer gives a part where its rule is 'vocab'."
        )
    if reduction not in ("mean", "sum", "none"):
        raise PlanError(f"reduction is 'mean', 'sum' or 'none'; it is {reduction!r}.")
    counted = targets != ignore_index
    wrong = counted & ((targets < 0) | (targets >= vocabulary))
    if wrong.any():
        raise PlanError(f"targets are classes 0 to {vocabulary - 1}; {int(targets[wrong][0])} is among them.")
    losses = _Losses.apply(logits, targets, counted, start, team)
    if reduction == "none":
        return losses
    return losses.sum() / counted.sum() if reduction == "mean" else losses.sum()


class _Losses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, counted: Tensor, start: int, team: Team) -> Tensor:
        ctx.dtype = logits.dtype
        wide = logits.detach().to(torch.promote_types(logits.dtype, torch.float32))
        most = exchanged(wide.amax(-1), team.largest) if team.size > 1 else wide.amax(-1)
        shifted = wide - most.unsqueeze(-1)
        local = targets - start
        here = counted & (local >= 0) & (local < logits.shape[-1])
        column = local.masked_fill(~here, 0).unsqueeze(-1)
        picked = shifted.gather(-1, column).squeeze(-1).masked_fill(~here, 0)
        exponentials = shifted.exp()
        sums = torch.stack([exponentials.sum(-1), picked])  # [2, ...]
        total, target_logit = sum_over(sums, team) if team.size > 1 else sums
        probabilities = exponentials / total.unsqueeze(-1)
        ctx.save_for_backward(probabilities, column, here, counted)
        return (total.log() - target_logit).masked_fill(~counted, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities, column, here, counted = ctx.saved_tensors
        result = probabilities.scatter_add(-1, column, -here.unsqueeze(-1).to(probabilities.dtype))
        result = result * gradient.masked_fill(~counted, 0).unsqueeze(-1)
        return result.to(ctx.dtype), None, None, None, None
