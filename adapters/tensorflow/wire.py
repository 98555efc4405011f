"""What travels between ranks: tensors out of anything a user hands over, and the dtypes Horovod can send."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow as tf
from horovod.tensorflow.compression import Compression

__all__ = ["Compression", "as_tensor", "as_variable", "by_dtype", "dense", "from_wire", "to_wire", "wire_dtype"]

# Horovod's TensorFlow operations have no kernel for these; the wider type holds every value exactly.
_SENT_AS = {tf.bfloat16: tf.float32, tf.int16: tf.int32, tf.uint16: tf.int32}


def wire_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype ``dtype`` is sent and added up in: bfloat16 in float32, short integers in int32."""
    return _SENT_AS.get(dtype, dtype)


def to_wire(tensor: Any) -> tf.Tensor:
    """``tensor`` (a Keras variable, an array and a number too) in its ``wire_dtype``, ready to be sent.

    In a graph it is hidden from constant folding: Horovod's operations look pure to TensorFlow, which would
    run those on constants while it optimises the graph, on each rank in an order of its own.
    """
    tensor = as_tensor(tensor)
    tensor = tf.cast(tensor, wire_dtype(tensor.dtype))
    if tf.executing_eagerly():
        return tensor
    return tf.compat.v1.placeholder_with_default(tensor, tensor.shape)


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
