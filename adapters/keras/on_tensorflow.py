"""The verbs of the Keras adapter on the TensorFlow backend; ``on_torch`` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from tensorflow.python.ops.control_flow_util import GraphOrParentsInXlaContext

import hvdscale.tensorflow as hvd
from hvdscale.sync import Reduction
from hvdscale.tensorflow import sync
from hvdscale.tensorflow.bundles import NESTS
from hvdscale.tensorflow.channel import open_channel, open_post
from hvdscale.tensorflow.kinds import in_kind, kind_of
from hvdscale.tensorflow.messages import exchanges
from hvdscale.tensorflow.metrics import open_writer, write_metrics
from hvdscale.tensorflow.runtime import control, world
from hvdscale.tensorflow.stages import TensorFlowStages as Stages
from hvdscale.tensorflow.sync import op_name
from hvdscale.tensorflow.teams import connect, data_ranks, team_along, tensor_team
from hvdscale.tensorflow.tensor_parallel import enter, exchanged, in_turn, join, leave, part_of, sum_over

__all__ = [
    "NESTS",
    "Stages",
    "after_check",
    "apart_from_compilers",
    "as_dense",
    "broadcast_bytes",
    "compiled",
    "compiled_by_xla",
    "connect",
    "control",
    "data_ranks",
    "draw_from",
    "eager",
    "enter",
    "exchanged",
    "exchanges",
    "forget_values",
    "gather_rows",
    "gather_slices_of",
    "hand_out",
    "hvd",
    "in_kind",
    "initialised",
    "join",
    "kind_of",
    "leave",
    "only_if",
    "op_name",
    "open_channel",
    "open_post",
    "open_writer",
    "pair",
    "part_of",
    "reduce_gradients",
    "run_between_steps",
    "same_random_state",
    "scaled",
    "send_slices",
    "slice_of_sum",
    "sum_over",
    "sum_over_ranks",
    "team_along",
    "tensor",
    "tensor_team",
    "track_parts",
    "value_and_gradients",
    "world",
    "write_metrics",
]

FRAMEWORK = "tensorflow"


@contextmanager
def eager() -> Iterator[None]:
    """What runs inside happens now, once, even while a ``tf.function`` is traced.

    Variables made inside have their values at once, so they are none of those that TensorFlow lifts out of a function.
    Where there are such it traces a second time, and setting up the first step takes twice as long.
    """

    def stays(make: Callable[..., Any], **given: Any) -> Any:
        return make(**{**given, "experimental_enable_variable_lifting": False})

    with tf.init_scope(), tf.variable_creator_scope(stays):
        yield


def initialised(variables: Sequence[Any]) -> bool:
    """Whether values can be read now: not so in the first of the two traces that create variables."""
    with tf.init_scope():
        return all(
            bool(tf.compat.v1.is_variable_initialized(getattr(v, "value", v)))
            if isinstance(getattr(v, "value", v), tf.Variable)
            else True
            for v in variables
        )


def compiled_by_xla() -> bool:
    """Whether the graph being traced will be compiled by XLA, for which Horovod has no kernels."""
    return not tf.executing_eagerly() and bool(GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def apart_from_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` and all it calls as they are, in a ``tf.function`` too; XLA is refused when it is traced.

    AutoGraph would rewrite everything that a step first sets up, for most of a minute, down to what it cannot rewrite.
    """
    kept: Callable[..., Any] = tf.autograph.experimental.do_not_convert(function)
    return kept


def tensor(value: Any) -> Any:
    """A backend tensor of a number, an array, a tensor or a Keras variable."""
    if isinstance(value, tf.IndexedSlices):
        return value
    return tf.convert_to_tensor(value.value if isinstance(value, keras.Variable) else value)


def as_dense(gradient: Any) -> Any:
    """A dense tensor of a gradient that may be ``IndexedSlices``."""
    return tf.convert_to_tensor(gradient)


def scaled(gradient: Any, factor: float) -> Any:
    """``gradient * factor``, sparse or dense."""
    if isinstance(gradient, tf.IndexedSlices):
        values = gradient.values * tf.cast(factor, gradient.values.dtype)
        return tf.IndexedSlices(values, gradient.indices, gradient.dense_shape)
    return gradient * tf.cast(factor, gradient.dtype)


def broadcast_bytes(data: np.ndarray, root_rank: int, process_set: Any, name: str) -> np.ndarray:
    """``data`` (uint8) of ``root_rank``, on every rank of ``process_set``."""
    with tf.init_scope():
        sent = hvd.broadcast(tf.constant(data), root_rank, name=name, process_set=process_set)
        result: np.ndarray = sent.numpy()
        return result


def sum_over_ranks(value: Any, process_set: Any, name: str) -> Any:
    """The sum of a float tensor over ranks."""
    return hvd.allreduce(value, name=name, op=hvd.Sum, process_set=process_set, ignore_name_scope=True)


def slice_of_sum(flat: Any, reduction: Reduction, process_set: Any, name: str) -> Any:
    """[n] of each rank -> [n / ranks], this rank's slice of their sum, or mean."""
    before, after = reduction.scales() if reduction.op == "average" else (1.0, 1.0)
    share = hvd.reducescatter(
        flat,
        op=hvd.Average if reduction.op == "average" else hvd.Sum,
        name=name,
        process_set=process_set,
        ignore_name_scope=True,
        prescale_factor=before,
        postscale_factor=after,
    )
    share.set_shape((flat.shape[0] // process_set.size(),))
    return share


def gather_slices_of(share: Any, process_set: Any, name: str) -> Any:
    """[n] of each rank -> [ranks * n]."""
    return hvd.allgather(share, name=name, process_set=process_set, ignore_name_scope=True)


def send_slices(share: Any, rows: np.ndarray, process_set: Any, name: str) -> Any:
    """``rows[r]`` elements to rank r; what came, one rank's after the other."""
    splits = tf.constant(rows)
    return hvd.alltoall(share, splits, name=name, process_set=process_set, ignore_name_scope=True)[0]


def hand_out(value: Any, root_rank: int, process_set: Any, name: str) -> Any:
    """``value`` of ``root_rank``."""
    return hvd.broadcast(value, root_rank, name=name, process_set=process_set, ignore_name_scope=True)


def gather_rows(row: Any, process_set: Any, name: str) -> Any:
    """``[k]`` of each rank -> ``[ranks, k]``. What depends on this rank's row is summed over all ranks' losses."""
    world_set = process_set.process_set_id == hvd.global_process_set.process_set_id

    @tf.custom_gradient
    def gathered(row: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            total = sum_over_ranks(upstream, process_set, f"{name}.gradient")
            # Asked for when the graph runs: in an elastic job it may have changed by then.
            return total[hvd.rank_op() if world_set else process_set.rank()]

        return hvd.allgather(row[None], name=name, process_set=process_set, ignore_name_scope=True), gradient

    return gathered(row)


def reduce_gradients(gradients: Sequence[Any], reduction: Reduction, **arguments: Any) -> list[Any]:
    """As ``hvdscale.tensorflow``'s, by the given name alone: Keras's scopes hold counters that differ between ranks."""
    return sync.reduce_gradients(gradients, reduction, ignore_name_scope=True, **arguments)


def only_if(condition: Callable[[], bool], change: Callable[[list[Any]], list[Any]], tensors: list[Any]) -> list[Any]:
    """``change(tensors)`` where ``condition()`` holds when the step runs; ``tensors`` elsewhere. ``None`` stays."""
    present = [i for i, t in enumerate(tensors) if t is not None]
    dense = [as_dense(tensors[i]) for i in present]

    def changed() -> list[Any]:
        whole: list[Any] = [None] * len(tensors)
        for i, value in zip(present, dense, strict=True):
            whole[i] = value
        return [as_dense(change(whole)[i]) for i in present]

    holds = tf.numpy_function(lambda: np.bool_(condition()), [], tf.bool)
    holds.set_shape(())
    results = tf.cond(holds, changed, lambda: [tf.identity(t) for t in dense])
    whole = list(tensors)
    for i, value in zip(present, results, strict=True):
        whole[i] = value
    return whole


def run_between_steps(local: Any) -> None:
    """Count a step of ``local``, and meet if it is time to. In a graph: each time it runs.

    A graph knows nothing of variables that Python touches while it runs, and would read them too early. So
    their values are handed out, and come back as results that the graph assigns.
    """
    meets = tf.numpy_function(lambda: np.bool_(local.count()), [], tf.bool)
    meets.set_shape(())

    def meet() -> tf.Tensor:
        variables = [v.value if isinstance(v, keras.Variable) else v for v in local.variables]
        lr = tf.cast(tf.convert_to_tensor(local.learning_rate), tf.float32)
        results = tf.numpy_function(local.meet_on, [lr, *variables], [v.dtype for v in variables])
        assigned = []
        for variable, result in zip(variables, results, strict=True):
            result.set_shape(variable.shape)
            assigned.append(variable.assign(result))
        with tf.control_dependencies(assigned):
            spoilt = tf.numpy_function(lambda: np.bool_(local.spoilt()), [], tf.bool)
        spoilt.set_shape(())
        return tf.cond(spoilt, begin_anew, lambda: tf.constant(0))

    def begin_anew() -> tf.Tensor:
        first = local.first_state
        kinds = [tf.as_dtype(v.dtype) for v in first.variables]
        values = tf.numpy_function(first.values, [], kinds) if kinds else []
        first.take([tf.ensure_shape(value, v.shape) for value, v in zip(values, first.variables, strict=True)])
        return tf.constant(0)

    tf.cond(meets, meet, lambda: tf.constant(0))


def track_parts(layers: Sequence[Any]) -> None:
    """Let the backend know that variables of these layers have other values, of another shape: it asks them itself."""


def same_random_state(team: Any) -> None:
    """Go on from the random state of the team's first rank: Keras draws from its own seeds alone."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as one graph."""
    graph: Callable[..., Any] = tf.function(function, autograph=False, reduce_retracing=True)
    return graph


def draw_from(seed: Any) -> None:
    """What is drawn outside Keras's generators: nothing here."""


def pair(seed: Any) -> Any:
    """The state of a generator that begins at ``seed``."""
    return tf.stack([seed, 0])


def forget_values(layers: Sequence[Any]) -> None:
    """Let go of the values that these layers keep for the backend: none here."""


def value_and_gradients(function: Callable[[], Any], variables: Sequence[Any]) -> tuple[Any, list[Any]]:
    """A number, and its gradients by ``variables``."""
    with tf.GradientTape() as tape:
        value = function()
    return value, tape.gradient(value, [v.value for v in variables])


def after_check(check: Callable[..., Any], result: Any, tensors: Sequence[Any]) -> Any:
    """``result``, once ``check(arrays of tensors)`` has passed; in a graph, each time it runs."""
    passed = in_turn(check, [tf.convert_to_tensor(t) for t in tensors if t is not None])
    with tf.control_dependencies([passed]):
        return tf.nest.map_structure(lambda t: t if t is None else tf.identity(t), result)
