"""A fragment without an anchor: each rank has weights of its own, and hears those of its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import LEAST, Header, Meeting, Phase
from hvdscale.sync.part import Departure, Found, Part, square_in_float64
from hvdscale.sync.push_sum import Neighbours
from hvdscale.sync.tensors import Tensors
from hvdscale.update.outer import Float32s

__all__ = ["Peer"]


class Peer(Part):
    """``mass`` is how much this rank counts in the mean of all."""

    exchange: Neighbours

    def __init__(self, fragment: Fragment, weights: Tensors, exchange: Neighbours) -> None:
        super().__init__(fragment, weights, exchange)
        self.begin()

    def numbers(self) -> dict[str, Any]:
        names = ("mass", "apart", "spread", "heard")
        return {**super().numbers(), **{name: getattr(self, name) for name in names}}

    def load_numbers(self, saved: Mapping[str, Any]) -> None:
        super().load_numbers({"heard": saved["spread"], **saved})  # not in states of older versions

    @property
    def heard(self) -> float:
        """``spread`` as of a round whose answer may still be under way."""
        return self.exchange.spread

    @heard.setter
    def heard(self, spread: float) -> None:
        self.exchange.spread = spread

    def begin(self) -> None:
        self.mass = 1.0
        self.apart = False  # there were rounds since all ranks held the same
        self.spread = 0.0
        if self.rounding is not None:
            self.rounding[:] = 0

    def probe(self, resumed: bool) -> tuple[float, float]:
        return (0.0, 0.0) if resumed else super().probe(resumed)  # later each rank has its own

    def weight(self, phase: Phase) -> float:
        if phase is Phase.FINISHING and not self.apart and not self.since:
            return LEAST
        return max(self.mass, LEAST)

    def depart(self, out: Float32s, travels: bool) -> Departure:
        square = 0.0
        for run in self.runs:
            self._read(run, out)
            square += sum(float(np.dot(out[piece], out[piece])) for piece, _ in run.pieces)
        if not np.isfinite(square):
            square = square_in_float64(out)
        if not np.isfinite(square):
            out[:] = 0
            return Departure(out, None, False, self.spread)
        return Departure(out, out.copy() if travels else None, True, self.spread)

    def arrive(self, departure: Departure, meeting: Meeting, lr: float) -> Found:
        mixed, norm = departure.values, 0.0
        now = None if departure.weights is None else np.empty_like(mixed)
        mass = self.exchange.mass(meeting)
        for run in self.runs:
            for piece, _ in run.pieces:
                norm += float(np.dot(mixed[piece], mixed[piece]))
            if departure.weights is not None and now is not None:  # what was learnt while it travelled stays
                self._read(run, now)
                for piece, _ in run.pieces:
                    now[piece] -= departure.weights[piece]
                    mixed[piece] += now[piece]
            if mass or departure.finite:
                self._write(run, mixed)
        self.mass, self.apart, self.spread = mass, not meeting.finishing, self.exchange.spread
        # What the ranks found at the round before, so that all say the same.
        relative = meeting.mean_square
        return Found(relative * norm, relative**0.5)

    def finish(self) -> None:
        """The last round of everyone has written the mean of all."""

    def shared(self) -> Float32s:
        """The mean of all ranks now, which keep their own. Collective."""
        values = np.empty(self.fragment.size, np.float32)
        departure = self.depart(values, travels=False)
        mass = self.weight(Phase.ASKING)
        row = Header(0, 0, Phase.ASKING, 0, mass, departure.finite, 0.0, float("nan"), 0)
        self.exchange.mean_of_all(values, row)
        return values
