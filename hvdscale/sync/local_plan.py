"""What all plans share in which ranks step on their own gradients, and weights meet instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NoReturn

from hvdscale.errors import PlanError
from hvdscale.sync.reduction import Reduction
from hvdscale.sync.tensors import TensorSpec, check_real

__all__ = ["LocalPlan", "State", "check_whole"]

State = Literal["keep", "average", "reset"]


@dataclass(frozen=True)
class LocalPlan:
    """Ranks train alone; each plan says when weights meet, and how.

    Args:
        warmup: steps at the start in which gradients are averaged at every step.
    """

    warmup: int = field(default=0, kw_only=True)
    state: State = field(default="keep", kw_only=True, init=False, repr=False)
    """What becomes of the inner optimizer's moments when weights meet."""

    def check(self, reduction: Reduction) -> None:
        """Raise PlanError where gradients would be reduced in a way that has no meaning for weights that meet."""
        if reduction.op != "average":
            raise PlanError(
                f"{type(self).__name__} averages weights; op={reduction.op} of gradients does not go with it. "
                "Use op=Average."
            )
        if reduction.predivide != 1.0:
            raise PlanError(
                f"{type(self).__name__} sends no gradients that gradient_predivide_factor={reduction.predivide} could "
                "keep from overflowing. Leave it at 1.0; weights are added in float32."
            )
        if reduction.groups is not None and not self.warmup:
            raise PlanError(
                f"groups=... says which gradients travel together, and {type(self).__name__} without a warm-up sends "
                "none. Leave groups out of DistributedOptimizer."
            )

    def refuse_compression(self) -> NoReturn:
        """Raise PlanError: ``compression=`` is of gradients, and none are sent."""
        raise PlanError(
            f"{type(self).__name__} sends weights, and compression=... is of gradients. Leave it out; LocalSGD, DiLoCo "
            'and SlowMo have wire="fp16" instead.'
        )

    def check_weights(self, specs: Sequence[TensorSpec]) -> None:
        """Raise PlanError at complex weights: they meet as float32."""
        check_real(specs, type(self).__name__)

    def facts(self) -> dict[str, object]:
        """What all ranks must agree on, by name."""
        return {"plan": self}


def check_whole(name: str, value: object, low: int) -> None:
    """Raise PlanError unless ``value`` is a whole number from ``low``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise PlanError(f"{name} must be a whole number from {low}; it is {value!r}.")
