"""What travels between ranks: tensors out of anything a user hands over, and the dtypes Horovod can send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from horovod.tensorflow.compression import Compression

__all__ = [
    "Compression",
    "as_tensor",
    "as_variable",
    "by_dtype",
    "dense",
    "from_wire",
    "to_wire",
    "when_run",
    "wire_dtype",
]

# Horovod's TensorFlow operations have no kernel for these; the wider type holds every value exactly.
_SENT_AS = {tf.bfloat16: tf.float32, tf.int16: tf.int32, tf.uint16: tf.int32}


def wire_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype ``dtype`` is sent and added up in: bfloat16 in float32, short integers in int32."""
    return _SENT_AS.get(dtype, dtype)


def to_wire(tensor: Any) -> tf.Tensor:
    """``tensor`` (a Keras variable, an array and a number too) in its ``wire_dtype``."""
    tensor = as_tensor(tensor)
    return tf.cast(tensor, wire_dtype(tensor.dtype))


def when_run(message: Sequence[tf.Tensor]) -> list[tf.Tensor]:
    """The tensors of one message, which is sent each time the graph runs.

    Horovod's operations look pure to TensorFlow: it would run one whose tensors are all constants once, while it
    prepares the graph, and keep the result. Other ranks, whose tensors are none, would wait for it at every step. So
    the first tensor is sliced from a place that is known only when the graph runs: its head. No bytes are copied.
    """
    if tf.executing_eagerly() or not message:
        return list(message)
    first, *others = message
    zero = tf.raw_ops.Empty(shape=[], dtype=tf.int32, init=True)  # nobody runs it ahead of time
    if first.shape.rank == 0:
        held = tf.gather(tf.reshape(first, [1]), zero)
    elif first.shape.rank is None:
        held = tf.reshape(first, tf.shape(first) + zero)
    else:  # no reshape: the new shape of a vector follows from its length, and TensorFlow would see through it
        held = first[zero:]
    held.set_shape(first.shape)
    return [held, *others]


def from_wire(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Back to ``dtype``."""
    return tf.cast(tensor, dtype)


def as_tensor(value: Any) -> tf.Tensor:
    """A dense tensor of a tensor, ``tf.Variable``, Keras variable, array or number."""
    return tf.convert_to_tensor(value)


def as_variable(value: Any) -> Any:
    """The ``tf.Variable`` behind a Keras variable; anything else as it is."""
    if isinstance(value, tf.Variable):
        return value
    inner = getattr(value, "value", None)
    return inner if isinstance(inner, tf.Variable) else value


def dense(gradient: tf.Tensor | tf.IndexedSlices | None) -> tf.Tensor | None:
    """A sparse gradient as a dense tensor; others as they are."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient


def by_dtype(tensors: list[tf.Tensor]) -> Iterator[tuple[tf.DType, list[int]]]:
    """``(dtype, positions of the tensors that have it)``, in order of first appearance: a message has one dtype."""
    positions: dict[tf.DType, list[int]] = {}
    for i, tensor in enumerate(tensors):
        positions.setdefault(tensor.dtype, []).append(i)
    yield from positions.items()
