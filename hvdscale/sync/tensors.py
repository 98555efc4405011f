"""What a round asks of a framework: reading tensors into float32 vectors and writing them back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from hvdscale.errors import PlanError
from hvdscale.update.outer import Float32s

__all__ = ["NoTensors", "Store", "TensorSpec", "Tensors", "check_real"]

Role = Literal["weight", "embedding", "mean", "variance", "moment"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor, the same on every rank.

    ``role``: ``"weight"``, ``"embedding"`` (goes uncompressed), ``"mean"`` and ``"variance"`` (running statistics of
    one batch normalisation, in this order one after the other), or ``"moment"`` (of the inner optimizer).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    role: Role = "weight"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


class Tensors(Protocol):
    """An ordered list of a framework's floating-point tensors; the verbs an adapter supplies."""

    @property
    def specs(self) -> Sequence[TensorSpec]: ...

    def read(self, positions: Sequence[int], out: Float32s) -> None:
        """Copy the tensors at ``positions``, flattened one after the other, into float32[n]."""
        ...

    def write(self, positions: Sequence[int], values: Float32s) -> None:
        """Copy float32[n] into the tensors at ``positions``, in place and rounded to their dtype."""
        ...

    def view(self, position: int, writes: bool = False) -> Float32s | None:
        """The tensor itself as float32[n], if that is how it lies in the host's memory.

        It is good until the inner optimizer's next step. ``writes``: the caller will change it.
        """
        ...

    def keep(self) -> Callable[[], None]:
        """What puts all tensors back, to the bit, as they are now."""
        ...


class Store(Protocol):
    """Everything of one optimizer's model that rounds touch."""

    @property
    def weights(self) -> Tensors:
        """Trainable parameters, tied ones once."""
        ...

    @property
    def buffers(self) -> Tensors:
        """Floating-point state that no gradient reaches, such as running statistics."""
        ...

    def moments(self, positions: Sequence[int]) -> Tensors:
        """The inner optimizer's moments of the weights at ``positions``; the same list on every rank.

        A moment the optimizer has not made yet reads as zero.
        """
        ...

    def forget_moments(self, positions: Sequence[int]) -> None:
        """The inner optimizer goes on with the weights at ``positions`` as if it had just been made."""
        ...

    def begin_anew(self) -> None:
        """The inner optimizer goes on as if it had just been made, for all weights: its state was not finite."""
        ...

    def lr(self) -> float:
        """The inner learning rate now."""
        ...


class NoTensors:
    """An empty list."""

    specs: tuple[TensorSpec, ...] = ()

    def read(self, positions: Sequence[int], out: Float32s) -> None:
        pass

    def write(self, positions: Sequence[int], values: Float32s) -> None:
        pass

    def view(self, position: int, writes: bool = False) -> Float32s | None:
        return None

    def keep(self) -> Callable[[], None]:
        return lambda: None


def check_real(specs: Sequence[TensorSpec], what: str) -> None:
    """Raise PlanError at a tensor of complex numbers, whose imaginary part float32 loses. ``what`` sends real ones."""
    odd = next((spec for spec in specs if spec.dtype.startswith("complex")), None)
    if odd is not None:
        raise PlanError(
            f"{what} sends real numbers, as Horovod does, and {odd.name} is {odd.dtype}. Keep its real and imaginary "
            "parts as parameters of their own, and make the complex ones of them in the model."
        )
