"""Horovod's collectives, for Keras variables, bfloat16 and lists of any mixture as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.mpi_ops import (
    Adasum,
    Average,
    ProcessSet,
    Sum,
    global_process_set,
    handle_average_backwards_compatibility,
)

from hvdscale.errors import PlanError
from hvdscale.tensorflow.messages import gather_rows, gather_slices, reduce_dense
from hvdscale.tensorflow.wire import Compression, as_tensor, by_dtype, from_wire, to_wire, when_run

__all__ = [
    "allgather",
    "allreduce",
    "alltoall",
    "broadcast",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "reducescatter",
]


@tf.autograph.experimental.do_not_convert
def allreduce(
    tensor: Any,
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
) -> tf.Tensor | tf.IndexedSlices:
    """All-reduce a tensor, a variable or ``tf.IndexedSlices`` of the same shape and dtype on every rank.

    bfloat16 and 16-bit integers are reduced in 32 bits. Of slices the rows of all ranks are gathered.
    Differentiable: the gradient is the all-reduce of the gradient.

    Args:
        op: ``Average`` (default), ``Sum``, ``Adasum``, ``Min``, ``Max`` or ``Product``.
        prescale_factor, postscale_factor: multiply before and after.

    Raises:
        PlanError: an op that sparse tensors do not have, or Adasum where it cannot work.
    """
    return grouped_allreduce(
        [tensor],
        average,
        device_dense,
        device_sparse,
        compression,
        op,
        prescale_factor,
        postscale_factor,
        process_set,
        ignore_name_scope,
        name,
    )[0]


@tf.autograph.experimental.do_not_convert
def grouped_allreduce(
    tensors: Sequence[Any],
    average: bool | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: Any = Compression.none,
    op: int | None = None,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    name: str | None = None,
) -> list[tf.Tensor | tf.IndexedSlices]:
    """``allreduce`` of a list, as one message per dtype; dense and sparse tensors may be mixed in any order."""
    op = handle_average_backwards_compatibility(op, average)
    sparse_at = [i for i, t in enumerate(tensors) if isinstance(t, tf.IndexedSlices)]
    dense_at = [i for i, t in enumerate(tensors) if not isinstance(t, tf.IndexedSlices)]
    if sparse_at and op not in (Average, Sum):
        what = "Adasum" if op == Adasum else "Min, Max and Product"
        raise PlanError(f"{what} cannot reduce tf.IndexedSlices. Use Average or Sum, or make the tensor dense first.")
    common = {"process_set": process_set, "name": name, "ignore_name_scope": ignore_name_scope}
    dense_results = reduce_dense(
        [tensors[i] for i in dense_at],
        op,
        (prescale_factor, postscale_factor),
        compression=compression,
        device=device_dense,
        **common,
    )
    sparse_results = gather_slices(
        [tensors[i] for i in sparse_at],
        average=op == Average,
        scale=prescale_factor * postscale_factor,
        device=device_sparse,
        **common,
    )
    results = dict(zip(dense_at, dense_results, strict=True)) | dict(zip(sparse_at, sparse_results, strict=True))
    return [results[i] for i in range(len(tensors))]


@tf.autograph.experimental.do_not_convert
def allgather(
    tensor: Any, name: str | None = None, ignore_name_scope: bool = False, process_set: ProcessSet = global_process_set
) -> tf.Tensor:
    """Concatenate ``tensor`` over ranks along its first axis, whose length may differ: ``[sum of n_r, ...]``."""
    tensor = as_tensor(tensor)
    return from_wire(_ops.allgather(*when_run([to_wire(tensor)]), name, ignore_name_scope, process_set), tensor.dtype)


@tf.autograph.experimental.do_not_convert
def grouped_allgather(
    tensors: Sequence[Any],
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> list[tf.Tensor]:
    """``allgather`` of a list, as one message per dtype."""
    return gather_rows(tensors, name=name, ignore_name_scope=ignore_name_scope, process_set=process_set)


@tf.autograph.experimental.do_not_convert
def broadcast(
    tensor: Any,
    root_rank: int,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> tf.Tensor:
    """The value of ``tensor`` on the rank ``root_rank`` (a rank of the world, also in a process set)."""
    tensor = as_tensor(tensor)
    return from_wire(
        _ops.broadcast(*when_run([to_wire(tensor)]), root_rank, name, ignore_name_scope, process_set), tensor.dtype
    )


@tf.autograph.experimental.do_not_convert
def alltoall(
    tensor: Any,
    splits: Any = None,
    name: str | None = None,
    ignore_name_scope: bool = False,
    process_set: ProcessSet = global_process_set,
) -> tf.Tensor | tuple[tf.Tensor, tf.Tensor]:
    """Send the i-th piece of ``tensor`` to rank i and concatenate what came; ``splits`` are the pieces' lengths.

    Returns:
        The received rows; with ``splits`` also how many came from each rank, ``int32[size]``.
    """
    tensor = as_tensor(tensor)
    result = _ops.alltoall(*when_run([to_wire(tensor)]), splits, name, ignore_name_scope, process_set)
    if splits is None:
        return from_wire(result, tensor.dtype)
    return from_wire(result[0], tensor.dtype), result[1]


@tf.autograph.experimental.do_not_convert
def reducescatter(
    tensor: Any,
    device_dense: str = "",
    compression: Any = Compression.none,
    op: int = Average,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    ignore_name_scope: bool = False,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> tf.Tensor:
    """Reduce ``[n, ...]`` over ranks and keep this rank's share of the first axis: ``[n / size, ...]``."""
    with tf.device(device_dense):
        packed, context = compression.compress(as_tensor(tensor))
        share = _ops._reducescatter(
            *when_run([to_wire(packed)]), name, op, ignore_name_scope, process_set, prescale_factor, postscale_factor
        )
        return compression.decompress(from_wire(share, packed.dtype), context)


@tf.autograph.experimental.do_not_convert
def grouped_reducescatter(
    tensors: Sequence[Any],
    device_dense: str = "",
    compression: Any = Compression.none,
    op: int = Average,
    process_set: ProcessSet = global_process_set,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> list[tf.Tensor]:
    """``reducescatter`` of a list, as one message per dtype."""
    with tf.device(device_dense):
        packed = [compression.compress(as_tensor(t)) for t in tensors]
        sent = [to_wire(t) for t, _ in packed]
        shares = list(sent)
        for _, positions in by_dtype(sent):
            message = _ops._grouped_reducescatter(
                when_run([sent[i] for i in positions]),
                op=op,
                process_set=process_set,
                prescale_factor=prescale_factor,
                postscale_factor=postscale_factor,
            )
            for i, share in zip(positions, message, strict=True):
                shares[i] = share
        return [
            compression.decompress(from_wire(share, tensor.dtype), context)
            for share, (tensor, context) in zip(shares, packed, strict=True)
        ]
