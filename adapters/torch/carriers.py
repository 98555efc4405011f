"""How buckets travel to those who update them, and updated weights back to everyone: Horovod's collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import horovod.torch as _horovod
import torch
from horovod.torch import ProcessSet
from torch import Tensor

from hvdscale.sync import Reduction
from hvdscale.torch.gradients import HOROVOD_OPS
from hvdscale.torch.handles import wait
from hvdscale.torch.wire import from_wire, movable, reducible
from hvdscale.update import Bucket

__all__ = ["Arrival", "Carrier", "carrier_of"]

Arrival = Callable[[], Callable[[], Tensor]]
"""Two waits: the first may start a second message, so that those of all buckets travel together."""


class Carrier(Protocol):
    """Both start at once and are awaited later; in the same order on every rank."""

    sent_bytes: int

    def reduce(self, flat: Tensor, bucket: Bucket, name: str) -> Arrival:
        """This rank's share of the sum (or mean) of ``flat``, [size of the bucket], over ranks."""
        ...

    def spread(self, share: Tensor, bucket: Bucket, name: str) -> Callable[[], Tensor]:
        """All ranks' shares, [size of the bucket]."""
        ...


def carrier_of(update: str, reduction: Reduction, compression: Any, process_set: ProcessSet) -> Carrier:
    """The carrier of this update."""
    return (_Centre if update == "central" else _Slices)(reduction, compression, process_set)


class _Slices:
    """Reduce-scatter, then all-gather."""

    def __init__(self, reduction: Reduction, compression: Any, process_set: ProcessSet) -> None:
        self._op = HOROVOD_OPS[reduction.op]
        self._scales = reduction.scales() if reduction.op == "average" else (1.0, 1.0)
        self._compression = compression
        self._process_set = process_set
        self._ranks = process_set.size()
        self.sent_bytes = 0

    def reduce(self, flat: Tensor, bucket: Bucket, name: str) -> Arrival:
        packed, context = self._compression.compress(flat)
        handle = _horovod.reducescatter_async(reducible(packed), name, self._op, self._process_set, *self._scales)
        self.sent_bytes += packed.nbytes * (self._ranks - 1) // self._ranks

        def arrive() -> Callable[[], Tensor]:
            share = self._forward(wait(handle), name)
            return lambda: self._compression.decompress(from_wire(share(), packed), context)

        return arrive

    def _forward(self, slice_of_sum: Tensor, name: str) -> Callable[[], Tensor]:
        """From one rank's N-th of the sum to the share of the bucket it updates."""
        return lambda: slice_of_sum

    def spread(self, share: Tensor, bucket: Bucket, name: str) -> Callable[[], Tensor]:
        handle = _horovod.allgather_async(movable(share), name, self._process_set)
        self.sent_bytes += share.nbytes * (self._ranks - 1)
        return lambda: from_wire(wait(handle), share)


class _Centre(_Slices):
    """Reduce-scatter and a gather on the first rank, together as many bytes as a ring sends; then a broadcast."""

    def _forward(self, slice_of_sum: Tensor, name: str) -> Callable[[], Tensor]:
        rows = torch.zeros(self._ranks, dtype=torch.int32, device="cpu")
        rows[0] = slice_of_sum.numel()
        handle = _horovod.alltoall_async(slice_of_sum, rows, f"{name}.centre", self._process_set)
        if self._process_set.rank() != 0:
            self.sent_bytes += slice_of_sum.nbytes
        return lambda: wait(handle)[0]

    def spread(self, share: Tensor, bucket: Bucket, name: str) -> Callable[[], Tensor]:
        centre = self._process_set.rank() == 0
        whole = share if centre else torch.empty(bucket.size, dtype=share.dtype, device=share.device)
        root = (self._process_set.ranks or [0])[0]
        handle = _horovod.broadcast_async_(movable(whole), root, name, self._process_set)
        self.sent_bytes += whole.nbytes * (self._ranks - 1) if centre else 0
        return lambda: from_wire(wait(handle), whole)
