"""Give every rank the values of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops
from horovod.tensorflow.mpi_ops import ProcessSet, global_process_set

from hvdscale.errors import PlanError
from hvdscale.tensorflow.collectives import broadcast
from hvdscale.tensorflow.messages import exchanges
from hvdscale.tensorflow.objects import broadcast_object
from hvdscale.tensorflow.packing import broadcast_packed
from hvdscale.tensorflow.registry import agree_on, describe, stable_name
from hvdscale.tensorflow.wire import as_variable

__all__ = [
    "BroadcastGlobalVariablesHook",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object_fn",
    "broadcast_variables",
]

# What Horovod can receive into the variable's own memory.
_RECEIVED_IN_PLACE = (
    *(tf.float16, tf.float32, tf.float64, tf.bool),
    *(tf.uint8, tf.int8, tf.int32, tf.int64),
)


@tf.autograph.experimental.do_not_convert
def broadcast_variables(
    variables: Any, root_rank: int, process_set: ProcessSet = global_process_set, inplace: bool = False
) -> tf.Operation | None:
    """Assign the values on ``root_rank`` to the variables of every rank of ``process_set``, bit for bit.

    Args:
        variables: Keras variables or ``tf.Variable`` of any numeric dtype, in lists nested at will.
        root_rank: a rank of the world, also with a process set.
        inplace: receive into the variables' own memory where Horovod can.

    Returns:
        ``None``; in a TensorFlow 1 graph the operation to run.

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
        assigned = (_into_place if inplace else broadcast_packed)(inner, root_rank, process_set)
    return None if tf.executing_eagerly() or tf.inside_function() else tf.group(*assigned)


@tf.autograph.experimental.do_not_convert
def broadcast_(
    variables: Sequence[Any], root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[tf.Tensor]:
    """Broadcast into the variables' own memory; returns their new values."""
    inner = [as_variable(v) for v in variables]
    if not all(_in_place(v) for v in inner):
        return [v.assign(broadcast(v, root_rank, process_set=process_set)) for v in inner]
    done = _ops.MPI_LIB.horovod_broadcast_inplace_resource(
        [v.handle for v in inner],
        variable_names=[f"{i}_{stable_name(v)}" for i, v in enumerate(inner)],  # two of a name would be one message
        name=name,
        root_rank=root_rank,
        process_set_id=process_set.process_set_id,
    )
    with tf.control_dependencies([done] if done is not None else []):
        return [v.read_value() for v in inner]


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


def _in_place(variable: tf.Variable) -> bool:
    """Whether Horovod can receive into its memory."""
    resource = getattr(variable, "handle", None) is not None
    return resource and variable.dtype in _RECEIVED_IN_PLACE


def _into_place(variables: list[tf.Variable], root_rank: int, process_set: ProcessSet) -> list[Any]:
    direct = [v for v in variables if _in_place(v)]
    others = [v for v in variables if not _in_place(v)]
    values = broadcast_(direct, root_rank, process_set=process_set) if direct else []
    return [*values, *broadcast_packed(others, root_rank, process_set)]
