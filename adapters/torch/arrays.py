"""Arrays as a data set: a whole batch in one indexing, not sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from hvdscale.errors import PlanError

__all__ = ["Arrays", "as_dataset"]


class Arrays(Dataset[Any]):
    """An array, a tuple or a dictionary of arrays of equal length; a sample is a row of each.

    NumPy arrays (memory maps too) and tensors. Batches keep the structure, as tensors.
    """

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        self._length = _length(arrays)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, sample: int) -> Any:
        return _rows(self.arrays, sample)

    def __getitems__(self, samples: Sequence[int]) -> Any:
        return _rows(self.arrays, np.asarray(samples, np.int64))


def as_dataset(data: Any, collate: Callable[[Any], Any] | None) -> tuple[Any, Callable[[Any], Any]]:
    """``data`` as a map-style data set, and what makes a batch of what it gives for a list of samples.

    Raises:
        PlanError: data without a length and items.
    """
    if _is_arrays(data):
        return Arrays(data), collate or _as_it_is
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise PlanError(
            "data is an array, a tuple or dictionary of arrays, or a map-style data set with __len__ and __getitem__; "
            f"it is a {type(data).__name__}. For a stream give a ShardStream as the plan."
        )
    return data, collate or default_collate


def _is_arrays(data: Any) -> bool:
    if isinstance(data, Mapping):
        return bool(data) and all(map(_is_arrays, data.values()))
    if isinstance(data, tuple):
        return bool(data) and all(map(_is_arrays, data))
    if isinstance(data, np.ndarray):
        return data.ndim > 0 and data.dtype.kind in "biufc"
    return isinstance(data, torch.Tensor) and data.ndim > 0


def _length(arrays: Any) -> int:
    parts = list(arrays.values()) if isinstance(arrays, Mapping) else arrays if isinstance(arrays, tuple) else None
    if parts is None:
        return len(arrays)
    lengths = [_length(part) for part in parts]
    if len(set(lengths)) > 1:
        raise PlanError(f"Arrays of one data set are of equal length; these have {lengths} rows.")
    return lengths[0]


def _rows(arrays: Any, samples: Any) -> Any:
    if isinstance(arrays, Mapping):
        return {name: _rows(array, samples) for name, array in arrays.items()}
    if isinstance(arrays, tuple):
        return tuple(_rows(array, samples) for array in arrays)
    if isinstance(arrays, torch.Tensor):
        return arrays[torch.from_numpy(samples) if isinstance(samples, np.ndarray) else samples]
    return torch.as_tensor(np.asarray(arrays[samples]))  # a copy already, also of a memory map


def _as_it_is(batch: Any) -> Any:
    return batch
