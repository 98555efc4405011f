"""Agreement at every step: Horovod's ring all-reduce of the gradients.

Sergeev and Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", arXiv 1802.05799.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdscale.errors import PlanError
from hvdscale.sync.reduction import Reduction

__all__ = ["EveryStep"]


@dataclass(frozen=True)
class EveryStep:
    """Agree on the gradients at every step.

    All three updates give the same weights. They differ in what a rank keeps and sends:

    - ``"local"``: gradients are all-reduced, and every worker applies the same update to its own copy.
    - ``"sharded"``: gradients are reduce-scattered, each rank updates 1/N of the parameters and keeps the optimizer's
      state for those alone, then weights are all-gathered (ZeRO, arXiv 1910.02054).
    - ``"central"``: gradients go to the first rank, which alone holds optimizer state, updates and broadcasts weights.

    Args:
        update: who applies the update.

    Raises:
        PlanError: ``update`` is anything else.
    """

    update: str = "local"

    def __post_init__(self) -> None:
        if self.update not in ("local", "central", "sharded"):
            raise PlanError(
                f'EveryStep(update=...) takes "local", "central" or "sharded", got {self.update!r}. '
                "Leave it out: every worker then applies the averaged gradient itself."
            )

    @property
    def placed(self) -> bool:
        """Whether ranks update different elements."""
        return self.update != "local"

    def check(self, reduction: Reduction) -> None:
        """Raise PlanError where gradients would be reduced in a way that the update has no meaning for."""
        if self.placed and reduction.op == "adasum":
            raise PlanError(
                f'op=Adasum combines what every rank\'s own update did; with update="{self.update}" ranks make no such '
                'updates. Use op=Average, or update="local".'
            )
        if self.placed and reduction.groups is not None:
            raise PlanError(
                f'groups={reduction.groups} says which gradients travel together; with update="{self.update}" that '
                "follows from who updates them. Leave groups out."
            )

    def facts(self) -> dict[str, object]:
        """What all ranks must agree on, by name."""
        return {"plan": self}
