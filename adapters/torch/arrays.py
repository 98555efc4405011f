"""Arrays as a data set: a whole batch in one indexing, not sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, default_collate

from hvdscale.data.checks import function
from hvdscale.data.nested import all_arrays, mapped, refuse_no_data, rows_in
from hvdscale.errors import PlanError

__all__ = ["Arrays", "as_dataset", "on_accelerator"]


class Arrays(Dataset[Any]):
    """An array, a tuple or a dictionary of arrays of equal length; a sample is a row of each.

    NumPy arrays (memory maps too) and tensors. Batches keep the structure, as tensors.
    """

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        self._length = rows_in(arrays)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, sample: int) -> Any:
        return mapped(lambda array: _row(array, sample), self.arrays)

    def __getitems__(self, samples: Sequence[int]) -> Any:
        rows = np.asarray(samples, np.int64)
        return mapped(lambda array: _row(array, rows), self.arrays)


def as_dataset(data: Any, collate: Callable[[Any], Any] | None) -> tuple[Any, Callable[[Any], Any]]:
    """``data`` as a map-style data set, and what makes a batch of what it gives for a list of samples.

    Raises:
        PlanError: data without a length and items, or arrays of what no tensor holds.
    """
    function("collate", collate)
    if all_arrays(data, _is_array):
        mapped(_refuse_no_numbers, data)
        return Arrays(data), collate or _as_it_is
    refuse_no_data(data, _is_array)
    return data, collate or default_collate


def on_accelerator(data: Any) -> bool:
    """Whether arrays lie in the memory of a GPU: they cannot be pinned, nor read by other processes."""
    found: list[bool] = []

    def look(array: Any) -> None:
        found.append(isinstance(array, torch.Tensor) and array.device.type != "cpu")

    if all_arrays(data, _is_array):
        mapped(look, data)
    return any(found)


def _is_array(data: Any) -> bool:
    return isinstance(data, np.ndarray | torch.Tensor) and data.ndim > 0


def _refuse_no_numbers(array: Any) -> None:
    if isinstance(array, np.ndarray) and array.dtype.kind not in "biufc":
        raise PlanError(
            f"Tensors of PyTorch hold numbers; this array has {array.dtype}. Make numbers of it, or give a list or a "
            "data set of samples, whose batches are then lists."
        )


def _row(array: Any, sample: Any) -> torch.Tensor:
    """One row, or the rows of an array of numbers."""
    if isinstance(array, torch.Tensor):
        return array[torch.from_numpy(sample) if isinstance(sample, np.ndarray) else sample]
    return torch.as_tensor(np.asarray(array[sample]))  # a copy already, also of a memory map


def _as_it_is(batch: Any) -> Any:
    return batch
