"""DiLoCo: long local periods, and Nesterov momentum on the mean of what they changed.

Douillard et al., "DiLoCo: distributed low-communication training of language models", arXiv 2311.08105; with
``fragments`` and ``overlap``: "Streaming DiLoCo with overlapping communication", arXiv 2501.18512.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hvdscale.sync.relaxed import Relaxed
from hvdscale.update import Nesterov, Outer

__all__ = ["DiLoCo"]


@dataclass(frozen=True)
class DiLoCo(Relaxed):
    """Every ``every`` steps the shared weights move by Nesterov momentum on the mean pseudo-gradient.

    Args:
        outer_lr: outer learning rate; 1 with ``outer_momentum=0`` is ``LocalSGD``.
        outer_momentum: outer momentum, in 0 .. 1.

    The other arguments are those of ``Relaxed``.
    """

    outer_lr: float = field(default=0.7, kw_only=True)
    outer_momentum: float = field(default=0.9, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.outer_optimizer()

    def outer_optimizer(self) -> Outer:
        return Nesterov(self.outer_lr, self.outer_momentum)
