"""Wire formats that code a value, or a few neighbours, alone: what they share is how they go over a vector."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import numpy as np

from hvdscale.sync.wire.codec import Bytes
from hvdscale.update.outer import Float32s, blocks

__all__ = ["Blockwise"]


class Blockwise(ABC):
    """A ``Codec`` that works block by block, so that what one operation leaves the next finds in the cache."""

    @property
    def way(self) -> Literal["scatter"]:
        return "scatter"

    @property
    @abstractmethod
    def unit(self) -> int: ...

    @abstractmethod
    def size(self, n: int) -> int: ...

    @abstractmethod
    def _write(self, values: Float32s, data: Bytes, block: slice) -> None:
        """Code ``values``, which are the vector's at ``block``, into ``data``, the code of all of it."""

    @abstractmethod
    def _read(self, data: Bytes, block: slice, out: Float32s) -> None:
        """Write to ``out`` what ``data`` says of the values at ``block``."""

    def take(self, kept: Float32s, more: Float32s | None, out: Bytes) -> None:
        if out.size > self.size(kept.size):
            out[:] = 0
        said = _work(kept.size)
        for block in blocks(kept.size):
            values = kept[block]
            if more is not None:
                values += more[block]
            self._write(values, out, block)
            self._read(out, block, said[: values.size])
            values -= said[: values.size]

    def decode(self, data: Bytes, out: Float32s) -> None:
        for block in blocks(out.size):
            self._read(data, block, out[block])

    def add(self, data: Bytes, share: np.float32, out: Float32s) -> None:
        said = _work(out.size)
        for block in blocks(out.size):
            values = said[: block.stop - block.start]
            self._read(data, block, values)
            values *= share
            out[block] += values


def _work(n: int) -> Float32s:
    """Room for any block of ``n`` values: the first is the longest."""
    return np.empty(next(blocks(n), slice(0, 0)).stop, np.float32)
