"""A check that all ranks' loaders together handed out an epoch exactly once: one sum of 64 bits over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from hvdscale.data.checks import integer
from hvdscale.data.feed import Feed
from hvdscale.data.types import Int64s
from hvdscale.errors import HvdscaleError, PlanError, StateError

__all__ = ["verify_feed"]


def verify_feed(loader: Any, epoch: int | None, add_over_ranks: Callable[[Int64s], Int64s]) -> None:
    """See ``verify_epoch`` of the adapters. ``add_over_ranks`` adds int64[1] over all ranks, modulo 2**64.

    A rank that has no sum takes part with 0 before it raises its own error: no rank is left waiting.
    """
    feed = getattr(loader, "feed", None)
    if not isinstance(feed, Feed):
        raise PlanError(
            f"An epoch is verified of a loader over a ShardPlan or BalancedPlan; this is a {type(loader).__name__}. "
            "How many records a stream has is not known, so what was lost cannot be."
        )
    own, problem = 0, None
    try:
        epoch = integer("epoch", feed.epoch - 1 if epoch is None else epoch, 0)
        own = feed.reader.certificate(epoch)
    except HvdscaleError as error:
        problem = error
    summed = add_over_ranks(np.array([own], np.uint64).view(np.int64))
    if problem is not None:
        raise problem
    found, expected = int(summed.view(np.uint64)[0]), feed.plan.certificate()
    if found != expected:
        raise StateError(
            f"Epoch {epoch} was not read exactly once: the sum over the samples that all ranks read is {found:#018x}, "
            f"that of {feed.plan.n} samples {expected:#018x} (this rank's part: {own:#018x}). A sample was left out or "
            "read twice: the epoch is not over on every rank, or a state was lost, stale or used twice."
        )
