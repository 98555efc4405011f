"""Arrays in tuples and dictionaries: one data set of several parts, a sample being a row of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hvdscale.errors import PlanError

__all__ = ["all_arrays", "mapped", "refuse_no_data", "rows_in"]


def all_arrays(data: Any, is_array: Callable[[Any], bool]) -> bool:
    """Whether ``data`` is an array, or tuples and dictionaries of nothing else."""
    if isinstance(data, Mapping | tuple):
        parts = data.values() if isinstance(data, Mapping) else data
        return bool(data) and all(all_arrays(part, is_array) for part in parts)
    return is_array(data)


def mapped(function: Callable[[Any], Any], arrays: Any) -> Any:
    """``function`` of every array, in the same structure."""
    if isinstance(arrays, Mapping):
        return {name: mapped(function, array) for name, array in arrays.items()}
    if isinstance(arrays, tuple):
        return tuple(mapped(function, array) for array in arrays)
    return function(arrays)


def rows_in(arrays: Any) -> int:
    """The number of samples.

    Raises:
        PlanError: arrays of different lengths.
    """
    if not isinstance(arrays, Mapping | tuple):
        return len(arrays)
    lengths = [rows_in(part) for part in (arrays.values() if isinstance(arrays, Mapping) else arrays)]
    if len(set(lengths)) > 1:
        raise PlanError(f"Arrays of one data set are of equal length; these have {lengths} rows.")
    return lengths[0]


def refuse_no_data(data: Any, is_array: Callable[[Any], bool]) -> None:
    """Raises PlanError where ``data``, which is no arrays, gives no sample for a number."""
    if isinstance(data, tuple) and any(all_arrays(part, is_array) for part in data):
        kinds = ", ".join(type(part).__name__ for part in data)
        raise PlanError(
            f"A tuple as data holds arrays alone, or is of samples; these are {kinds:.200}. Make arrays of all."
        )
    if isinstance(data, Mapping):
        kinds = ", ".join(f"{name!r} is a {type(part).__name__}" for name, part in data.items())
        raise PlanError(f"A dictionary as data holds arrays alone; {kinds or 'it is empty'}. Make arrays of its parts.")
    if isinstance(data, np.ndarray) or not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise PlanError(
            "data is an array, a tuple or dictionary of arrays, or an object with __len__ and __getitem__; "
            f"it is a {type(data).__name__}. For a stream give a ShardStream as the plan."
        )
