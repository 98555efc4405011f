"""Averaging lists of gradients: one message per bucket and dtype, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as _horovod
import torch
from horovod.torch import Compression, ProcessSet, global_process_set
from torch import Tensor

from hvdscale.errors import PlanError
from hvdscale.sync import Reduction
from hvdscale.torch.wire import from_wire, movable, reducible

__all__ = ["Finish", "launch_dense", "launch_sparse", "reduce_gradients"]

Finish = Callable[[], list[Tensor]]

_OPS = {"average": _horovod.Average, "sum": _horovod.Sum, "adasum": _horovod.Adasum}


def reduce_gradients(
    gradients: Sequence[Tensor | None],
    reduction: Reduction,
    *,
    compression: Any = Compression.none,
    process_set: ProcessSet = global_process_set,
    name: str = "gradient",
) -> list[Tensor | None]:
    """All-reduce a list of gradients over ``process_set`` and wait for it. The inputs are not modified.

    Without ``reduction.groups`` all dense gradients travel as one group. Each result has the shape, dtype and
    layout (dense or sparse) of its gradient; bfloat16 is added in float32.

    Args:
        gradients: in the same order on every rank. ``None`` stays ``None``, and must be so on every rank.
        reduction: op, predivision, groups (positions in ``gradients``) and ``sparse_as_dense``.
        compression: ``Compression.none`` or ``Compression.fp16``, or any class with Horovod's two methods.
        process_set: the ranks that take part; other ranks get their gradients back unchanged.
        name: base of the messages' names; different for lists that may be in flight at the same time.

    Raises:
        PlanError: Adasum over sparse gradients.
    """
    results = list(gradients)
    if _horovod.size() == 1 or not process_set.included():
        return results
    common = {"compression": compression, "process_set": process_set}
    dense = [i for i, g in enumerate(gradients) if g is not None and not g.is_sparse]
    flights: list[tuple[list[int], Finish]] = []
    for bucket in [dense] if reduction.groups is None else reduction.buckets(dense):
        if bucket:
            sent = [gradients[i] for i in bucket]
            flights.append((bucket, launch_dense(sent, reduction, name=f"{name}.{bucket[0]}", **common)))
    for i, gradient in enumerate(gradients):
        if gradient is not None and gradient.is_sparse:
            flights.append(([i], launch_sparse(gradient, reduction, name=f"{name}.{i}", **common)))
    for positions, finish in flights:
        for position, result in zip(positions, finish(), strict=True):
            results[position] = result
    return results


def launch_dense(
    gradients: Sequence[Tensor],
    reduction: Reduction,
    *,
    compression: Any,
    process_set: ProcessSet,
    name: str,
    in_place: bool = False,
) -> Finish:
    """Start the all-reduce of dense gradients; the returned function waits and gives the results.

    They travel as one group per wire dtype. ``in_place`` overwrites the gradients, which must be left alone
    until then.
    """
    packed = [compression.compress(g.detach()) for g in gradients]
    sent = [reducible(tensor) for tensor, _ in packed]
    before, after = reduction.scales() if reduction.op == "average" else (1.0, 1.0)
    flights: list[tuple[list[int], int]] = []
    for positions in _by_dtype(sent):
        tensors = [sent[i] for i in positions]
        # A wire copy is ours to overwrite; the user's tensor only when told so.
        ours = in_place or all(not _shares_memory(sent[i], gradients[i]) for i in positions)
        start = _horovod.grouped_allreduce_async_ if ours else _horovod.grouped_allreduce_async
        handle = start(
            tensors,
            name=f"{name}.{str(tensors[0].dtype).removeprefix('torch.')}",
            op=_OPS[reduction.op],
            prescale_factor=before,
            postscale_factor=after,
            process_set=process_set,
        )
        flights.append((positions, handle))

    def finish() -> list[Tensor]:
        results = list(gradients)
        for positions, handle in flights:
            for i, output in zip(positions, _horovod.synchronize(handle), strict=True):
                tensor, context = packed[i]
                result = compression.decompress(from_wire(output, tensor.dtype), context)
                if in_place and not _shares_memory(result, gradients[i]):
                    gradients[i].detach().copy_(result)
                elif not in_place:
                    results[i] = result
        return results

    return finish


def launch_sparse(
    gradient: Tensor,
    reduction: Reduction,
    *,
    compression: Any,
    process_set: ProcessSet,
    name: str,
) -> Finish:
    """Start the reduction of one sparse COO gradient: indices and values of all ranks are gathered and added.

    The result is coalesced. With ``reduction.sparse_as_dense`` it travels as a dense tensor instead.

    Raises:
        PlanError: Adasum, which has no meaning over gathered rows.
    """
    gradient = gradient.detach()
    if reduction.sparse_as_dense:
        common = {"compression": compression, "process_set": process_set, "name": name, "in_place": True}
        finish_dense = launch_dense([gradient.to_dense()], reduction, **common)
        return lambda: [finish_dense()[0].to_sparse(gradient.sparse_dim())]
    if reduction.op == "adasum":
        raise PlanError(
            f"op=Adasum has no meaning for sparse gradients ({name}). Pass sparse_as_dense=True, or use op=Average."
        )
    gradient = gradient.coalesce()
    # Rows travel first: [nnz, sparse dims] and [nnz, dense dims].
    rows = gradient.indices().t().contiguous()
    packed, context = compression.compress(gradient.values())
    row_handle = _horovod.allgather_async(rows, name=f"{name}.rows", process_set=process_set)
    value_handle = _horovod.allgather_async(movable(packed), name=f"{name}.values", process_set=process_set)

    def finish() -> list[Tensor]:
        # Values first: waiting for them last kept a stale buffer in some builds of Horovod.
        values = from_wire(_horovod.synchronize(value_handle), packed.dtype)
        everyone = _horovod.synchronize(row_handle).reshape(-1, gradient.sparse_dim()).t()
        values = values.reshape(-1, *gradient.values().shape[1:])
        wide = reducible(compression.decompress(values, context))
        total = torch.sparse_coo_tensor(everyone, wide, gradient.shape, check_invariants=False).coalesce()
        if reduction.op == "average":
            total = total / process_set.size()
        return [total.to(gradient.dtype)]

    return finish


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    positions: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault(tensor.dtype, []).append(i)
    return list(positions.values())


def _shares_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
