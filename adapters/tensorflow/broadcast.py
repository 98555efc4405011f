"""Give every rank the values of one: variables, packed as bytes into few messages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.functions import broadcast_object
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.tensorflow.collectives import broadcast
from hvdscale.tensorflow.messages import exchanges
from hvdscale.tensorflow.registry import agree_on, describe
from hvdscale.tensorflow.wire import as_variable, wire_dtype

__all__ = [
    "BroadcastGlobalVariablesHook",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object_fn",
    "broadcast_variables",
]

# Variables share a message up to this size; a larger one travels alone, without a copy.
_MESSAGE_BYTES = 64 * 2**20


def broadcast_variables(
    variables: Any, root_rank: int, process_set: ProcessSet = global_process_set, inplace: bool = False
) -> tf.Operation | None:
    """Assign the values on ``root_rank`` to the variables of every rank of ``process_set``, bit for bit.

    Args:
        variables: Keras variables or ``tf.Variable`` of any numeric dtype, in lists nested at will.
        root_rank: a rank of the world, also with a process set.
        inplace: receive into the variables' own memory where Horovod can.

    Returns:
        ``None`` eagerly; in a graph the operation to run.

    Raises:
        DesyncError: ranks differ in number, names, shapes or dtypes of the variables. Nothing is assigned.
        PlanError: ``root_rank`` is not one of the ranks.
    """
    flat = tf.nest.flatten(list(variables))
    members = process_set.ranks if process_set.ranks else range(_ops.size())
    if root_rank not in members:
        raise PlanError(f"root_rank must be one of the ranks that take part, {list(members)}; got {root_rank}.")
    facts = {"root_rank": root_rank, "inplace": inplace}
    agree_on([describe(v) for v in flat], facts, "the variables to broadcast", process_set)
    inner = [as_variable(v) for v in flat]
    assigned: list[Any] = []
    if exchanges(process_set):
        assigned = (_inplace if inplace else _packed)(inner, root_rank, process_set)
    return None if tf.executing_eagerly() else tf.group(*assigned)


def broadcast_(
    variables: Sequence[Any], root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[tf.Tensor]:
    """Broadcast into the variables' own memory; returns their new values."""
    inner = [as_variable(v) for v in variables]
    if all(wire_dtype(v.dtype) == v.dtype for v in inner):
        return _ops.broadcast_(inner, root_rank, name, process_set)
    return [v.assign(broadcast(v, root_rank, process_set=process_set)) for v in inner]


def broadcast_global_variables(root_rank: int) -> tf.Operation | None:
    """The operation that broadcasts all global variables of the default graph (TensorFlow 1 style).

    Raises:
        RuntimeError: in eager mode, which has no list of all variables.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "hvd.broadcast_global_variables() needs a graph: eager mode keeps no list of variables. "
            "Use hvd.broadcast_variables(model.variables, root_rank)."
        )
    return broadcast_variables(tf.compat.v1.global_variables(), root_rank)


class BroadcastGlobalVariablesHook(tf.compat.v1.train.SessionRunHook):
    """Broadcast all global variables from ``root_rank`` when a session is made (TensorFlow 1 style)."""

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self.root_rank = root_rank
        self.device = device
        self.bcast_op: tf.Operation | None = None

    def begin(self) -> None:
        if self.bcast_op is None or self.bcast_op.graph is not tf.compat.v1.get_default_graph():
            with tf.device(self.device):
                self.bcast_op = broadcast_global_variables(self.root_rank)

    def after_create_session(self, session: Any, coord: Any) -> None:
        session.run(self.bcast_op)


def broadcast_object_fn(
    root_rank: int = 0, session: Any = None, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Callable[[Any], Any]:
    """A function that broadcasts the object given to it from ``root_rank``."""

    def broadcast_this(obj: Any) -> Any:
        return broadcast_object(obj, root_rank, session, name or "broadcast_object_fn", process_set)

    return broadcast_this


def _inplace(variables: list[tf.Variable], root_rank: int, process_set: ProcessSet) -> list[Any]:
    direct = [v for v in variables if wire_dtype(v.dtype) == v.dtype and v.dtype.name not in ("uint32", "uint64")]
    chosen = {id(v) for v in direct}
    values = _ops.broadcast_(direct, root_rank, process_set=process_set) if direct else []
    return [*values, *_packed([v for v in variables if id(v) not in chosen], root_rank, process_set)]


def _packed(variables: list[tf.Variable], root_rank: int, process_set: ProcessSet) -> list[Any]:
    assigned: list[Any] = []
    for number, message in enumerate(_messages(variables)):
        name = f"broadcast_variables_{number}"
        if len(message) == 1 and not _packable(message[0]):
            received = [broadcast(message[0], root_rank, name, process_set=process_set)]
        else:
            data = tf.concat([_to_bytes(v) for v in message], 0)  # uint8[sum of bytes]
            data = _ops.broadcast(data, root_rank, name, process_set=process_set)
            pieces = tf.split(data, [_size_bytes(v) for v in message])
            received = [_from_bytes(piece, v) for piece, v in zip(pieces, message, strict=True)]
        assigned += [v.assign(value) for v, value in zip(message, received, strict=True)]
    return assigned


def _messages(variables: list[tf.Variable]) -> Iterator[list[tf.Variable]]:
    message: list[tf.Variable] = []
    filled = 0
    for variable in variables:
        size = _size_bytes(variable) if _packable(variable) else _MESSAGE_BYTES
        if message and filled + size > _MESSAGE_BYTES:
            yield message
            message, filled = [], 0
        message.append(variable)
        filled += size
    if message:
        yield message


def _packable(variable: tf.Variable) -> bool:
    """Whether it shares a message: its size is known and not large, or Horovod has no other way for its dtype."""
    if not variable.shape.is_fully_defined():
        return False
    return _size_bytes(variable) < _MESSAGE_BYTES or variable.dtype.name in ("uint32", "uint64")


def _size_bytes(variable: tf.Variable) -> int:
    return variable.shape.num_elements() * variable.dtype.size


def _to_bytes(variable: tf.Variable) -> tf.Tensor:
    value = tf.reshape(tf.convert_to_tensor(variable), [-1])
    # bitcast to a smaller type adds an axis: [n] -> [n, bytes of one value]
    value = tf.cast(value, tf.uint8) if value.dtype == tf.bool else tf.bitcast(value, tf.uint8)
    return tf.reshape(value, [-1])


def _from_bytes(data: tf.Tensor, variable: tf.Variable) -> tf.Tensor:
    if variable.dtype == tf.bool:
        return tf.reshape(tf.cast(data, tf.bool), variable.shape)
    width = variable.dtype.size
    data = tf.reshape(data, [*variable.shape, width] if width > 1 else variable.shape)
    return tf.bitcast(data, variable.dtype)
