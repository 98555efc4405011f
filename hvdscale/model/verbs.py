"""What a framework must be able to do for a pipeline: a handful of verbs on its own tensors. The core decides when."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

__all__ = ["Bundle", "Spec", "Units", "Verbs"]

T = TypeVar("T")
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Spec:
    """What must be known of a tensor to receive it. ``grad``: its gradient travels back."""

    shape: tuple[int, ...]
    dtype: str
    grad: bool


@dataclass(frozen=True)
class Bundle(Generic[T]):
    """The tensors that one stage gives to another for one micro-batch.

    ``structure`` is the adapter's own note on how they belong together (JSON, say); it travels once for each shape of
    the input, so it may depend on shapes, not on values.
    """

    tensors: tuple[T, ...]
    structure: str = ""


class Verbs(Protocol[T]):
    """The stages of one rank in a framework.

    Each stage and micro-batch passes through ``forward``, then ``backward`` or, in its place, ``backward_input`` and
    later ``backward_weight``. What ``forward`` keeps for them is the adapter's own, under (stage, microbatch).
    Stages are named by their number in the whole pipeline. Mappings are from the other stage to what goes there or
    came from there.
    """

    def forward(
        self, stage: int, microbatch: int, inputs: Mapping[int, Bundle[T]], keep: bool
    ) -> Mapping[int, Bundle[T]]:
        """Run the stage. The first one finds its input itself, the last one keeps the loss and returns nothing.

        ``keep``: False where nothing follows (evaluation) or ``recompute`` will; then only the inputs are kept.
        """
        ...

    def recompute(self, stage: int, microbatch: int) -> None:
        """Run it again with the same inputs, random numbers and state, keeping everything for the backward pass."""
        ...

    def backward(self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[T]]) -> Mapping[int, Sequence[T]]:
        """From the gradients of the outputs to those of the inputs; those of the weights are added to what is there.

        In both, one gradient for each tensor of the bundle whose spec has ``grad``; the last stage gets none and
        starts from its loss.
        """
        ...

    def backward_input(
        self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[T]]
    ) -> Mapping[int, Sequence[T]]:
        """Like ``backward``, as far as the inputs need it."""
        ...

    def backward_weight(self, stage: int, microbatch: int) -> None:
        """What ``backward_input`` left out."""
        ...

    def tied_gradient(self, number: int) -> T:
        """This rank's gradient of a parameter that other ranks hold too."""
        ...

    def set_tied_gradient(self, number: int, parts: Sequence[T]) -> None:
        """The gradients of all ranks that hold it, in the order of their first stages: their sum is the gradient."""
        ...

    def ready(self, stage: int) -> None:
        """The stage's gradients are complete: a reduction over other replicas may start."""
        ...

    def spec(self, tensor: T) -> Spec:
        """What a receiver must know."""
        ...

    def view(self, tensor: T) -> Bytes:
        """The tensor's own memory as uint8[n]; of a tensor that is not contiguous, that of a contiguous copy."""
        ...

    def empty(self, spec: Spec) -> T:
        """A tensor to receive into; ``view`` of it is writable."""
        ...


class Units(Protocol[T]):
    """A model as numbered units, each of which reads the outputs of earlier ones: what an adapter's stages run."""

    @property
    def complaint(self) -> str:
        """What ``run`` found that a pipeline cannot do; empty if nothing."""
        ...

    def seeds(self, nodes: Sequence[int], place: tuple[int, ...]) -> Any:
        """What ``nodes`` draw random numbers from in their pass of ``place``, which no other pass has."""
        ...

    def run(self, nodes: Sequence[int], values: dict[int, Any], seeds: Any) -> None:
        """Add the outputs of ``nodes`` to ``values``, which holds what they read. ``seeds`` is None in evaluation."""
        ...

    def buffers(self, nodes: Sequence[int]) -> list[T]:
        """What ``run`` may change."""
        ...
