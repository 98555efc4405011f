"""The metrics of an optimizer's agreement as scalars to plot."""

from __future__ import annotations

import math
from collections.abc import Mapping

from hvdscale.errors import PlanError

__all__ = ["scalars", "steps_so_far"]


def scalars(metrics: Mapping[str, float]) -> dict[str, float]:
    """``sync/drift``, ``sync/bytes_sent``, ...: what there is so far, without what nobody told (NaN)."""
    return {f"sync/{name}": float(value) for name, value in metrics.items() if math.isfinite(value)}


def steps_so_far(metrics: Mapping[str, float]) -> int:
    """Where on the axis of steps these metrics are. A plan that meets at every step makes a round of each.

    Raises:
        PlanError: they do not count steps.
    """
    count = metrics.get("steps", metrics.get("rounds"))
    if count is None:
        raise PlanError(f"{', '.join(metrics)} of this plan do not count steps. Say write_metrics(..., step=...).")
    return int(count)
