"""What a tensor looks like while it travels: Horovod moves few dtypes, only contiguous ones, and where it can reach."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hvdscale.torch.host import in_reach, to_device

__all__ = ["all_reducible", "from_wire", "movable", "reducible", "summed_as"]

# Sums need a dtype that can add: bfloat16 sums in float32, small integers in int32.
_REDUCE_AS = {
    torch.bfloat16: torch.float32,
    torch.bool: torch.int32,
    torch.uint8: torch.int32,
    torch.int8: torch.int32,
    torch.int16: torch.int32,
}
# Gathers and broadcasts only copy: the same bytes under a name Horovod knows.
_MOVE_AS = {torch.bfloat16: torch.int16, torch.bool: torch.uint8}


def summed_as(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers of ``dtype`` are added."""
    return _REDUCE_AS.get(dtype, dtype)


def reducible(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous, in reach and in a dtype Horovod adds; itself when it already is. Differentiable.

    bfloat16 becomes float32; bool, uint8, int8 and int16 become int32.
    """
    return all_reducible([tensor])[0]


def all_reducible(tensors: Sequence[Tensor]) -> list[Tensor]:
    """``reducible`` of several at once."""
    return in_reach([tensor.to(summed_as(tensor.dtype)).contiguous() for tensor in tensors])


def movable(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous, in reach and in a dtype Horovod copies; itself when it already is.

    bfloat16 and bool keep their bytes. A bfloat16 tensor that needs a gradient becomes float32, which
    is exact too and differentiable.
    """
    target = _MOVE_AS.get(tensor.dtype)
    if target is None:
        plain = tensor.contiguous()
    elif tensor.requires_grad and torch.is_grad_enabled():
        plain = tensor.to(torch.float32).contiguous()
    else:
        plain = tensor.contiguous().view(target)
    return in_reach([plain])[0]


def from_wire(tensor: Tensor, like: Tensor) -> Tensor:
    """Undo ``reducible`` or ``movable``: dtype and device of ``like``. A bool is true where the number is not zero."""
    tensor, dtype = to_device(tensor, like.device), like.dtype
    if tensor.dtype == _MOVE_AS.get(dtype):
        return tensor.view(dtype)
    return tensor.to(dtype)
