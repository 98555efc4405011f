"""The exchanges of tensor parallel layers, each with its gradient: Shoeybi et al., arXiv 1909.08053, section 3.

All ranks of a team compute the same loss. Where a whole activation enters a split layer the gradients of its parts are
added up (``enter``, Megatron's f); where parts leave, they are (``leave``, Megatron's g). Eagerly and in graphs, where
exchanges are made one after another, in the order in which they were traced: the same on every rank.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hvdscale.runtime.team import Team

__all__ = ["enter", "exchanged", "in_turn", "join", "leave", "part_of", "sum_over"]

Sizes = Sequence[int]

# The exchange traced last in a graph: the next one waits for it.
_before: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def in_turn(function: Callable[..., np.ndarray], tensors: Sequence[tf.Tensor], dtype: Any = tf.int32) -> tf.Tensor:
    """``function(arrays of tensors)`` as a tensor of ``dtype``; in a graph after what was traced there before."""
    if tf.executing_eagerly():
        return tf.constant(function(*(t.numpy() for t in tensors)), dtype)
    graph = tf.compat.v1.get_default_graph()
    with tf.control_dependencies([_before[graph]] if graph in _before else []):
        result = tf.numpy_function(function, list(tensors), dtype)
    _before[graph] = result.op
    return result


def exchanged(tensor: tf.Tensor, exchange: Callable[[np.ndarray], np.ndarray], shape: Any = None) -> tf.Tensor:
    """What ``exchange`` makes of the values of ``tensor``, in its dtype; ``shape`` is the result's, or as before."""
    result = in_turn(exchange, [tensor], tensor.dtype)
    result.set_shape(tensor.shape if shape is None else shape)
    return result


def sum_over(tensor: tf.Tensor, team: Team) -> tf.Tensor:
    """The sum over the team, in the dtype of ``tensor``; the same bits on every rank. No gradient."""
    wide = tensor if tensor.dtype in (tf.float32, tf.float64) else tf.cast(tensor, tf.float32)
    return tf.cast(exchanged(wide, team.add), tensor.dtype)


def _together(tensor: tf.Tensor, team: Team, dim: int, sizes: Sizes) -> tf.Tensor:
    """Everyone's part, joined along ``dim``."""

    def everyone(part: np.ndarray) -> np.ndarray:
        shapes = [(*part.shape[:dim], size, *part.shape[dim + 1 :]) for size in sizes]
        return np.concatenate(team.collect(np.ascontiguousarray(part), shapes), dim)

    halves = tf.bitcast(tensor, tf.int16) if tensor.dtype.size == 2 else tensor  # NumPy knows no bfloat16
    whole = [*tensor.shape[:dim], sum(sizes), *tensor.shape[dim + 1 :]]
    return tf.bitcast(exchanged(halves, everyone, whole), tensor.dtype)


def _own(tensor: tf.Tensor, team: Team, dim: int, sizes: Sizes) -> tf.Tensor:
    return tf.split(tensor, list(sizes), dim)[team.rank]


def enter(x: tf.Tensor, team: Team) -> tf.Tensor:
    """A whole activation into a split layer: as it is; its gradients are added over the team."""

    @tf.custom_gradient
    def through(x: tf.Tensor) -> Any:
        return tf.identity(x), lambda gradient: sum_over(gradient, team)

    return through(x) if team.size > 1 else x


def leave(x: tf.Tensor, team: Team) -> tf.Tensor:
    """Partial sums out of a split layer: added over the team; the gradient is everyone's own."""

    @tf.custom_gradient
    def through(x: tf.Tensor) -> Any:
        return sum_over(x, team), tf.identity

    return through(x) if team.size > 1 else x


def join(x: tf.Tensor, team: Team, dim: int, sizes: Sizes) -> tf.Tensor:
    """Parts of ``sizes`` along ``dim`` as one whole; the gradient is that of the own part."""
    dim %= len(x.shape)

    @tf.custom_gradient
    def through(x: tf.Tensor) -> Any:
        return _together(x, team, dim, sizes), lambda gradient: _own(gradient, team, dim, sizes)

    return through(x) if team.size > 1 else x


def part_of(x: tf.Tensor, team: Team, dim: int, sizes: Sizes) -> tf.Tensor:
    """The own part along ``dim`` of a whole activation; the gradients of the parts are put together."""
    dim %= len(x.shape)

    @tf.custom_gradient
    def through(x: tf.Tensor) -> Any:
        return _own(x, team, dim, sizes), lambda gradient: _together(gradient, team, dim, sizes)

    return through(x) if team.size > 1 else x
