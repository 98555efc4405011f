"""NumPy arrays as the framework of a round: the store the core is tested with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hvdscale.sync.tensors import NoTensors, Tensors, TensorSpec

Array = np.ndarray[Any, Any]


class NumPyTensors:
    """Arrays by name. float16 ones are read and written as float32."""

    def __init__(self, arrays: dict[str, Array], roles: dict[str, Any] | None = None) -> None:
        self._arrays = list(arrays.values())
        self.specs = [
            TensorSpec(name, array.shape, str(array.dtype), (roles or {}).get(name, "weight"))
            for name, array in arrays.items()
        ]

    def read(self, positions: Sequence[int], out: Array) -> None:
        start = 0
        for p in positions:
            array = self._arrays[p]
            out[start : start + array.size] = array.reshape(-1)
            start += array.size

    def write(self, positions: Sequence[int], values: Array) -> None:
        start = 0
        for p in positions:
            array = self._arrays[p]
            array[...] = values[start : start + array.size].reshape(array.shape)
            start += array.size

    def view(self, position: int, writes: bool = False) -> Array | None:
        array = self._arrays[position]
        return array.reshape(-1) if array.dtype == np.float32 and array.flags.c_contiguous else None

    def keep(self) -> Callable[[], None]:
        kept = [array.copy() for array in self._arrays]

        def put_back() -> None:
            for array, values in zip(self._arrays, kept, strict=True):
                array[...] = values

        return put_back


@dataclass
class NumPyStore:
    """The store of one rank of a test."""

    weights: Tensors
    buffers: Tensors = field(default_factory=NoTensors)
    moment: Tensors = field(default_factory=NoTensors)
    rate: float = 0.1

    def moments(self, positions: Sequence[int]) -> Tensors:
        return self.moment

    def forget_moments(self, positions: Sequence[int]) -> None:
        everything = range(len(self.moment.specs))
        self.moment.write(everything, np.zeros(sum(spec.size for spec in self.moment.specs), np.float32))

    def begin_anew(self) -> None:
        self.forget_moments(())

    def lr(self) -> float:
        return self.rate
