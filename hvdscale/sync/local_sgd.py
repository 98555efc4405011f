"""Local SGD: train alone, then take the mean of the weights.

Stich, "Local SGD converges fast and communicates little", arXiv 1805.09767; McMahan et al., "Communication-efficient
learning of deep networks from decentralized data", arXiv 1602.05629. With ``merge="mix"``: Zhang, Choromanska and
LeCun, "Deep learning with elastic averaging SGD", arXiv 1412.6651.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdscale.errors import PlanError
from hvdscale.sync.relaxed import Relaxed
from hvdscale.update import Average, Outer

__all__ = ["LocalSGD"]


@dataclass(frozen=True)
class LocalSGD(Relaxed):
    """Every ``every`` steps the ranks' weights become their mean, or what ``outer`` makes of it.

    Args:
        outer: how the shared weights move by the mean pseudo-gradient: ``Average()`` when left out,
            ``Nesterov(...)``, ``SlowMomentum(...)`` or an ``Outer`` of your own.

    The other arguments are those of ``Relaxed``.
    """

    outer: Outer | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outer is not None and not (
            hasattr(self.outer, "slots") and callable(getattr(self.outer, "step", None))
        ):
            raise PlanError(f"outer is an outer optimizer such as Nesterov(lr=0.7); it is {self.outer!r}.")

    def outer_optimizer(self) -> Outer:
        return Average() if self.outer is None else self.outer
