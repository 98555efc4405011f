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

_LAST_EPOCH = 2**31  # squares of epochs are summed over ranks


def verify_feed(loader: Any, epoch: int | None, add_over_ranks: Callable[[Int64s], Int64s]) -> None:
    """See ``verify_epoch`` of the adapters. ``add_over_ranks`` adds int64[5] over all ranks, modulo 2**64.

    A rank that has no sum takes part all the same, before it raises its own error: no rank is left waiting.
    """
    feed = getattr(loader, "feed", None)
    if not isinstance(feed, Feed):
        raise PlanError(
            f"An epoch is verified of a loader over a ShardPlan or BalancedPlan; this is a {type(loader).__name__}. "
            "How many records a stream has is not known, so what was lost cannot be."
        )
    own, at, problem = 0, feed.epoch - 1, None
    try:
        if epoch is not None:
            at = integer("epoch", epoch, 0, _LAST_EPOCH)
        if at >= 0:
            own = feed.reader.certificate(at)
    except HvdscaleError as error:
        problem = error
    said = np.array([own, 1, problem is not None, at % 2**64, at * at], np.uint64)
    found, ranks, failed, epochs, squares = map(int, add_over_ranks(said.view(np.int64)).view(np.uint64))
    if problem is not None:
        raise problem
    if failed:
        raise StateError(f"{failed} of {ranks} ranks have no sum of an epoch to add; what they say tells why.")
    if (ranks * squares - epochs * epochs) % 2**64:  # it is 0 for equal numbers only
        raise StateError(
            f"All ranks verify one epoch; here it is {'none yet' if at < 0 else at}, on another rank it is not. Call "
            "verify_epoch when every rank has come to the end of the epoch, or give epoch=."
        )
    if at < 0:
        raise PlanError("An epoch is verified when it is over; none is yet. Iterate the loader to its end first.")
    expected = feed.plan.certificate()
    if found != expected:
        raise StateError(
            f"Epoch {at} was not read exactly once: the sum over the samples that all ranks read is {found:#018x}, "
            f"that of {feed.plan.n} samples {expected:#018x} (this rank's part: {own:#018x}). A sample was left out or "
            "read twice: the epoch is not over on every rank, or a state was lost, of another run or used twice."
        )
