"""Tensors added up in memory that the ranks of one host share, eagerly and each time a graph runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdscale.runtime.neighbours import Neighbours

__all__ = ["add_up", "travels_near"]

_ALIGNED_BYTES = 64  # what TensorFlow takes from NumPy as it is


def travels_near(tensors: Sequence[tf.Tensor], neighbours: Neighbours | None) -> bool:
    """Whether these are added up in shared memory: float32 and float64 of known shapes, where there is room."""
    if neighbours is None or not all(t.dtype in (tf.float32, tf.float64) for t in tensors):
        return False
    sizes = [(t.shape.num_elements(), t.dtype.size) for t in tensors]
    return bool(tensors) and all(count is not None for count, _ in sizes) and neighbours.fit(sizes)


def add_up(
    tensors: Sequence[tf.Tensor], neighbours: Neighbours, before: float = 1.0, after: float = 1.0
) -> list[tf.Tensor]:
    """The sums over ranks, in order; ``before`` and ``after``: factors for each tensor and for each sum."""

    def run(*arrays: Any) -> list[Any]:
        finish = neighbours.start(arrays, before, after)
        sums = [_empty(array) for array in arrays]
        finish(sums)
        return sums

    if tf.executing_eagerly():
        return [tf.convert_to_tensor(array) for array in run(*(np.asarray(t) for t in tensors))]
    with tf.device("CPU"):
        results = tf.numpy_function(run, list(tensors), [t.dtype for t in tensors])
    for result, tensor in zip(results, tensors, strict=True):
        result.set_shape(tensor.shape)
    return list(results)


def _empty(like: Any) -> Any:
    """A new array of this shape and type whose bytes start where TensorFlow wants them."""
    memory = np.empty(like.nbytes + _ALIGNED_BYTES, np.uint8)
    start = -memory.ctypes.data % _ALIGNED_BYTES
    return memory[start : start + like.nbytes].view(like.dtype).reshape(like.shape)
