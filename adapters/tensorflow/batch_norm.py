"""Batch normalisation over the batches of all ranks.

Ioffe and Szegedy, "Batch Normalization", arXiv 1502.03167; moments merged as Chan, Golub and LeVeque (1979).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from horovod.tensorflow import mpi_ops as _ops

from hvdscale.errors import PlanError
from hvdscale.tensorflow.messages import exchanges

__all__ = ["SyncBatchNormalization"]

# Layers are numbered when they first exchange, which all ranks do in the same order, whatever each has built before.
_exchanging = itertools.count()


@keras.saving.register_keras_serializable(package="hvdscale")
class SyncBatchNormalization(keras.layers.BatchNormalization):
    """``keras.layers.BatchNormalization`` with the mean and variance of the batches of all ranks together.

    Batches may differ in size, also be empty. The result and the gradients equal those of one process
    with the whole batch. In inference it is the plain layer. Needs the TensorFlow backend of Keras.

    Raises:
        PlanError: ``fused=True``, which has no synchronised form.
    """

    def __init__(self, fused: bool = False, **kwargs: Any) -> None:
        if fused or fused is None:
            raise PlanError("SyncBatchNormalization has no fused form. Leave fused out.")
        if keras.backend.backend() != "tensorflow":
            raise PlanError(
                f"hvdscale.tensorflow.SyncBatchNormalization needs the TensorFlow backend of Keras, "
                f"which runs on {keras.backend.backend()!r}. Set KERAS_BACKEND=tensorflow."
            )
        super().__init__(**kwargs)
        self._ordinal: int | None = None

    def _moments(self, inputs: tf.Tensor, mask: tf.Tensor | None) -> tuple[tf.Tensor, tf.Tensor]:
        if not exchanges():
            return super()._moments(inputs, mask)
        count, mean, variance = _local_moments(inputs, mask, self._reduction_axes)  # [], [c], [c]
        row = tf.concat([[count], mean, variance], 0)  # [1 + 2c]
        if self._ordinal is None:
            self._ordinal = next(_exchanging)
        everyone = _gather_rows(row, f"sync_batch_normalization.{self._ordinal}")  # [ranks, 1 + 2c]
        counts, means, variances = tf.split(everyone, [1, mean.shape[0], mean.shape[0]], axis=1)
        share = tf.math.divide_no_nan(counts, tf.reduce_sum(counts))  # [ranks, 1]
        mean = tf.reduce_sum(share * means, 0)
        variance = tf.reduce_sum(share * (variances + tf.square(means - mean)), 0)
        return mean, variance


def _local_moments(
    inputs: tf.Tensor, mask: tf.Tensor | None, axes: list[int]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Number of values per channel, their mean and variance; zeros where there are none."""
    if mask is None:
        weights = tf.ones([1] * len(inputs.shape), inputs.dtype)
        count = tf.cast(tf.reduce_prod(tf.gather(tf.shape(inputs), axes)), inputs.dtype)
    else:  # one axis less than the inputs
        weights = tf.cast(mask, inputs.dtype)[..., None]
        count = tf.reduce_sum(weights)
    mean = tf.math.divide_no_nan(tf.reduce_sum(weights * inputs, axes, keepdims=True), count)
    variance = tf.math.divide_no_nan(tf.reduce_sum(weights * tf.square(inputs - mean), axes), count)
    return count, tf.reshape(mean, [-1]), variance


def _gather_rows(row: tf.Tensor, name: str) -> tf.Tensor:
    """``[k]`` of each rank -> ``[ranks, k]``. What depends on this rank's row is summed over all ranks' losses.

    Names leave out Keras's scopes, whose counters may differ between ranks.
    """

    @tf.custom_gradient
    def gathered(row: tf.Tensor) -> tuple[tf.Tensor, Callable[[tf.Tensor], tf.Tensor]]:
        def gradient(upstream: tf.Tensor) -> tf.Tensor:
            total = _ops._allreduce(upstream, op=_ops.Sum, name=f"{name}.gradient", ignore_name_scope=True)
            return total[_ops.rank_op()]

        return _ops.allgather(row[None], name=name, ignore_name_scope=True), gradient

    return gathered(row)
