"""Agree on gradients: the verb every TensorFlow strategy and optimizer reduces with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.sync import Reduction
from hvdscale.tensorflow.kinds import Gradient
from hvdscale.tensorflow.messages import exchanges, gather_slices, reduce_dense
from hvdscale.tensorflow.wire import Compression, dense

__all__ = ["op_name", "reduce_gradients"]

_OPS = {"average": _ops.Average, "sum": _ops.Sum, "adasum": _ops.Adasum}


def op_name(op: int) -> Any:
    """Horovod's reduction constant as ``Reduction`` names it; unknown ones as they are, for it to refuse."""
    return next((name for name, constant in _OPS.items() if constant == op), op)


@tf.autograph.experimental.do_not_convert
def reduce_gradients(
    gradients: Sequence[Gradient],
    reduction: Reduction,
    *,
    compression: Any = Compression.none,
    process_set: ProcessSet = global_process_set,
    name: str = "gradient",
    ignore_name_scope: bool = False,
    device_dense: str = "",
    device_sparse: str = "",
) -> list[Gradient]:
    """Reduce a list of gradients over ``process_set``, eagerly or while a ``tf.function`` is traced.

    All dense gradients of a dtype travel as one message; ``reduction.groups`` splits them into several.
    bfloat16 is summed in float32. Sparse gradients travel as their rows, in one message of their own:
    the result holds the rows of all ranks. ``None`` stays ``None``; it must be so on every rank.

    Args:
        gradients: dense tensors, ``tf.IndexedSlices`` or ``None``; the same kinds and shapes on every rank.
        reduction: op, predivision and groups; positions in groups count from the head of ``gradients``.
        compression: what a dense gradient is turned into for the journey.
        process_set: ranks that take part. A rank outside gets its own gradients back.
        name: head of the messages' names in a graph; the same on every rank.
        ignore_name_scope: leave the graph's name scope out of the messages' names.
        device_dense, device_sparse: where the operations are placed.

    Raises:
        PlanError: Adasum over sparse gradients, over a process set, without MPI, or where the number of
            ranks is not a power of two.
    """
    given: list[Gradient] = [dense(g) for g in gradients] if reduction.sparse_as_dense else list(gradients)
    if not exchanges(process_set):
        return given
    sparse_at = [i for i, g in enumerate(given) if isinstance(g, tf.IndexedSlices)]
    dense_at = [i for i, g in enumerate(given) if g is not None and not isinstance(g, tf.IndexedSlices)]
    if sparse_at and reduction.op == "adasum":
        raise PlanError("Adasum has no meaning for sparse gradients. Pass sparse_as_dense=True, or use op=Average.")

    reduced = list(given)
    buckets = [dense_at] if reduction.groups is None else reduction.buckets(dense_at)
    for number, bucket in enumerate(buckets):
        results = reduce_dense(
            [given[i] for i in bucket],
            _OPS[reduction.op],
            reduction.scales(),
            compression=compression,
            process_set=process_set,
            name=name if len(buckets) == 1 else f"{name}_{number}",
            ignore_name_scope=ignore_name_scope,
            device=device_dense,
        )
        for i, result in zip(bucket, results, strict=True):
            reduced[i] = result
    slices = gather_slices(
        [given[i] for i in sparse_at],
        average=reduction.op == "average",
        process_set=process_set,
        name=name,
        ignore_name_scope=ignore_name_scope,
        device=device_sparse,
    )
    for i, result in zip(sparse_at, slices, strict=True):
        reduced[i] = result
    return reduced
