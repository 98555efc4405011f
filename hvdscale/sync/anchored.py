"""A fragment with an anchor: the weights all ranks share, which an outer optimizer moves once a round."""

from __future__ import annotations

from typing import Any

import numpy as np

from hvdscale.sync.exchange import Exchange
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Meeting, Phase
from hvdscale.sync.part import Departure, Found, Part, Run, probe, square_in_float64
from hvdscale.sync.tensors import Tensors
from hvdscale.update import Outer
from hvdscale.update.outer import Float32s

__all__ = ["Anchored"]


class Anchored(Part):
    """Ranks send the pseudo-gradient, ``anchor`` minus their weights, and adopt the new anchor.

    Args:
        mixing: 1 adopts the anchor, less goes part of the way.
    """

    def __init__(
        self, fragment: Fragment, weights: Tensors, exchange: Exchange, outer: Outer, mixing: float = 1.0
    ) -> None:
        super().__init__(fragment, weights, exchange)
        self._outer = outer
        self._mixing = np.float32(mixing)
        self.anchor = np.empty(fragment.size, np.float32)
        self.begin()
        self.slots = {name: np.zeros_like(self.anchor) for name in outer.slots}
        self.lr = 0.0  # the inner learning rate at the last round

    def arrays(self) -> dict[str, Float32s]:
        slots = {f"outer.{name}": array for name, array in self.slots.items()}
        return {"anchor": self.anchor, **slots, **super().arrays(), **self.exchange.arrays()}

    def numbers(self) -> dict[str, Any]:
        return {**super().numbers(), "lr": self.lr}

    def begin(self) -> None:
        if self.rounding is not None:
            self.rounding[:] = 0
        self.read(self.anchor)

    def weight(self, phase: Phase) -> float:
        return self.since

    def probe(self, resumed: bool) -> tuple[float, float]:
        return probe(self.anchor)

    def depart(self, out: Float32s, travels: bool) -> Departure:
        weights = np.empty_like(out) if travels or self._mixing < 1 else None
        square = 0.0
        for piece, own in self.own(out):
            if weights is not None:
                weights[piece] = own
            change = np.subtract(self.anchor[piece], own, out=out[piece])
            square += float(np.dot(change, change))
        if not np.isfinite(square):
            square = square_in_float64(out)
        if np.isfinite(square):
            return Departure(out, weights, True, square)
        out[:] = 0
        return Departure(out, None, False, 0.0)

    def arrive(self, departure: Departure, meeting: Meeting, lr: float) -> Found:
        mean, ratio = departure.values, lr / self.lr if self.lr > 0 else 1.0
        mean_square = anchor_square = 0.0
        factor = self.exchange.factor(meeting)
        for run in self.runs:
            here = self._view(run, writes=True) if departure.weights is None else None
            for piece, inside in run.pieces:
                change, anchor = mean[piece], self.anchor[piece]
                if factor != 1:
                    change *= factor
                mean_square += float(np.dot(change, change))
                self._outer.step(anchor, change, {name: slot[piece] for name, slot in self.slots.items()}, ratio)
                anchor_square += float(np.dot(anchor, anchor))
                if here is not None:
                    here[inside] = anchor
            if departure.weights is not None:
                self._merge(run, departure.weights, mean)
            elif here is None:
                self._write(run, self.anchor)
        self.lr = lr
        distance = max(0.0, meeting.mean_square - mean_square)
        return Found(distance, (distance / anchor_square) ** 0.5 if anchor_square else 0.0)

    def take(self, mean: Float32s, factor: np.float32) -> None:
        """Hold the weights that lie ``factor * mean`` before the anchor, which stays; overwrites ``mean``."""
        for run in self.runs:
            for piece, _ in run.pieces:
                moved = mean[piece]
                moved *= factor
                np.subtract(self.anchor[piece], moved, out=moved)
            self._write(run, mean)

    def restore(self) -> bool:
        values = np.empty_like(self.anchor)
        self.read(values)
        if np.isfinite(values).all():
            return False
        for run in self.runs:
            self._write(run, self.anchor)
        self.samples = self.since = 0.0  # nothing was learnt
        return True

    def finish(self) -> None:
        for run in self.runs:  # merging had rounded
            self._write(run, self.anchor)

    def shared(self) -> Float32s:
        return self.anchor

    def _merge(self, run: Run, departed: Float32s, now: Float32s) -> None:
        """``weights + mixing * (anchor - departed)``: what was learnt while the fragment travelled stays."""
        self._read(run, now)
        for piece, _ in run.pieces:
            now[piece] += self._mixing * (self.anchor[piece] - departed[piece])
        self._write(run, now)
