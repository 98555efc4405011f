"""What travels between ranks: tensors out of anything a user hands over, and the dtypes Horovod can send."""

from __future__ import annotations

from typing import Any

import tensorflow as tf
from horovod.tensorflow.compression import Compression

__all__ = ["Compression", "as_tensor", "as_variable", "dense", "from_wire", "gather_form", "to_wire", "wire_dtype"]

# Horovod's TensorFlow operations have no kernel for these when they reduce; the wider type holds every value.
_REDUCED_AS = {tf.bfloat16: tf.float32, tf.int16: tf.int32, tf.uint16: tf.int32}


def wire_dtype(dtype: tf.DType) -> tf.DType:
    """The dtype a reduction over ``dtype`` is carried out in: bfloat16 in float32, short integers in int32."""
    return _REDUCED_AS.get(dtype, dtype)


def to_wire(tensor: tf.Tensor) -> tf.Tensor:
    """``tensor`` in its ``wire_dtype``."""
    return tf.cast(tensor, wire_dtype(tensor.dtype))


def from_wire(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """Back to ``dtype``."""
    return tf.cast(tensor, dtype)


def gather_form(dtype: tf.DType) -> tf.DType:
    """The dtype that moves values of ``dtype`` unchanged where nothing is added up: bfloat16 as its 16 bits."""
    return tf.uint16 if dtype == tf.bfloat16 else dtype


def as_tensor(value: Any) -> tf.Tensor:
    """A dense tensor of a tensor, ``tf.Variable``, Keras variable, array or number."""
    return tf.convert_to_tensor(value)


def as_variable(value: Any) -> tf.Variable:
    """The ``tf.Variable`` behind a Keras variable, or ``value`` itself."""
    if isinstance(value, tf.Variable):
        return value
    inner = getattr(value, "value", None)
    return inner if isinstance(inner, tf.Variable) else value


def dense(gradient: tf.Tensor | tf.IndexedSlices | None) -> tf.Tensor | None:
    """A sparse gradient as a dense tensor; others as they are."""
    return tf.convert_to_tensor(gradient) if isinstance(gradient, tf.IndexedSlices) else gradient
