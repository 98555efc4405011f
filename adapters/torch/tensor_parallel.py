"""The exchanges of tensor parallel layers, each with its gradient: Shoeybi et al., arXiv 1909.08053, section 3.

All ranks of a team compute the same loss. Where a whole activation enters a split layer the gradients of its parts are
added up (``enter``, Megatron's f); where parts leave, they are (``leave``, Megatron's g).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from hvdscale.runtime.team import Team

__all__ = ["enter", "exchanged", "join", "keep_from_compilers", "leave", "part_of", "sum_over", "team_dropout"]

Sizes = Sequence[int]
_WIDE = {torch.float32: torch.float32, torch.float64: torch.float64}  # others are added in float32


def _exchange(kind: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    result: Tensor = kind.apply(*arguments)
    return result


_run = _exchange


def keep_from_compilers() -> None:
    """Messages are no part of a compiled graph. Called before the first exchange: it imports the compiler."""
    global _run
    if _run is _exchange:
        _run = torch.compiler.disable(_exchange)


def sum_over(tensor: Tensor, team: Team) -> Tensor:
    """The sum over the team, in the dtype of ``tensor``; the same bits on every rank. No gradient."""
    return exchanged(tensor, team.add)


def exchanged(tensor: Tensor, exchange: Callable[[np.ndarray], np.ndarray]) -> Tensor:
    """What ``exchange`` makes of the values of ``tensor``, in its dtype and on its device."""
    tensor = tensor.detach()
    wide = tensor.to("cpu", _WIDE.get(tensor.dtype, torch.float32)).contiguous()
    return torch.from_numpy(exchange(wide.numpy())).to(tensor.device, tensor.dtype)


def _together(tensor: Tensor, team: Team, dim: int, sizes: Sizes) -> Tensor:
    """Everyone's part, joined along ``dim``."""
    tensor = tensor.detach()
    shapes = [(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]) for size in sizes]
    plain = tensor.to("cpu").contiguous()
    halves = plain.view(torch.int16) if plain.element_size() == 2 else plain  # NumPy knows no bfloat16
    parts = [torch.from_numpy(part).view(plain.dtype) for part in team.collect(halves.numpy(), shapes)]
    return torch.cat(parts, dim).to(tensor.device)


def _own(tensor: Tensor, team: Team, dim: int, sizes: Sizes) -> Tensor:
    return tensor.narrow(dim, sum(sizes[: team.rank]), sizes[team.rank]).contiguous()


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradient, ctx.team), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        return sum_over(x, team)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team, dim: int, sizes: Sizes) -> Tensor:
        ctx.where = team, dim, sizes
        return _together(x, team, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _own(gradient, *ctx.where), None, None, None


class _PartOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team, dim: int, sizes: Sizes) -> Tensor:
        ctx.where = team, dim, sizes
        return _own(x, team, dim, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _together(gradient, *ctx.where), None, None, None


def enter(x: Tensor, team: Team) -> Tensor:
    """A whole activation into a split layer: as it is; its gradients are added over the team."""
    return _run(_Enter, x, team) if team.size > 1 else x


def leave(x: Tensor, team: Team) -> Tensor:
    """Partial sums out of a split layer: added over the team; the gradient is everyone's own."""
    return _run(_Leave, x, team) if team.size > 1 else x


def join(x: Tensor, team: Team, dim: int, sizes: Sizes) -> Tensor:
    """Parts of ``sizes`` along ``dim`` as one whole; the gradient is that of the own part."""
    return _run(_Join, x, team, dim % x.dim(), sizes) if team.size > 1 else x


def part_of(x: Tensor, team: Team, dim: int, sizes: Sizes) -> Tensor:
    """The own part along ``dim`` of a whole activation; the gradients of the parts are put together."""
    return _run(_PartOf, x, team, dim % x.dim(), sizes) if team.size > 1 else x


def team_dropout(x: Tensor, p: float, team: Team, dim: int, sizes: Sizes) -> Tensor:
    """Dropout of this rank's part of a whole: each draws the mask of all of it, and takes its own part.

    So the mask is that of one process, and the ranks' generators stay in step.
    """
    dim %= x.dim()
    whole = (*x.shape[:dim], sum(sizes), *x.shape[dim + 1 :])
    mask = F.dropout(torch.ones(whole, dtype=x.dtype, device=x.device), p)
    return x * _own(mask, team, dim, sizes)
