"""What can be asked about the rounds so far."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from hvdscale.errors import PlanError

__all__ = ["Metrics", "Told"]


@dataclass
class Metrics:
    """Running figures of the rounds so far.

    Args:
        rounds: fragments exchanged among all ranks, or with the peers of a gossip.
        node_rounds: fragments averaged inside this rank's node.
        seconds: waited for them, or spent on them, by the training thread.
        drift: at the last round, the root of the mean squared distance of the ranks' weights from their mean,
            relative to the norm of the shared weights. Among the peers of a gossip: from the peers' mean, and at the
            round before.
        distance: the same mean squared distance (consensus distance), not divided by anything.
        loss: mean training loss of all ranks over the last period of which it was told, weighted by samples; NaN if
            it never was, infinite if none was finite.
        not_finite: votes withheld because a rank's weights were not finite, over all rounds and ranks.
    """

    rounds: int = 0
    node_rounds: int = 0
    seconds: float = 0.0
    drift: float = 0.0
    distance: float = 0.0
    loss: float = float("nan")
    not_finite: int = 0


@dataclass
class Told:
    """What the script told of its batches: ``losses``, ``(loss, samples)`` each, since the last round of all ranks, and
    ``samples`` since the last step; ``None``: nothing."""

    losses: list[tuple[float, float]] = field(default_factory=list)
    samples: float | None = None

    def tell(self, loss: float, samples: float) -> None:
        """Note a batch.

        Raises:
            PlanError: ``samples`` below 0, or not a number; a loss that has no value yet.
        """
        try:
            loss = float(loss)
        except (TypeError, ValueError, RuntimeError):
            raise PlanError(
                f"optimizer.sync.tell(loss) takes a number, and {type(loss).__name__} is none, or none yet: inside a "
                "compiled step there are no values. Tell it of what the step returned, before the next one."
            ) from None
        if not 0 <= samples < float("inf"):
            raise PlanError(
                f"optimizer.sync.tell(loss, samples) takes how many samples the loss is the mean of: 0 or more, not "
                f"{samples}."
            )
        if samples:
            self.losses.append((loss, float(samples)))
        self.samples = (self.samples or 0.0) + samples

    def a_step(self) -> float:
        """How much a step counts: the samples told since the last one, or 1 if nobody told."""
        samples, self.samples = self.samples, None
        return 1.0 if samples is None else samples

    @property
    def loss(self) -> float:
        """The mean, weighted by samples; NaN if there was none, infinite if it is not finite."""
        told = sum(samples for _, samples in self.losses)
        mean = sum(loss * samples for loss, samples in self.losses) / told if told else float("nan")
        return mean if math.isfinite(mean) or not told else float("inf")
