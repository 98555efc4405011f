"""What batches look like to ``tf.data``: their structure, types and shapes, known before the first is made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdscale.errors import PlanError

__all__ = ["Layout", "layout_of"]


class Layout:
    """The structure of batches, and the way from NumPy to tensors and back.

    Args:
        signature: ``tf.TensorSpec`` of a batch, in tuples and dictionaries.

    Raises:
        PlanError: it is something else.
    """

    def __init__(self, signature: Any) -> None:
        specs = tf.nest.flatten(signature)
        if not specs or not all(isinstance(spec, tf.TensorSpec) for spec in specs):
            raise PlanError(f"signature is tf.TensorSpec, in tuples and dictionaries; it is {signature!r:.80}.")
        self.signature = signature
        self.types = [spec.dtype for spec in tf.nest.flatten(signature)]

    def flat(self, batch: Any) -> list[Any]:
        """The arrays of a batch, one behind another, in the types of the signature."""
        tf.nest.assert_same_structure(self.signature, batch)
        parts = zip(tf.nest.flatten(batch), self.types, strict=True)
        return [_texts(part) if kind == tf.string else np.asarray(part, kind.as_numpy_dtype) for part, kind in parts]

    def packed(self, tensors: Sequence[tf.Tensor]) -> Any:
        """Such tensors as a batch, with the shapes of the signature."""
        for tensor, spec in zip(tensors, tf.nest.flatten(self.signature), strict=True):
            tensor.set_shape(spec.shape)
        return tf.nest.pack_sequence_as(self.signature, list(tensors))


def _texts(part: Any) -> np.ndarray:
    """Strings as TensorFlow holds them: bytes, text in UTF-8."""
    array = np.asarray(part)
    return np.char.encode(array, "utf-8") if array.dtype.kind == "U" else array


def layout_of(signature: Any, example: Callable[[], Any], batch_size: int | None) -> Layout:
    """The layout of ``signature``, or of ``example()``, a batch of one sample, at any or this batch size.

    Raises:
        PlanError: there is no sample to see it by, or it holds what no tensor can.
    """
    if signature is not None:
        return Layout(signature)
    return Layout(tf.nest.map_structure(lambda part: _spec_of(part, batch_size), example()))


def _spec_of(part: Any, batch_size: int | None) -> tf.TensorSpec:
    array = np.asarray(part)
    try:
        kind = tf.as_dtype(array.dtype)
    except TypeError:
        raise PlanError(
            f"Batches hold numbers or strings; this data has {array.dtype}. Convert it with collate=..., a function "
            "that makes arrays of it."
        ) from None
    if not array.ndim:
        raise PlanError(f"collate makes arrays whose first axis is the batch; it made {part!r}.")
    return tf.TensorSpec((batch_size, *array.shape[1:]), kind)
