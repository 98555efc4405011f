"""The metrics of an optimizer's agreement as scalars to plot."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["scalars"]


def scalars(metrics: Mapping[str, float]) -> dict[str, float]:
    """``sync/drift``, ``sync/bytes_sent``, ...: what there is so far, without what nobody told (NaN)."""
    return {f"sync/{name}": float(value) for name, value in metrics.items() if math.isfinite(value)}
