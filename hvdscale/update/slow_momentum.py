"""Momentum across rounds: SlowMo, and block-wise model-update filtering before it.

Wang, Tantia, Ballas and Rabbat, "SlowMo: improving communication-efficient distributed SGD with slow momentum",
arXiv 1910.00643; Chen and Huo, "Scalable training of deep learning machines by incremental block training", 2016.

The paper divides the pseudo-gradient by the learning rate and multiplies the step by it. The buffer here holds the
product, so nothing is divided by a learning rate that may be zero; when the rate changes, the buffer is rescaled.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdscale.update.outer import Float32s, Slots, blocks, check_number

__all__ = ["SlowMomentum"]


@dataclass(frozen=True)
class SlowMomentum:
    """``buffer = momentum * buffer + change``; ``anchor -= lr * buffer``.

    Args:
        lr: slow learning rate, above 0; 1 adopts the mean when ``momentum`` is 0.
        momentum: in 0 .. 1.

    Raises:
        PlanError: a value out of its range.
    """

    lr: float = 1.0
    momentum: float = 0.5

    def __post_init__(self) -> None:
        check_number("the slow learning rate", self.lr, 0.0, above_low=True)
        check_number("the slow momentum", self.momentum, 0.0, 1.0)

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum",)

    def step(self, anchor: Float32s, change: Float32s, slots: Slots, lr_ratio: float) -> None:
        for block in blocks(anchor.size):
            buffer = slots["momentum"][block]
            buffer *= self.momentum * lr_ratio
            buffer += change[block]
            anchor[block] -= self.lr * buffer
