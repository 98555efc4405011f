"""Sums over ranks (all-reduce and reduce-scatter) for tensors of any layout, and for the dtypes Horovod lacks.

bfloat16 is added in float32, bool and small integers in int32. Results come back in the dtype they were sent
in, wrapping as torch does; a bool is true where the number is not zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import horovod.torch as _horovod
import torch
from horovod.torch import Average, Compression, ProcessSet, global_process_set
from torch import Tensor

from hvdscale.torch.collectives import allgather_async
from hvdscale.torch.handles import CompoundHandle, Handle, overwriting, returning, synchronize, with_plain_gradient
from hvdscale.torch.wire import all_reducible, from_wire, reducible

__all__ = [
    "allreduce",
    "allreduce_",
    "allreduce_async",
    "allreduce_async_",
    "grouped_allreduce",
    "grouped_allreduce_",
    "grouped_allreduce_async",
    "grouped_allreduce_async_",
    "grouped_reducescatter",
    "grouped_reducescatter_async",
    "reducescatter",
    "reducescatter_async",
    "sparse_allreduce_async",
]


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
    return returning(handle, [tensor], [sent])


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
    return overwriting(handle, [tensor])


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
    return compression.decompress(from_wire(with_plain_gradient(output), packed), context)


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
    sent = all_reducible([t.detach() for t in tensors])
    handle = _horovod.grouped_allreduce_async(sent, average, name, op, prescale_factor, postscale_factor, process_set)
    return returning(handle, tensors, sent, group=True)


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
    sent = all_reducible([t.detach() for t in tensors])
    handle = _horovod.grouped_allreduce_async_(sent, average, name, op, prescale_factor, postscale_factor, process_set)
    return overwriting(handle, tensors, group=True)


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
        all_reducible([t for t, _ in packed]),
        average,
        name,
        op=op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        process_set=process_set,
    )
    return [
        compression.decompress(from_wire(with_plain_gradient(output), tensor), context)
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
) -> CompoundHandle:
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

    return CompoundHandle((row_handle, value_handle), finish)


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
    return returning(handle, [tensor], [sent])


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
    return compression.decompress(from_wire(with_plain_gradient(output), packed), context)


def grouped_reducescatter_async(
    tensors: Sequence[Tensor],
    name: str | None = None,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> Handle:
    """Start ``grouped_reducescatter``."""
    sent = all_reducible([t.detach() for t in tensors])
    handle = _horovod.grouped_reducescatter_async(sent, name, op, process_set, prescale_factor, postscale_factor)
    return returning(handle, tensors, sent, group=True)


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
        all_reducible([t for t, _ in packed]),
        name,
        op=op,
        process_set=process_set,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
    )
    return [
        compression.decompress(from_wire(with_plain_gradient(output), tensor), context)
        for output, (tensor, context) in zip(outputs, packed, strict=True)
    ]
