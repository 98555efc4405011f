"""How buckets travel to those who update them, and updated weights back: twin of the carriers of ``hvdscale.torch``."""

from __future__ import annotations

from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from hvdscale.keras.backend import verbs
from hvdscale.keras.plan import Distribution
from hvdscale.update import Bucket

__all__ = ["Carrier", "carrier_of"]


class Carrier(Protocol):
    """In a graph these are operations of it."""

    def reduce(self, flat: Any, bucket: Bucket, name: str) -> Any:
        """This rank's share of the sum (or mean) of ``flat``, [size of the bucket], over ranks."""
        ...

    def spread(self, share: Any, bucket: Bucket, name: str) -> Any:
        """All ranks' shares, [size of the bucket]."""
        ...


def carrier_of(update: str, plan: Distribution) -> Carrier:
    """The carrier of this update."""
    return (_Centre if update == "central" else _Slices)(plan)


class _Slices:
    """Reduce-scatter, then all-gather."""

    def __init__(self, plan: Distribution) -> None:
        self._plan = plan
        self._set = plan.process_set

    def reduce(self, flat: Any, bucket: Bucket, name: str) -> Any:
        packed, context = self._plan.compression.compress(flat)
        share = verbs.slice_of_sum(packed, self._plan.reduction, self._set, name)
        return self._plan.compression.decompress(self._forward(share, name), context)

    def _forward(self, slice_of_sum: Any, name: str) -> Any:
        """From one rank's N-th of the sum to the share of the bucket it updates."""
        return slice_of_sum

    def spread(self, share: Any, bucket: Bucket, name: str) -> Any:
        return verbs.gather_slices_of(share, self._set, name)


class _Centre(_Slices):
    """Reduce-scatter and a gather on the first rank, together as many bytes as a ring sends; then a broadcast."""

    def _forward(self, slice_of_sum: Any, name: str) -> Any:
        rows = np.zeros(self._set.size(), np.int32)
        rows[0] = int(slice_of_sum.shape[0])
        return verbs.send_slices(slice_of_sum, rows, self._set, f"{name}.centre")

    def spread(self, share: Any, bucket: Bucket, name: str) -> Any:
        centre = self._set.rank() == 0
        whole = share if centre else ops.zeros((bucket.size,), keras.backend.standardize_dtype(share.dtype))
        return verbs.hand_out(whole, (self._set.ranks or [0])[0], self._set, name)
