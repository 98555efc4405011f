"""What ranks tell each other before a round: one row of numbers each, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hvdscale.errors import DesyncError, PlanError

__all__ = ["LEAST", "Header", "Meeting", "Phase", "shares_of"]

Float64s = npt.NDArray[np.float64]

LEAST = 1e-300  # the weight of a rank with nothing to say: others' counts, unless none of them is finite
_SAME = 1e-5  # of the weights' norm: averaged gradients of a warm-up may differ in last bits between processors


class Phase(IntEnum):
    """Where a rank is when it comes to a round."""

    TRAINING = 0  # between two steps
    LEAVING = 1  # in flush(), with no more steps to make; others may have
    FINISHING = 2  # in flush(), as everyone
    STARTING = 3  # before the first round: do all hold the same weights?
    ASKING = 4  # for the mean of all weights, between rounds


@dataclass(frozen=True)
class Header:
    """One rank's row.

    Args:
        round: number of the round, from 0.
        fragment: which part of the model it is about.
        phase: where this rank is.
        step: steps it has made.
        weight: samples (or steps, if nobody counts) since its last round of the fragment, a finished rank's is 0; or
            its mass among neighbours. At the start: the probe of its weights.
        finite: its weights hold no NaN and no infinity.
        square: sum of squares of the pseudo-gradient; among neighbours, how far apart they were the round before.
            At the start: of the weights.
        loss: mean training loss since the last round; NaN if it was not told, infinite if it was not finite.
        beside: values of buffers and moments that are averaged beside the weights; below 0 if they are not finite.
    """

    round: int
    fragment: int
    phase: Phase
    step: int
    weight: float
    finite: bool
    square: float
    loss: float
    beside: int

    def row(self) -> Float64s:
        """float64[9]."""
        return np.array(astuple(self), np.float64)


@dataclass(frozen=True)
class Meeting:
    """All ranks' headers, ``table`` float64[ranks, 9], checked to be about the same round.

    Raises:
        DesyncError: they are not; with the same text on every rank.
    """

    table: Float64s
    ranks: Sequence[int]

    def __post_init__(self) -> None:
        rounds, fragments, phases, steps = self.table[:, :4].T.astype(int)
        beside = np.abs(self.table[:, 8]).astype(int)
        training = steps[phases == Phase.TRAINING]
        mixed = set(phases) - {Phase.TRAINING, Phase.LEAVING} if len(set(phases)) > 1 else ()
        if max(map(len, map(set, (rounds, fragments, training)))) > 1 or mixed:
            lines = [
                f"  rank {rank}: round {number} of fragment {fragment}, {Phase(phase).name.lower()}, after {step} steps"
                for rank, number, fragment, phase, step in zip(
                    self.ranks, rounds, fragments, phases, steps, strict=True
                )
            ]
            raise DesyncError(
                "Ranks came to different rounds:\n" + "\n".join(lines) + "\n"
                "Every rank must step its optimizers in the same order, with the same plan and the same schedule. "
                "A rank that has run out of data calls optimizer.sync.flush()."
            )
        if len(set(beside)) > 1:
            lines = [f"  rank {rank}: {count} values" for rank, count in zip(self.ranks, beside, strict=True)]
            raise DesyncError(
                "Ranks hold different buffers or optimizer moments to average:\n" + "\n".join(lines) + "\n"
                "Give every rank the same model, and let each make a step before the first round."
            )

    def check_start(self) -> None:
        """Raise DesyncError where ranks start from different weights, PlanError where one's are not finite.

        The same text on every rank.
        """
        if not self.finite.all():
            raise PlanError(
                f"Weights are not finite before the first round, on rank {', '.join(map(str, self.not_finite))}: there "
                "is nothing yet to go back to. If a warm-up led there, look for what made the loss NaN or infinite: a "
                "batch, or too high a learning rate."
            )
        probes, norm = self.table[:, 4], float(np.sqrt(self.table[:, 6].max()))
        apart = [rank for rank, probe in zip(self.ranks, probes, strict=True) if abs(probe - probes[0]) > _SAME * norm]
        if apart:
            raise DesyncError(
                f"Ranks begin with different weights: those of rank {', '.join(map(str, apart))} are not those of rank "
                f"{self.ranks[0]}. Rounds share what ranks learnt from where all began. Pass model= to "
                "DistributedOptimizer, which makes the first rank's weights everyone's, or broadcast them before the "
                "first step."
            )

    @property
    def all_leave(self) -> bool:
        return bool((self.phases == Phase.LEAVING).all())

    @property
    def finishing(self) -> bool:
        """The last round of a ``flush()`` that all ranks have come to."""
        return bool((self.phases == Phase.FINISHING).all())

    @property
    def number(self) -> int:
        """That of the round."""
        return int(self.table[0, 0])

    @property
    def phases(self) -> npt.NDArray[np.int64]:
        """int64[ranks]"""
        return self.table[:, 2].astype(np.int64)

    @property
    def finite(self) -> npt.NDArray[np.bool_]:
        """bool[ranks]"""
        return self.table[:, 5] > 0

    @property
    def votes(self) -> Float64s:
        """float64[ranks]: how much each rank counts."""
        return self.table[:, 4] * self.finite

    @property
    def last_step(self) -> int:
        return int(self.table[:, 3].max())

    @property
    def beside_votes(self) -> Float64s:
        """float64[ranks]: the same in what is averaged beside the weights."""
        return self.votes * (self.table[:, 8] >= 0)

    @property
    def shares(self) -> Float64s:
        """float64[ranks]: each rank's share of the mean, summing to 1, or all 0 when nobody has anything to say."""
        silent = self.finite.all() and (self.votes <= LEAST).all()
        return np.zeros(len(self.votes)) if silent else shares_of(self.votes)

    @property
    def not_finite(self) -> list[int]:
        """Ranks whose weights are not finite: they do not vote, and take what the others agree on."""
        return [rank for rank, finite in zip(self.ranks, self.finite, strict=True) if not finite]

    @property
    def mean_square(self) -> float:
        """The mean of the squared norms of the pseudo-gradients."""
        return float(np.sum(self.shares * np.where(self.finite, self.table[:, 6], 0.0)))

    @property
    def loss(self) -> float:
        """The mean loss over the samples of all ranks that told a finite one; infinite if all were not; NaN if none
        told any."""
        told = ~np.isnan(self.table[:, 7]) & (self.table[:, 4] > 0)
        finite = told & np.isfinite(self.table[:, 7])
        if finite.any():
            return float(np.average(self.table[finite, 7], weights=self.table[finite, 4]))
        return float("inf") if told.any() else float("nan")


def shares_of(votes: Float64s) -> Float64s:
    """float64[ranks]: ``votes`` in parts of their sum; all 0 where nobody votes."""
    return votes / votes.sum() if votes.sum() > 0 else np.zeros_like(votes)
