"""A small problem for each rank: ``0.5 * |A_r x - b_r|**2``, in tensors ``w``, ``b`` and ``v``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]

SHAPES = {"w": (6, 5), "b": (7,), "v": (4, 3)}
SIZE = 49
FRAGMENTS = {
    1: [slice(0, 49)],
    2: [slice(0, 30), slice(30, 49)],
    3: [slice(0, 30), slice(30, 37), slice(37, 49)],
}
"""Where w (30 values), b (7) and v (12) are cut into so many fragments."""


@dataclass
class Quadratic:
    """One rank's problem. Its gradient is float64[49] at float64[49]."""

    a: Array
    b: Array

    @classmethod
    def of(cls, rank: int) -> Quadratic:
        rng = np.random.default_rng([7, rank])
        return cls(rng.normal(size=(SIZE, SIZE)) / SIZE**0.5, rng.normal(size=SIZE))

    def gradient(self, x: Array, step: int = 0) -> Array:
        return self.a.T @ (self.a @ x - self.b)


def start() -> Array:
    return np.random.default_rng(3).normal(size=SIZE)
