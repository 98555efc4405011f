"""Reducing lists of gradients over ranks: one message per wire dtype, dense and sparse."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as _horovod
import torch
from horovod.torch import Compression, ProcessSet, global_process_set
from torch import Tensor

from hvdscale.errors import PlanError
from hvdscale.sync import Reduction
from hvdscale.torch.handles import wait
from hvdscale.torch.wire import all_reducible, from_wire, movable, summed_as

__all__ = ["HOROVOD_OPS", "Finish", "launch", "reduce_gradients"]

Finish = Callable[[], list[Tensor]]

HOROVOD_OPS = {"average": _horovod.Average, "sum": _horovod.Sum, "adasum": _horovod.Adasum}


def reduce_gradients(
    gradients: Sequence[Tensor | None],
    reduction: Reduction,
    *,
    compression: Any = Compression.none,
    process_set: ProcessSet = global_process_set,
    name: str = "gradient",
) -> list[Tensor | None]:
    """All-reduce a list of gradients over ``process_set`` and wait for it. The inputs are not modified.

    Without ``reduction.groups`` all gradients travel as one group. Each result has the shape, dtype and
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
    present = {i: g for i, g in enumerate(gradients) if g is not None}
    buckets = [list(present)] if reduction.groups is None else reduction.buckets(list(present))
    flights = [
        (
            bucket,
            launch(
                [present[i] for i in bucket],
                reduction,
                compression=compression,
                process_set=process_set,
                name=f"{name}.{bucket[0]}",
            ),
        )
        for bucket in buckets
        if bucket
    ]
    for bucket, finish in flights:
        for position, result in zip(bucket, finish(), strict=True):
            results[position] = result
    return results


def launch(
    gradients: Sequence[Tensor],
    reduction: Reduction,
    *,
    compression: Any,
    process_set: ProcessSet,
    name: str,
    in_place: bool = False,
) -> Finish:
    """Start reducing these gradients; the returned function waits and gives the results, in the same order.

    ``in_place`` overwrites dense gradients, which must be left alone until then. Sparse ones come back as new
    tensors: rows of all ranks gathered and added, or, with ``reduction.sparse_as_dense``, reduced as dense.

    Raises:
        PlanError: Adasum over sparse gradients.
    """
    common = {"reduction": reduction, "compression": compression, "process_set": process_set}
    results = [g.detach() for g in gradients]
    gathered = [i for i, g in enumerate(results) if g.is_sparse and not reduction.sparse_as_dense]
    summed = [i for i in range(len(results)) if i not in gathered]
    dense = [results[i].to_dense() if results[i].is_sparse else results[i] for i in summed]
    finish_dense = _launch_dense(dense, name=name, in_place=in_place, **common)
    finish_sparse = [_launch_sparse(results[i], name=f"{name}.{i}", **common) for i in gathered]

    def finish() -> list[Tensor]:
        for i, result in zip(summed, finish_dense(), strict=True):
            results[i] = result.to_sparse(results[i].sparse_dim()) if results[i].is_sparse else result
        for i, finish_one in zip(gathered, finish_sparse, strict=True):
            results[i] = finish_one()
        return results

    return finish


def _launch_dense(
    gradients: Sequence[Tensor],
    *,
    reduction: Reduction,
    compression: Any,
    process_set: ProcessSet,
    name: str,
    in_place: bool,
) -> Finish:
    packed = [compression.compress(g) for g in gradients]
    sent = all_reducible([tensor for tensor, _ in packed])
    before, after = reduction.scales() if reduction.op == "average" else (1.0, 1.0)
    flights: list[tuple[list[int], int]] = []
    for positions in _by_dtype(sent):
        tensors = [sent[i] for i in positions]
        # A copy made for the wire is ours to overwrite; the caller's tensor only when told so.
        ours = in_place or not any(_same_memory(sent[i], gradients[i]) for i in positions)
        handle = _start(
            tensors,
            ours,
            name=f"{name}.{str(tensors[0].dtype).removeprefix('torch.')}",
            op=HOROVOD_OPS[reduction.op],
            prescale_factor=before,
            postscale_factor=after,
            process_set=process_set,
        )
        flights.append((positions, handle))

    def finish() -> list[Tensor]:
        results = list(gradients)
        for positions, handle in flights:
            outputs = wait(handle)
            for i, output in zip(positions, outputs if len(positions) > 1 else [outputs], strict=True):
                tensor, context = packed[i]
                result = compression.decompress(from_wire(output, tensor), context)
                if not in_place:
                    results[i] = result
                elif not _same_memory(result, gradients[i]):
                    gradients[i].copy_(result)
        return results

    return finish


def _launch_sparse(
    gradient: Tensor, *, reduction: Reduction, compression: Any, process_set: ProcessSet, name: str
) -> Callable[[], Tensor]:
    if reduction.op == "adasum":
        raise PlanError(
            f"op=Adasum has no meaning for a sparse gradient ({name}). Pass sparse_as_dense=True, or use op=Average."
        )
    gradient = gradient.coalesce()
    rows = gradient.indices().t().contiguous()  # [entries, sparse dims]: gathers join the first axis
    packed, context = compression.compress(gradient.values())  # [entries, dense dims...]
    row_handle = _horovod.allgather_async(movable(rows), name=f"{name}.rows", process_set=process_set)
    value_handle = _horovod.allgather_async(movable(packed), name=f"{name}.values", process_set=process_set)

    def finish() -> Tensor:
        values = from_wire(wait(value_handle), packed)
        values = values.reshape(-1, *gradient.values().shape[1:])
        everyone = from_wire(wait(row_handle), rows).reshape(-1, gradient.sparse_dim()).t()
        plain = compression.decompress(values, context)
        wide = plain.to(summed_as(plain.dtype))
        total = torch.sparse_coo_tensor(everyone, wide, gradient.shape, check_invariants=False).coalesce()
        if reduction.op == "average":
            total = total / process_set.size()
        return total.to(gradient.dtype)

    return finish


def _start(tensors: list[Tensor], overwrite: bool, **arguments: Any) -> int:
    if len(tensors) == 1:  # Horovod fuses single tensors freely; a group only as a whole
        start = _horovod.allreduce_async_ if overwrite else _horovod.allreduce_async
        return start(tensors[0], **arguments)
    start = _horovod.grouped_allreduce_async_ if overwrite else _horovod.grouped_allreduce_async
    return start(tensors, **arguments)


def _by_dtype(tensors: Sequence[Tensor]) -> list[list[int]]:
    positions: dict[torch.dtype, list[int]] = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault(tensor.dtype, []).append(i)
    return list(positions.values())


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.dtype == b.dtype
