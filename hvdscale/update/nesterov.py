"""Nesterov momentum on pseudo-gradients: the outer optimizer of DiLoCo.

Douillard et al., "DiLoCo: distributed low-communication training of language models", arXiv 2311.08105.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdscale.update.outer import Float32s, Slots, blocks, check_number

__all__ = ["Nesterov"]


@dataclass(frozen=True)
class Nesterov:
    """``buffer = momentum * buffer + change``; ``anchor -= lr * (change + momentum * buffer)``.

    Args:
        lr: outer learning rate, above 0.
        momentum: in 0 .. 1; 0 with ``lr`` 1 is the plain mean.

    Raises:
        PlanError: a value out of its range.
    """

    lr: float = 0.7
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_number("the outer learning rate", self.lr, 0.0, above_low=True)
        check_number("the outer momentum", self.momentum, 0.0, 1.0)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",)

    def step(self, anchor: Float32s, change: Float32s, slots: Slots, lr_ratio: float) -> None:
        for block in blocks(anchor.size):
            buffer, moved = slots["momentum"][block], change[block]
            buffer *= self.momentum
            buffer += moved
            moved += self.momentum * buffer
            moved *= self.lr
            anchor[block] -= moved
