"""Copies between ranks (all-gather, broadcast, all-to-all) for tensors of any layout and dtype: the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as _horovod
from horovod.torch import ProcessSet, global_process_set
from torch import Tensor

from hvdscale.torch.handles import Handle, overwriting, returning, synchronize, then, with_plain_gradient
from hvdscale.torch.wire import from_wire, movable

__all__ = [
    "allgather",
    "allgather_async",
    "alltoall",
    "alltoall_async",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allgather",
    "grouped_allgather_async",
]


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Handle:
    """Start ``allgather``."""
    sent = movable(tensor.detach())
    return returning(_horovod.allgather_async(sent, name, process_set), [tensor], [sent])


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """The tensors of all ranks joined along the first axis, which may differ in length. Differentiable."""
    output = _horovod.allgather(movable(tensor), name, process_set)
    return from_wire(with_plain_gradient(output), tensor)


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``grouped_allgather``."""
    sent = [movable(t.detach()) for t in tensors]
    return returning(_horovod.grouped_allgather_async(sent, name, process_set), tensors, sent, group=True)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """``allgather`` of several tensors that complete together. Differentiable."""
    outputs = _horovod.grouped_allgather([movable(t) for t in tensors], name, process_set)
    return [from_wire(with_plain_gradient(o), t) for o, t in zip(outputs, tensors, strict=True)]


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``broadcast``."""
    sent = movable(tensor.detach())
    return returning(_horovod.broadcast_async(sent, root_rank, name, process_set), [tensor], [sent])


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """The tensor of rank ``root_rank`` (a global rank), as a new tensor. Differentiable."""
    output = _horovod.broadcast(movable(tensor), root_rank, name, process_set)
    return from_wire(with_plain_gradient(output), tensor)


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``broadcast_``."""
    sent = movable(tensor.detach())
    return overwriting(_horovod.broadcast_async_(sent, root_rank, name, process_set), [tensor])


def broadcast_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """``broadcast`` that overwrites ``tensor`` and returns it."""
    return synchronize(broadcast_async_(tensor, root_rank, name, process_set))


def alltoall_async(
    tensor: Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start ``alltoall``; the result is always ``(tensor, received splits)``, as in Horovod."""
    sent = movable(tensor.detach())
    handle = _horovod.alltoall_async(sent, _counts(splits), name, process_set)
    if (sent.dtype, sent.device) == (tensor.dtype, tensor.device):
        return handle
    like = tensor.new_empty(0)
    return then(handle, lambda output: (from_wire(output[0], like), output[1]))


def alltoall(
    tensor: Tensor,
    splits: Any = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Tensor | tuple[Tensor, Tensor]:
    """Send slices of ``tensor`` to all ranks and join what they send. Differentiable.

    Args:
        tensor: sliced along the first axis.
        splits: rows for each rank, in rank order; equal shares when left out.

    Returns:
        The joined tensor, and with ``splits`` also how many rows came from each rank.
    """
    output = _horovod.alltoall(movable(tensor), _counts(splits), name, process_set)
    if splits is None:
        return from_wire(with_plain_gradient(output), tensor)
    return from_wire(with_plain_gradient(output[0]), tensor), output[1]


def _counts(splits: Any) -> Any:
    return movable(splits) if isinstance(splits, Tensor) else splits
