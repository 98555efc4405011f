"""What a tensor looks like while it travels: Horovod moves few dtypes, and only contiguous ones."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["from_wire", "movable", "reducible"]

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


def reducible(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous and in a dtype Horovod adds; itself when it already is. Differentiable.

    bfloat16 becomes float32; bool, uint8, int8 and int16 become int32.
    """
    return tensor.to(_REDUCE_AS.get(tensor.dtype, tensor.dtype)).contiguous()


def movable(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous and in a dtype Horovod copies; itself when it already is.

    bfloat16 and bool keep their bytes. A bfloat16 tensor that needs a gradient becomes float32, which
    is exact too and differentiable.
    """
    target = _MOVE_AS.get(tensor.dtype)
    if target is None:
        return tensor.contiguous()
    if tensor.requires_grad and torch.is_grad_enabled():
        return tensor.to(torch.float32).contiguous()
    return tensor.contiguous().view(target)


def from_wire(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Undo ``reducible`` or ``movable``: back to ``dtype``. A bool is true where the number is not zero."""
    if tensor.dtype == _MOVE_AS.get(dtype):
        return tensor.view(dtype)
    return tensor.to(dtype)
