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

    Ranks may have batches of different sizes: every sample counts the same. Gradients flow through the shared
    statistics.

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
        mean, variance = super()._moments(inputs, mask)  # [channels], [channels] of this rank
        ranks = self._process_set
        if verbs.world().size == 1 or not ranks.included() or ranks.size() == 1:
            return mean, variance
        samples = ops.size(inputs) / inputs.shape[self.axis] if mask is None else ops.sum(ops.cast(mask, mean.dtype))
        count = ops.reshape(ops.cast(samples, mean.dtype), (1,))
        own = ops.where(count > 0, ops.concatenate([count, mean, variance]), 0.0)  # [1 + 2 channels]
        # A gather with a gradient: every rank adds its row to zeros.
        mine = ops.reshape(ops.one_hot(ranks.rank(), ranks.size(), dtype=mean.dtype), (-1, 1))
        if self._ordinal is None:
            self._ordinal = next(_exchanging)
        # [ranks, 1 + 2 channels]
        rows = verbs.sum_over_ranks(mine * own, ranks, f"sync_batch_normalization.{self._ordinal}")
        channels = inputs.shape[self.axis]
        counts, means, variances = rows[:, :1], rows[:, 1 : 1 + channels], rows[:, 1 + channels :]
        share = counts / ops.sum(counts)  # [ranks, 1]
        mean = ops.sum(share * means, axis=0)
        return mean, ops.sum(share * (variances + ops.square(means - mean)), axis=0)
