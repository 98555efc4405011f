"""Checks of lengths, and of what a length costs."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from hvdscale.data.checks import array
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError

__all__ = ["check_factor", "check_lengths"]


def check_factor(name: str, value: object) -> float:
    """``value`` as a finite float from 0.

    Raises:
        PlanError: it is none.
    """
    number = float(value) if isinstance(value, int | float | np.number) and not isinstance(value, bool) else math.nan
    if not (math.isfinite(number) and number >= 0):
        raise PlanError(f"{name} must be a finite number from 0; it is {value!r}.")
    return number


def check_lengths(lengths: npt.ArrayLike, most: int) -> Int64s:
    """``lengths`` as int64[n], each in ``0 .. most``.

    Raises:
        PlanError: no vector, no integers, or one out of range.
    """
    given = array("Lengths", lengths)
    if given.ndim != 1:
        raise PlanError(f"Lengths are one integer per sample: a vector. These have shape {given.shape}.")
    if given.size == 0:
        return np.zeros(0, np.int64)
    if given.dtype.kind not in "iu":
        raise PlanError(f"Lengths are integers, in tokens; these are {given.dtype}. Round them first.")
    for place in (int(given.argmin()), int(given.argmax())):
        if not 0 <= int(given[place]) <= most:
            raise PlanError(f"Lengths lie in 0..{most}; sample {place} has {given[place]}.")
    return given.astype(np.int64)
