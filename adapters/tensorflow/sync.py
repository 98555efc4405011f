"""Agree on gradients: the verb every TensorFlow strategy and optimizer reduces with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.sync import Reduction
from hvdscale.tensorflow.wire import Compression, as_tensor, dense, from_wire, gather_form, to_wire, wire_dtype

__all__ = ["Gradient", "exchanges", "gather_slices", "reduce_dense", "reduce_gradients"]

Gradient = tf.Tensor | tf.IndexedSlices | None

_OPS = {"average": _ops.Average, "sum": _ops.Sum, "adasum": _ops.Adasum}


def reduce_gradients(
    gradients: Sequence[Gradient],
    reduction: Reduction,
    *,
    compression: Any = Compression.none,
    process_set: ProcessSet = global_process_set,
    name: str = "gradient",
    device_dense: str = "",
    device_sparse: str = "",
) -> list[Gradient]:
    """Reduce a list of gradients over ``process_set``, eagerly or while a ``tf.function`` is traced.

    All dense gradients of a dtype travel as one message; ``reduction.groups`` splits them into several.
    bfloat16 is summed in float32. Sparse gradients travel as their rows, in one message of their own:
    the result holds the rows of all ranks. ``None`` stays ``None``.

    Args:
        gradients: dense tensors, ``tf.IndexedSlices`` or ``None``; the same kinds and shapes on every rank.
        reduction: op, predivision and groups; positions in groups count from the head of ``gradients``.
        compression: what a dense gradient is turned into for the journey.
        process_set: ranks that take part. A rank outside gets its own gradients back.
        name: head of the messages' names in a graph; the same on every rank.
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
    if reduction.op == "adasum":
        _check_adasum(process_set, bool(sparse_at))

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
            device=device_dense,
        )
        for i, result in zip(bucket, results, strict=True):
            reduced[i] = result
    slices = gather_slices(
        [given[i] for i in sparse_at],
        average=reduction.op == "average",
        process_set=process_set,
        name=name,
        device=device_sparse,
    )
    for i, result in zip(sparse_at, slices, strict=True):
        reduced[i] = result
    return reduced


def exchanges(process_set: ProcessSet = global_process_set) -> bool:
    """Whether this rank has anyone to exchange with."""
    return bool(process_set.included()) and (process_set.size() or 1) > 1


def reduce_dense(
    tensors: Sequence[Any],
    op: int,
    scales: tuple[float, float] = (1.0, 1.0),
    *,
    compression: Any = Compression.none,
    process_set: ProcessSet = global_process_set,
    name: str | None = None,
    ignore_name_scope: bool = False,
    device: str = "",
) -> list[tf.Tensor]:
    """All-reduce dense tensors: one message for those of a dtype, each back in its own dtype.

    Args:
        op: Horovod's ``Average``, ``Sum``, ...
        scales: factors ``(before, after)`` the reduction.
    """
    given = [as_tensor(t) for t in tensors]
    with tf.device(device):
        compressed, contexts = _unzip([compression.compress(t) for t in given])
        sent = [to_wire(t) for t in compressed]
        results: list[tf.Tensor] = list(sent)
        for dtype, positions in _by_dtype(sent).items():
            message = _ops._grouped_allreduce(
                [sent[i] for i in positions],
                name=f"{name}_{dtype.name}" if name else None,
                op=op,
                prescale_factor=scales[0],
                postscale_factor=scales[1],
                ignore_name_scope=ignore_name_scope,
                process_set=process_set,
            )
            for i, tensor in zip(positions, message, strict=True):
                results[i] = from_wire(tensor, compressed[i].dtype)
        return [compression.decompress(t, c) for t, c in zip(results, contexts, strict=True)]


def gather_slices(
    slices: Sequence[tf.IndexedSlices],
    *,
    average: bool,
    process_set: ProcessSet = global_process_set,
    name: str | None = None,
    ignore_name_scope: bool = False,
    device: str = "",
) -> list[tf.IndexedSlices]:
    """The rows of all ranks, so that adding them up gives the sum (or the average) of the dense gradients."""
    with tf.device(device):
        # [rows, ...] of each rank -> [rows of all ranks, ...]
        scaled = [_scaled(s.values, average, process_set) for s in slices]
        values = _gather(scaled, "values", process_set, name, ignore_name_scope)
        indices = _gather([s.indices for s in slices], "indices", process_set, name, ignore_name_scope)
    return [tf.IndexedSlices(v, i, s.dense_shape) for v, i, s in zip(values, indices, slices, strict=True)]


def _scaled(values: tf.Tensor, average: bool, process_set: ProcessSet) -> tf.Tensor:
    if not average:
        return values
    size = tf.cast(_ops.size_op(process_set.process_set_id), wire_dtype(values.dtype))
    return from_wire(to_wire(values) / size, values.dtype)


def _gather(
    tensors: Sequence[tf.Tensor], what: str, process_set: ProcessSet, name: str | None, ignore_name_scope: bool
) -> list[tf.Tensor]:
    sent = [_bits(t, gather_form(t.dtype)) for t in tensors]
    gathered: list[tf.Tensor] = list(sent)
    for dtype, positions in _by_dtype(sent).items():
        message = _ops.grouped_allgather(
            [sent[i] for i in positions],
            name=f"{name}_{what}_{dtype.name}" if name else None,
            ignore_name_scope=ignore_name_scope,
            process_set=process_set,
        )
        for i, tensor in zip(positions, message, strict=True):
            gathered[i] = _bits(tensor, tensors[i].dtype)
    return gathered


def _bits(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    return tensor if tensor.dtype == dtype else tf.bitcast(tensor, dtype)


def _by_dtype(tensors: Sequence[tf.Tensor]) -> dict[tf.DType, list[int]]:
    positions: dict[tf.DType, list[int]] = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault(tensor.dtype, []).append(i)
    return positions


def _unzip(pairs: Sequence[tuple[Any, Any]]) -> tuple[list[Any], list[Any]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def _check_adasum(process_set: ProcessSet, sparse: bool) -> None:
    if sparse:
        raise PlanError("Adasum has no meaning for sparse gradients. Pass sparse_as_dense=True, or use op=Average.")
    if process_set.process_set_id != global_process_set.process_set_id:
        raise PlanError("Adasum works over all ranks only. Leave process_set out, or use op=Average.")
    if not _ops.mpi_enabled():
        raise PlanError("Adasum needs MPI; this job runs over Gloo. Start it with mpirun, or use op=Average.")
    if not _ops.check_num_rank_power_of_2(_ops.size()):
        raise PlanError(f"Adasum needs a number of ranks that is a power of two, got {_ops.size()}. Use op=Average.")
