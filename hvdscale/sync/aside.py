"""What is averaged beside the weights when ranks meet: buffers, such as running statistics, and optimizer moments."""

from __future__ import annotations

import numpy as np

from hvdscale.sync.tensors import Tensors
from hvdscale.update.outer import Float32s

__all__ = ["Aside"]


class Aside:
    """A list of tensors on its way to their mean over ranks.

    A running variance becomes that of all ranks' samples together: mean(var) + var(mean). It is sent as second
    moment, whose mean is the second moment of all. ``values``, float32[n], is what is on its way.
    """

    def __init__(self, tensors: Tensors) -> None:
        self._tensors = tensors
        self._positions = range(len(tensors.specs))
        self.values = _read_all(tensors)
        self._pairs = _pairs(tensors)
        for mean, variance in self._pairs:
            self.values[variance] += np.square(self.values[mean])

    @property
    def finite(self) -> bool:
        return bool(np.isfinite(np.dot(self.values, self.values)) or np.isfinite(self.values).all())

    def arrive(self) -> None:
        """Write the means back."""
        for mean, variance in self._pairs:
            self.values[variance] -= np.square(self.values[mean])
            np.maximum(self.values[variance], 0, out=self.values[variance])
        self._tensors.write(self._positions, self.values)


def _read_all(tensors: Tensors) -> Float32s:
    values = np.empty(sum(spec.size for spec in tensors.specs), np.float32)
    tensors.read(range(len(tensors.specs)), values)
    return values


def _pairs(tensors: Tensors) -> list[tuple[slice, slice]]:
    """Where each running mean and its variance lie in the flat vector."""
    pairs, start, before = [], 0, slice(0)
    for spec in tensors.specs:
        place = slice(start, start + spec.size)
        if spec.role == "variance":
            pairs.append((before, place))
        start, before = place.stop, place
    return pairs
