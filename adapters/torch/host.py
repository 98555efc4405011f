"""Tensors on GPUs on their way through the host's memory, where Horovod does not take them as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hvdscale.runtime.gpu import agree_on_way, look
from hvdscale.runtime.settings import Setting
from hvdscale.runtime.transport import Transport

__all__ = ["in_memory", "in_reach", "settle_way", "to_device", "travels_by_host"]

_direct = False  # until init() has seen the ranks


def settle_way(horovod: Any, transport: Transport) -> tuple[Setting, ...]:
    """Decide how tensors on GPUs travel, alike on every rank; a torch without GPUs has no such setting. Collective.

    Raises:
        WorldError: the user asks for what this Horovod cannot do.
    """
    global _direct
    built, nccl = bool(horovod.cuda_built() or horovod.rocm_built()), bool(horovod.nccl_built())
    way = agree_on_way(look(torch.cuda.device_count(), built, nccl), transport)
    _direct = way.value == "direct"
    return (way,) if torch.version.cuda or torch.version.hip else ()


def travels_by_host(tensor: Tensor) -> bool:
    """Whether this tensor's way to other ranks is through the host's memory."""
    return tensor.device.type not in ("cpu", "meta") and not (tensor.is_cuda and _direct)


def in_reach(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor where Horovod can take it: itself, or a copy in page-locked host memory. Differentiable.

    The copies are made side by side and waited for once.
    """
    copies = [_start_copy(tensor) if travels_by_host(tensor) else tensor for tensor in tensors]
    for device in {t.device for t in tensors if t.is_cuda and travels_by_host(t)}:
        torch.cuda.current_stream(device).synchronize()
    return copies


def _start_copy(tensor: Tensor) -> Tensor:
    if not tensor.is_cuda or (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor.to("cpu")
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return copy.copy_(tensor.detach(), non_blocking=True)


def in_memory(tensor: Tensor) -> Tensor:
    """The values in the host's memory, contiguous, for NumPy; no copy where they are there already. No gradient."""
    tensor = tensor.detach()
    return (tensor if tensor.device.type == "cpu" else tensor.to("cpu")).contiguous()


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Back from the host. Differentiable; later work of the current stream sees the values."""
    return tensor if tensor.device == device else tensor.to(device, non_blocking=tensor.is_pinned())
