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
    """All-reduce the gradients at every step; each worker applies the same update.

    ``update`` says who applies it. This version knows ``"local"``: every worker does, on its own copy.

    Raises:
        PlanError: ``update`` is anything else.
    """

    update: str = "local"

    def __post_init__(self) -> None:
        if self.update != "local":
            raise PlanError(
                f"EveryStep(update=...) takes 'local' in this version, got {self.update!r}. "
                "Leave it out: every worker then applies the averaged gradient itself."
            )

    def check(self, reduction: Reduction) -> None:
        """Every reduction of gradients goes with it."""

    def facts(self) -> dict[str, object]:
        """What all ranks must agree on, by name."""
        return {"plan": self}
