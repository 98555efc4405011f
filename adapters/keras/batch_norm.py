"""Batch normalisation over the batches of all ranks, on CPU or GPU, in one message each way.

Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
"""

from __future__ import annotations

import itertools
from typing import Any

import keras
from keras import ops

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs

__all__ = ["SyncBatchNormalization"]

# Layers are numbered when they first exchange, which all ranks do in the same order, whatever each has built before.
_exchanging = itertools.count()


@keras.saving.register_keras_serializable("hvdscale")
class SyncBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """``keras.layers.BatchNormalization`` whose mean and variance in training are those of all ranks' batches.

    Ranks may have batches of different sizes, also none: every sample counts the same. The result and the gradients
    equal those of one process with the whole batch. In inference it is the plain layer.

    Args:
        fused: accepted as Horovod does; ``True`` is refused.
        process_set: ranks whose batches count as one.
        kwargs: the arguments of ``keras.layers.BatchNormalization``.

    Raises:
        PlanError: ``fused=True``.
    """

    def __init__(self, fused: bool = False, *, process_set: Any = verbs.hvd.global_process_set, **kwargs: Any) -> None:
        if fused in (True, None):
            raise PlanError("A fused kernel cannot share its statistics between ranks. Leave fused out.")
        super().__init__(**kwargs)
        self._process_set = process_set
        self._ordinal: int | None = None

    def _moments(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        ranks = self._process_set
        if not verbs.exchanges(ranks):
            moments: tuple[Any, Any] = super()._moments(inputs, mask)
            return moments
        row = _row_of_moments(inputs, mask, self.axis, self._reduction_axes)
        if self._ordinal is None:
            self._ordinal = next(_exchanging)
        rows = verbs.gather_rows(row, ranks, f"sync_batch_normalization.{self._ordinal}")  # [ranks, 1 + 2 channels]
        channels = inputs.shape[self.axis]
        counts, means, variances = rows[:, :1], rows[:, 1 : 1 + channels], rows[:, 1 + channels :]
        share = counts / ops.maximum(ops.sum(counts), 1)  # [ranks, 1]
        mean = ops.sum(share * means, axis=0)
        return mean, ops.sum(share * (variances + ops.square(means - mean)), axis=0)


def _row_of_moments(inputs: Any, mask: Any, axis: int, others: list[int]) -> Any:
    """``[1 + 2 channels]``: how many values a channel has on this rank, the means, the variances; zeros of none."""
    weights = None if mask is None else ops.expand_dims(ops.cast(mask, inputs.dtype), -1)
    values = ops.size(inputs) // inputs.shape[axis] if weights is None else ops.sum(weights)
    count = ops.reshape(ops.cast(values, inputs.dtype), (1,))
    divisor = ops.maximum(count, 1)  # of a sum over nothing, which is zero

    def mean_of(tensor: Any) -> Any:
        return ops.reshape(ops.sum(tensor if weights is None else weights * tensor, others), (-1,)) / divisor

    mean = mean_of(inputs)  # [channels]
    spread = [-1 if i == axis % len(inputs.shape) else 1 for i in range(len(inputs.shape))]
    return ops.concatenate([count, mean, mean_of(ops.square(inputs - ops.reshape(mean, spread)))])
