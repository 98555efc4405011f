"""Nested values of tensors, as stages give them to each other."""

from __future__ import annotations

import torch
from torch import Tensor

from hvdscale.model.nests import Nests, Plain

__all__ = ["NESTS"]

NESTS: Nests[Tensor] = Nests(
    Tensor,
    lambda tensor: str(tensor.dtype).removeprefix("torch."),
    {
        "s": Plain(torch.Size, list, torch.Size),
        "d": Plain(torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), lambda name: getattr(torch, name)),
    },
)
