"""Messages of several tensors: dense ones added up, rows of sparse ones gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.tensorflow.runtime import world
from hvdscale.tensorflow.wire import Compression, as_tensor, by_dtype, from_wire, to_wire, when_run, wire_dtype

__all__ = ["check_adasum", "exchanges", "gather_rows", "gather_slices", "reduce_dense"]


def exchanges(process_set: ProcessSet = global_process_set) -> bool:
    """Whether this rank has anyone to exchange with.

    In a graph of an elastic job the answer is yes for every member: the graph outlives the present world.
    """
    if not process_set.included():
        return False
    return (process_set.size() or 1) > 1 or (world().launch.elastic and not tf.executing_eagerly())


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
    if op == _ops.Adasum:
        check_adasum(process_set)
    common = {
        "op": op,
        "prescale_factor": scales[0],
        "postscale_factor": scales[1],
        "ignore_name_scope": ignore_name_scope,
        "process_set": process_set,
    }
    with tf.device(device):
        packed = [compression.compress(as_tensor(t)) for t in tensors]
        sent = [to_wire(t) for t, _ in packed]
        results = list(sent)
        for dtype, positions in by_dtype(sent):
            message = when_run([sent[i] for i in positions])
            label = f"{name}_{dtype.name}" if name and len(positions) < len(sent) else name
            if len(message) == 1:
                reduced = [_ops._allreduce(message[0], name=label, **common)]
            else:
                reduced = _ops._grouped_allreduce(message, name=label, **common)
            for i, tensor in zip(positions, reduced, strict=True):
                results[i] = tensor
        return [
            compression.decompress(from_wire(result, tensor.dtype), context)
            for result, (tensor, context) in zip(results, packed, strict=True)
        ]


def gather_slices(
    slices: Sequence[tf.IndexedSlices],
    *,
    average: bool,
    scale: float = 1.0,
    process_set: ProcessSet = global_process_set,
    name: str | None = None,
    ignore_name_scope: bool = False,
    device: str = "",
) -> list[tf.IndexedSlices]:
    """The rows of all ranks: adding them up gives ``scale`` times the sum (or average) of the dense tensors.

    Row numbers travel as int64: ranks may hold them in different types.
    """
    if not slices:
        return []
    common = {"process_set": process_set, "ignore_name_scope": ignore_name_scope}
    with tf.device(device):
        # [rows, ...] of each rank -> [rows of all ranks, ...]
        scaled = [_scaled(s.values, average, scale, process_set) for s in slices]
        values = gather_rows(scaled, name=f"{name}_values" if name else None, **common)
        numbers = [tf.cast(s.indices, tf.int64) for s in slices]
        indices = gather_rows(numbers, name=f"{name}_indices" if name else None, **common)
    return [
        tf.IndexedSlices(v, tf.cast(i, s.indices.dtype), s.dense_shape)
        for v, i, s in zip(values, indices, slices, strict=True)
    ]


def gather_rows(
    tensors: Sequence[Any], *, process_set: ProcessSet, name: str | None, ignore_name_scope: bool
) -> list[tf.Tensor]:
    """Concatenate each tensor over ranks along its first axis: one message for those of a dtype."""
    given = [as_tensor(t) for t in tensors]
    sent = [to_wire(t) for t in given]
    gathered = list(sent)
    for dtype, positions in by_dtype(sent):
        message = _ops.grouped_allgather(
            when_run([sent[i] for i in positions]),
            name=f"{name}_{dtype.name}" if name and len(positions) < len(sent) else name,
            ignore_name_scope=ignore_name_scope,
            process_set=process_set,
        )
        for i, tensor in zip(positions, message, strict=True):
            gathered[i] = from_wire(tensor, given[i].dtype)
    return gathered


def _scaled(values: tf.Tensor, average: bool, scale: float, process_set: ProcessSet) -> tf.Tensor:
    if not average and scale == 1.0:
        return values
    wide = tf.cast(values, wire_dtype(values.dtype))
    wide *= tf.cast(scale, wide.dtype)
    if average:  # the size is asked for when the graph runs: an elastic world may have changed by then
        wide /= tf.cast(_ops.size_op(process_set.process_set_id), wide.dtype)
    return from_wire(wide, values.dtype)


def check_adasum(process_set: ProcessSet) -> None:
    """Raise unless Adasum can work here.

    Raises:
        PlanError: a process set is given, there is no MPI, or the number of ranks is not a power of two.
    """
    if process_set.process_set_id != global_process_set.process_set_id:
        raise PlanError("Adasum works over all ranks only. Leave process_set out, or use op=Average.")
    if _ops.size() > 1 and not _ops.mpi_enabled():
        raise PlanError("Adasum needs MPI; this job runs over Gloo. Start it with mpirun, or use op=Average.")
    if not _ops.check_num_rank_power_of_2(_ops.size()):
        raise PlanError(f"Adasum needs a number of ranks that is a power of two, got {_ops.size()}. Use op=Average.")
