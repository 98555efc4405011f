"""SlowMo: local SGD with momentum across rounds.

Wang, Tantia, Ballas and Rabbat, "SlowMo: improving communication-efficient distributed SGD with slow momentum",
arXiv 1910.00643.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdscale.sync.relaxed import Relaxed
from hvdscale.update import Outer, SlowMomentum

__all__ = ["SlowMo"]


@dataclass(frozen=True)
class SlowMo(Relaxed):
    """Every ``every`` steps the shared weights move by a running sum of the mean pseudo-gradients.

    Args:
        lr: slow learning rate, relative to the inner one.
        momentum: slow momentum, in 0 .. 1; 0 with ``lr=1`` is ``LocalSGD``.

    The other arguments are those of ``Relaxed``.
    """

    lr: float = field(default=1.0, kw_only=True)
    momentum: float = field(default=0.5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.outer_optimizer()

    def outer_optimizer(self) -> Outer:
        return SlowMomentum(self.lr, self.momentum)
