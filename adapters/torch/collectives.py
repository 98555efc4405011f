"""Horovod's collectives for tensors of any layout, and for the dtypes it lacks.

bfloat16 is added in float32, bool and small integers in int32 (results come back in the dtype they were
sent in, wrapping as torch does; a bool is true where the number is not zero). Gathers and broadcasts move the
same bytes. Everything Horovod handles itself is passed straight on, and its handles stay its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as _horovod
import torch
from horovod.torch import Average, Compression, ProcessSet, global_process_set
from torch import Tensor

from hvdscale.torch.wire import from_wire, movable, reducible

__all__ = [
    "allgather",
    "allgather_async",
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "alltoall",
    "alltoall_async",
    "broadcast",
    "broadcast_",
    "broadcast_async",
    "broadcast_async_",
    "grouped_allgather",
    "grouped_allgather_async",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "poll",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
    "synchronize",
]

Handle = Any  # Horovod's int; a function for sparse_allreduce_async

# What is left to do with an operation's output, by Horovod's handle.
_unfinished: dict[int, Callable[[Any], Any]] = {}


def synchronize(handle: Handle) -> Any:
    """Wait for an asynchronous operation and return its result: a tensor, or a tuple of them for a group."""
    if callable(handle):
        return handle()
    try:
        output = _horovod.synchronize(handle)
    finally:
        finish = _unfinished.pop(handle, None)
    return output if finish is None else finish(output)


def poll(handle: Handle) -> bool:
    """Whether ``synchronize(handle)`` would return at once."""
    return True if callable(handle) else _horovod.poll(handle)


def allreduce_async(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start an all-reduce into a new tensor. See ``allreduce``."""
    sent = reducible(tensor.detach())
    handle = _horovod.allreduce_async(sent, average, name, op, prescale_factor, postscale_factor, process_set)
    return _returning(handle, [tensor], [sent])


def allreduce_async_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start an all-reduce that overwrites ``tensor``. See ``allreduce``."""
    sent = reducible(tensor.detach())
    handle = _horovod.allreduce_async_(sent, average, name, op, prescale_factor, postscale_factor, process_set)
    return _overwriting(handle, [tensor])


def allreduce(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """Average (default), add, or otherwise combine ``tensor`` over ranks; shape and dtype stay. Differentiable.

    Args:
        tensor: the same shape and dtype on every rank.
        average: older spelling of ``op``.
        name: the same on every rank; made up when left out.
        compression: how the tensor travels, ``Compression.none`` or ``Compression.fp16``.
        op: ``Average``, ``Sum``, ``Adasum``, ``Min``, ``Max`` or ``Product``.
        prescale_factor: multiplied in before.
        postscale_factor: multiplied in after.
        process_set: the ranks that take part.
    """
    packed, context = compression.compress(tensor)
    output = _horovod.allreduce(
        reducible(packed),
        average,
        name,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )
    return compression.decompress(from_wire(_with_plain_gradient(output), packed.dtype), context)


def allreduce_(
    tensor: Tensor,
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Tensor:
    """``allreduce`` that overwrites ``tensor`` and returns it."""
    return synchronize(allreduce_async_(tensor, average, name, op, prescale_factor, postscale_factor, process_set))


def grouped_allreduce_async(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start all-reduces that complete together, into new tensors. See ``allreduce``."""
    sent = [reducible(t.detach()) for t in tensors]
    handle = _horovod.grouped_allreduce_async(sent, average, name, op, prescale_factor, postscale_factor, process_set)
    return _returning(handle, tensors, sent, group=True)


def grouped_allreduce_async_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Handle:
    """Start all-reduces that complete together and overwrite ``tensors``. See ``allreduce``."""
    sent = [reducible(t.detach()) for t in tensors]
    handle = _horovod.grouped_allreduce_async_(sent, average, name, op, prescale_factor, postscale_factor, process_set)
    return _overwriting(handle, tensors, group=True)


def grouped_allreduce(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Tensor]:
    """``allreduce`` of several tensors that complete together. Differentiable."""
    packed = [compression.compress(t) for t in tensors]
    outputs = _horovod.grouped_allreduce(
        [reducible(t) for t, _ in packed],
        average,
        name,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )
    return [
        compression.decompress(from_wire(_with_plain_gradient(output), tensor.dtype), context)
        for output, (tensor, context) in zip(outputs, packed, strict=True)
    ]


def grouped_allreduce_(
    tensors: Sequence[Tensor],
    average: bool | None = None,
    name: str | None = None,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Sequence[Tensor]:
    """``grouped_allreduce`` that overwrites ``tensors`` and returns them."""
    return synchronize(
        grouped_allreduce_async_(tensors, average, name, op, prescale_factor, postscale_factor, process_set)
    )


def sparse_allreduce_async(
    tensor: Tensor, name: str, op: int, process_set: ProcessSet = global_process_set
) -> Callable[[], Tensor]:
    """Start adding sparse COO tensors over ranks; calling the handle waits and gives the sparse result.

    ``op`` is ``Average``, or anything else for the sum, as in Horovod.
    """
    tensor = tensor.detach().coalesce()
    rows = tensor.indices().t().contiguous()  # [entries, sparse dims]
    row_handle = allgather_async(rows, f"{name}.indices", process_set)
    value_handle = allgather_async(tensor.values(), f"{name}.values", process_set)

    def finish() -> Tensor:
        values = synchronize(value_handle)
        indices = synchronize(row_handle).t()
        if op == Average:
            values = values / process_set.size()
        return torch.sparse_coo_tensor(indices, values, tensor.shape, check_invariants=False)

    return finish


def allgather_async(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Handle:
    """Start ``allgather``."""
    sent = movable(tensor.detach())
    return _returning(_horovod.allgather_async(sent, name, process_set), [tensor], [sent])


def allgather(tensor: Tensor, name: str | None = None, process_set: ProcessSet = global_process_set) -> Tensor:
    """The tensors of all ranks joined along the first axis, which may differ in length. Differentiable."""
    output = _horovod.allgather(movable(tensor), name, process_set)
    return from_wire(_with_plain_gradient(output), tensor.dtype)


def grouped_allgather_async(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``grouped_allgather``."""
    sent = [movable(t.detach()) for t in tensors]
    return _returning(_horovod.grouped_allgather_async(sent, name, process_set), tensors, sent, group=True)


def grouped_allgather(
    tensors: Sequence[Tensor], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Tensor]:
    """``allgather`` of several tensors that complete together. Differentiable."""
    outputs = _horovod.grouped_allgather([movable(t) for t in tensors], name, process_set)
    return [from_wire(_with_plain_gradient(o), t.dtype) for o, t in zip(outputs, tensors, strict=True)]


def broadcast_async(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``broadcast``."""
    sent = movable(tensor.detach())
    return _returning(_horovod.broadcast_async(sent, root_rank, name, process_set), [tensor], [sent])


def broadcast(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Tensor:
    """The tensor of rank ``root_rank`` (a global rank), as a new tensor. Differentiable."""
    output = _horovod.broadcast(movable(tensor), root_rank, name, process_set)
    return from_wire(_with_plain_gradient(output), tensor.dtype)


def broadcast_async_(
    tensor: Tensor, root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Handle:
    """Start ``broadcast_``."""
    sent = movable(tensor.detach())
    return _overwriting(_horovod.broadcast_async_(sent, root_rank, name, process_set), [tensor])


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
    handle = _horovod.alltoall_async(sent, splits, name, process_set)
    if sent.dtype == tensor.dtype:
        return handle
    return _then(handle, lambda output: (from_wire(output[0], tensor.dtype), output[1]))


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
    output = _horovod.alltoall(movable(tensor), splits, name, process_set)
    if splits is None:
        return from_wire(_with_plain_gradient(output), tensor.dtype)
    return from_wire(_with_plain_gradient(output[0]), tensor.dtype), output[1]


def reducescatter_async(
    tensor: Tensor,
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start ``reducescatter``."""
    sent = reducible(tensor.detach())
    handle = _horovod.reducescatter_async(sent, name, op, process_set, prescale_factor, postscale_factor)
    return _returning(handle, [tensor], [sent])


def reducescatter(
    tensor: Tensor,
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Tensor:
    """Reduce over ranks, then keep this rank's share of the first axis. Differentiable."""
    packed, context = compression.compress(tensor)
    output = _horovod.reducescatter(
        reducible(packed),
        name,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )
    return compression.decompress(from_wire(_with_plain_gradient(output), packed.dtype), context)


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start ``grouped_reducescatter``."""
    sent = [reducible(t.detach()) for t in tensors]
    handle = _horovod.grouped_reducescatter_async(sent, name, op, process_set, prescale_factor, postscale_factor)
    return _returning(handle, tensors, sent, group=True)


def grouped_reducescatter(
    tensors: Sequence[Tensor],
    name: str | None = None,
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[Tensor]:
    """``reducescatter`` of several tensors that complete together. Differentiable."""
    packed = [compression.compress(t) for t in tensors]
    outputs = _horovod.grouped_reducescatter(
        [reducible(t) for t, _ in packed],
        name,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )
    return [
        compression.decompress(from_wire(_with_plain_gradient(output), tensor.dtype), context)
        for output, (tensor, context) in zip(outputs, packed, strict=True)
    ]


def _then(handle: int, finish: Callable[[Any], Any]) -> int:
    _unfinished[handle] = finish
    return handle


def _returning(handle: int, tensors: Sequence[Tensor], sent: Sequence[Tensor], group: bool = False) -> int:
    """Give results back in the dtypes they were sent in."""
    dtypes = [t.dtype for t in tensors]
    if [s.dtype for s in sent] == dtypes:
        _unfinished.pop(handle, None)  # Horovod starts counting anew after a second init()
        return handle
    if not group:
        return _then(handle, lambda output: from_wire(output, dtypes[0]))
    return _then(handle, lambda outputs: tuple(map(from_wire, outputs, dtypes)))


def _overwriting(handle: int, tensors: Sequence[Tensor], group: bool = False) -> int:
    """Put results into the caller's tensors, where they are not already, and give those back."""

    def finish(outputs: Any) -> Any:
        for tensor, output in zip(tensors, outputs if group else [outputs], strict=True):
            result = from_wire(output, tensor.dtype)
            if result.data_ptr() != tensor.data_ptr():
                tensor.detach().copy_(result)
        return tuple(tensors) if group else tensors[0]

    return _then(handle, finish)


def _with_plain_gradient(output: Tensor) -> Tensor:
    """Horovod's backward passes refuse gradients that are views, such as those of ``sum()``."""
    if output.requires_grad:
        output.register_hook(lambda gradient: gradient.contiguous())
    return output
