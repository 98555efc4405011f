"""``verify_epoch``: did all ranks together read an epoch exactly once?"""

from __future__ import annotations

from typing import Any

import horovod.tensorflow as _horovod
import tensorflow as tf

from hvdscale.data import verify_feed
from hvdscale.data.types import Int64s

__all__ = ["verify_epoch"]


def verify_epoch(loader: Any, epoch: int | None = None) -> None:
    """Check that all ranks together have read each sample of an epoch exactly once. All ranks call it, one integer
    of 64 bits is summed.

    What was read before ``resume`` counts, and so do the samples that tail ``"drop"`` leaves out.

    Args:
        loader: what ``shard_dataset`` returned for a ``ShardPlan`` or ``BalancedPlan``.
        epoch: which epoch, one of the last 64; default: the last one that is over.

    Raises:
        StateError: on every rank, if a sample was left out or read twice; it gives the sum found and the one expected.
        PlanError: a loader of a stream, or no epoch is over yet.
    """
    verify_feed(loader, epoch, _add)


def _add(part: Int64s) -> Int64s:
    total: Int64s = _horovod.allreduce(tf.constant(part), op=_horovod.Sum, name="hvdscale.verify_epoch").numpy()
    return total
