"""What a wire format is."""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from hvdscale.update.outer import Float32s

__all__ = ["Bytes", "Codec"]

Bytes = npt.NDArray[np.uint8]


class Codec(Protocol):
    """Turns float32 values into bytes and back. What it loses, error feedback sends the next time.

    Seide, Fu, Droppo, Li and Yu, "1-bit stochastic gradient descent and its application to data-parallel
    distributed training of speech DNNs", 2014, for error feedback.
    """

    @property
    def way(self) -> Literal["allreduce", "scatter", "gather"]:
        """How codes are added over ranks.

        ``"allreduce"``: values travel as they are. ``"scatter"``: each rank adds up one share in float32 and sends
        the coded sum round. ``"gather"``: every rank gets every code.
        """
        ...

    @property
    def unit(self) -> int:
        """Values that share a code; a share of a vector starts at a multiple of it."""
        ...

    def size(self, n: int) -> int:
        """Bytes of the code of ``n`` values."""
        ...

    def take(self, kept: Float32s, more: Float32s | None, out: Bytes) -> None:
        """Code ``kept + more`` into ``out``, uint8[size(m)] with m >= n, zero beyond n; ``kept`` keeps what was lost.

        Both are float32[n] and finite.
        """
        ...

    def decode(self, data: Bytes, out: Float32s) -> None:
        """Write the first n values of ``data`` to ``out``, float32[n]."""
        ...

    def add(self, data: Bytes, share: np.float32, out: Float32s) -> None:
        """Add the first n values of ``data``, ``share`` times each, to ``out``, float32[n]."""
        ...
