"""A gradient as the kind that all ranks send: nothing, rows or a dense tensor."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdscale.sync import Kind
from hvdscale.tensorflow.wire import as_variable

__all__ = ["Gradient", "in_kind", "kind_of"]

Gradient = tf.Tensor | tf.IndexedSlices | None


def kind_of(gradient: Gradient) -> Kind:
    """What this gradient is."""
    if gradient is None:
        return Kind.NONE
    return Kind.SPARSE if isinstance(gradient, tf.IndexedSlices) else Kind.DENSE


def in_kind(gradient: Gradient, variable: Any, kind: Kind) -> Gradient:
    """``gradient`` of ``variable`` turned into ``kind``, which is no less than its own; its value stays."""
    if kind_of(gradient) == kind:
        return gradient
    if kind is Kind.DENSE:
        return _zeros(variable) if gradient is None else tf.convert_to_tensor(gradient)
    if gradient is None:
        gradient = _zeros(variable)[:0]
        length = tf.shape(as_variable(variable), out_type=tf.int64)
        return tf.IndexedSlices(gradient, tf.zeros([0], tf.int64), length)
    length = tf.shape(gradient, out_type=tf.int64)
    return tf.IndexedSlices(gradient, tf.range(length[0]), length)


def _zeros(variable: Any) -> tf.Tensor:
    variable = as_variable(variable)
    shape = tf.TensorShape(variable.shape)
    return tf.zeros(shape if shape.is_fully_defined() else tf.shape(variable), variable.dtype)
