"""Nesterov momentum for changes that come one by one, and late: delayed Nesterov.

Liu et al., "Asynchronous local-SGD training for language modeling", arXiv 2401.09135. Momentum at each of N workers'
pushes would act N times in the time of one synchronous step, on changes that are stale. Here a push moves the weights
at once, as it is, and momentum acts once every N pushes, on their sum. When all N are of the same step this is
Nesterov's step on their mean.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdscale.update.outer import Float32s, Slots, blocks, check_number

__all__ = ["DelayedNesterov"]


@dataclass(frozen=True)
class DelayedNesterov:
    """Each push: ``anchor -= lr * change; sum += change``. After each N of them, ``settle``.

    Args:
        lr: outer learning rate, above 0.
        momentum: in 0 .. 1; 0 with ``lr`` 1 adds the workers' changes up, and nothing else.

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
        return ("momentum", "sum") if self.momentum else ()

    def step(self, anchor: Float32s, change: Float32s, slots: Slots, lr_ratio: float = 1.0) -> None:
        """Move ``anchor`` by one push: ``change``, float32[n], is its part of the workers' mean. Overwritten."""
        for block in blocks(anchor.size):
            moved = change[block]
            if self.momentum:
                slots["sum"][block] += moved
            moved *= self.lr
            anchor[block] -= moved

    def settle(self, anchor: Float32s, slots: Slots) -> None:
        """``momentum = beta * momentum + sum; anchor -= lr * beta * momentum``, and a new sum begins."""
        if not self.momentum:
            return
        for block in blocks(anchor.size):
            buffer = slots["momentum"][block]
            buffer *= self.momentum
            buffer += slots["sum"][block]
            anchor[block] -= (self.lr * self.momentum) * buffer
        slots["sum"][:] = 0
