"""What an outer optimizer is: it moves the weights all ranks share, once a round, by the mean pseudo-gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hvdscale.errors import PlanError

__all__ = ["Float32s", "Outer", "Slots", "blocks", "check_number"]

Float32s = npt.NDArray[np.float32]
Slots = Mapping[str, Float32s]

_BLOCK = 1 << 16  # values at a time: a block and its temporaries stay in the cache, and calls cost little beside


class Outer(Protocol):
    """An outer optimizer: a frozen dataclass of its settings. Its state lives in arrays it is handed."""

    @property
    def slots(self) -> tuple[str, ...]:
        """Names of the arrays it keeps, each of the anchor's shape and zero at first."""
        ...

    def step(self, anchor: Float32s, change: Float32s, slots: Slots, lr_ratio: float) -> None:
        """Move ``anchor`` in place, value by value: called with one piece of the weights after the other.

        Args:
            anchor: float32[n], the shared weights.
            change: float32[n], the mean pseudo-gradient: old anchor minus the ranks' weights. May be overwritten.
            slots: the arrays named by ``slots``, each float32[n], changed in place.
            lr_ratio: the inner learning rate now over that of the round before.
        """
        ...


def blocks(n: int) -> Iterator[slice]:
    """Slices that cover ``0 .. n``."""
    return (slice(start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))


def check_number(name: str, value: float, low: float, below: float = math.inf, *, above_low: bool = False) -> None:
    """Raise PlanError unless ``low <= value < below``; with ``above_low`` unless ``low < value < below``."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value < below or (above_low and value == low):
        limits = f"{'above' if above_low else 'at least'} {low:g}"
        limits += "" if below == math.inf else f" and below {below:g}"
        raise PlanError(f"{name} must be a number {limits}; it is {value!r}.")
