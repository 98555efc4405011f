"""Data that loaders take rows from, in NumPy: arrays in tuples and dictionaries, or anything with items."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hvdscale.data.checks import function
from hvdscale.data.nested import all_arrays, mapped, refuse_no_data, rows_in
from hvdscale.data.types import Int64s
from hvdscale.errors import PlanError

__all__ = ["Table", "stack"]


class Table:
    """``data`` as what gives a batch for a list of samples.

    Args:
        data: an array, or a tuple or dictionary of arrays of equal length (NumPy, memory maps, tensors in the
            computer's memory): a sample is a row of each. Or an object with ``__len__`` and ``__getitem__`` whose
            items are numbers, arrays, or tuples or dictionaries of them.
        collate: makes the batch of the rows taken from arrays, or of a list of items; default: nothing, or ``stack``.

    Raises:
        PlanError: data without a length and items, or arrays of different lengths.
    """

    def __init__(self, data: Any, collate: Callable[[Any], Any] | None = None) -> None:
        function("collate", collate)
        self.is_arrays = all_arrays(data, _is_array)
        if not self.is_arrays:
            refuse_no_data(data, _is_array)
        self._data = mapped(np.asanyarray, data) if self.is_arrays else data  # a memory map stays one
        self._length = rows_in(self._data) if self.is_arrays else len(data)
        self._collate = collate

    def __len__(self) -> int:
        return self._length

    def fetch(self, samples: Int64s) -> Any:
        """The batch of these samples: arrays, in the structure of the data or of what ``collate`` makes."""
        if self.is_arrays:
            rows = mapped(lambda array: np.asarray(array[samples]), self._data)  # a copy, also of a memory map
            return rows if self._collate is None else self._collate(rows)
        items = [self._data[sample] for sample in samples.tolist()]
        return (self._collate or stack)(items)

    def check_length(self, n: int) -> None:
        """Raises PlanError where a plan over ``n`` samples is not one for this data."""
        if len(self) != n:
            raise PlanError(f"The plan is over {n} samples; data holds {len(self)}. Make the plan for len(data).")


def stack(items: Sequence[Any]) -> Any:
    """A batch of equal samples: each part stacked along a new first axis."""
    first = items[0]
    if isinstance(first, Mapping):
        return {name: stack([item[name] for item in items]) for name in first}
    if isinstance(first, tuple):
        return tuple(stack(parts) for parts in zip(*items, strict=True))
    if isinstance(first, bytes):
        return np.array(items, object)  # NumPy's own strings end before zero bytes
    return np.stack([np.asarray(item) for item in items])


def _is_array(data: Any) -> bool:
    return hasattr(data, "__array__") and len(getattr(data, "shape", ())) > 0
