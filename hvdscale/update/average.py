"""The plain mean of the ranks' weights: local SGD.

Stich, "Local SGD converges fast and communicates little", arXiv 1805.09767.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.update.outer import Float32s, Slots

__all__ = ["Average"]


@dataclass(frozen=True)
class Average:
    """The anchor becomes the mean of the ranks' weights."""

    @property
    def slots(self) -> tuple[str, ...]:
        return ()

    def step(self, anchor: Float32s, change: Float32s, slots: Slots, lr_ratio: float) -> None:
        np.subtract(anchor, change, out=anchor)
