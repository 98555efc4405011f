"""What a rank keeps of one fragment between rounds, and the arithmetic before and after an exchange."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.runtime.channel import Channel
from hvdscale.sync.exchange import Exchange
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.tensors import Tensors
from hvdscale.sync.wire import Codec
from hvdscale.update import Outer
from hvdscale.update.outer import Float32s, blocks

__all__ = ["Part", "Step"]


@dataclass(frozen=True)
class Step:
    """What a merge found: squared norms of the mean pseudo-gradient and of the anchor."""

    mean_square: float
    anchor_square: float


class Part:
    """One fragment on this rank. All arithmetic is in float32.

    ``anchor``, float32[n], is the same on every rank. Where parameters are kept in fewer bits, ``rounding`` is
    what writing them lost, so that a rank that learnt nothing says so.
    """

    def __init__(self, fragment: Fragment, weights: Tensors, outer: Outer, codec: Codec, channel: Channel) -> None:
        self.fragment = fragment
        self._weights = weights
        self._outer = outer
        self.exchange = Exchange(fragment, codec, channel)
        self.anchor = self._read()
        self.slots = {name: np.zeros_like(self.anchor) for name in outer.slots}
        narrow = any(weights.specs[p].dtype != "float32" for p in fragment.positions)
        self.rounding = np.zeros_like(self.anchor) if narrow else None
        self.lr = 0.0  # the inner learning rate at the last round
        self.steps = 0  # attempted since the last round
        self.samples = 0.0

    def arrays(self) -> dict[str, Float32s]:
        """What belongs into a checkpoint of this rank, by name."""
        slots = {f"outer.{name}": array for name, array in self.slots.items()}
        rounding = {} if self.rounding is None else {"rounding": self.rounding}
        return {"anchor": self.anchor, **slots, **rounding, **self.exchange.arrays()}

    def begin(self) -> None:
        """This rank's weights, now the same on every rank, are the anchor."""
        self._weights.read(self.fragment.positions, self.anchor)
        if self.rounding is not None:
            self.rounding[:] = 0

    def adopt(self) -> None:
        """This rank's weights become the anchor, to the last bit."""
        self._write(self.anchor)

    def departure(self) -> tuple[Float32s, Float32s, float]:
        """``(weights, pseudo-gradient, its sum of squares)``; the pseudo-gradient is zero where it is not finite."""
        weights = self._read()
        if self.rounding is not None:
            weights -= self.rounding
        change = np.subtract(self.anchor, weights)
        square = float(np.dot(change, change))
        if not np.isfinite(square):
            exact = float(np.sum(np.square(change, dtype=np.float64)))  # float32 may have overflowed
            if np.isfinite(exact):
                return weights, change, exact
            change[:] = 0
        return weights, change, square

    def arrival(self, departed: Float32s | None, mean: Float32s, mixing: float, lr: float) -> Step:
        """Move the anchor by ``mean``, then this rank's weights towards it.

        Args:
            departed: its weights when the fragment left, where it has trained since; ``None``: it has not, or what
                it has is not finite.
            mean: float32[n], the mean pseudo-gradient; overwritten.
            mixing: 1 adopts the anchor, less goes part of the way.
            lr: the inner learning rate.
        """
        mean_square = float(np.dot(mean, mean))
        self._outer.step(self.anchor, mean, self.slots, lr / self.lr if self.lr > 0 else 1.0)
        self.lr = lr
        anchor_square = float(np.dot(self.anchor, self.anchor))
        self._write(self.anchor if departed is None else self._merged(departed, mixing))
        return Step(mean_square, anchor_square)

    def _merged(self, departed: Float32s, mixing: float) -> Float32s:
        """``now + mixing * (anchor - departed)``: what was learnt while the fragment travelled stays."""
        now = self._read()
        if self.rounding is not None:
            now -= self.rounding
        for block in blocks(now.size):
            now[block] += np.float32(mixing) * (self.anchor[block] - departed[block])
        return now

    def _read(self) -> Float32s:
        out = np.empty(self.fragment.size, np.float32)
        self._weights.read(self.fragment.positions, out)
        return out

    def _write(self, values: Float32s) -> None:
        self._weights.write(self.fragment.positions, values)
        if self.rounding is not None:
            self.rounding[:] = self._read()
            self.rounding -= values
