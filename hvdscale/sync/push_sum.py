"""Weighted averaging among neighbours whose weights are not equal: every message carries a share of its sender's mass.

Kempe, Dobra and Gehrke, "Gossip-based computation of aggregate information", 2003; Assran, Loizou, Ballas and Rabbat,
"Stochastic gradient push for distributed deep learning", arXiv 1811.10792.

A rank's mass is how much its weights count in the mean of all. Masses stay 1 as long as all ranks train. A rank that
has finished gives its mass to those that still train; one whose weights are not finite loses it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel
from hvdscale.sync.exchange import Mean
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Float64s, Header, Meeting, Phase, shares_of
from hvdscale.sync.peers import Permutation
from hvdscale.sync.wire import parse_wire
from hvdscale.update.outer import Float32s, blocks

__all__ = ["Flows", "Neighbours", "flows"]


@dataclass(frozen=True)
class Flows:
    """Where mass goes in one round: ``kept``, float64[ranks], stays with a rank, and ``sent[k]``, float64[ranks], goes
    along the permutation ``k``."""

    permutations: list[Permutation]
    kept: Float64s
    sent: list[Float64s]

    def masses(self) -> Float64s:
        """float64[ranks]: the masses afterwards, 1 on average."""
        after = self.kept.copy()
        for permutation, mass in zip(self.permutations, self.sent, strict=True):
            after[permutation] += mass
        return after * (after.size / after.sum()) if after.sum() > 0 else np.ones_like(after)


def flows(permutations: list[Permutation], mass: Float64s, trains: np.ndarray, mixing: float) -> Flows:
    """The flows of ranks with ``mass``, of which those in ``trains``, bool[ranks], go on training.

    A rank that trains sends the fraction ``mixing / (k + 1)`` of its mass along each of ``k`` permutations, if to one
    that trains; one that has finished sends all it has.
    """
    ranks = np.arange(mass.size)
    open_ways = [trains[permutation] & (permutation != ranks) for permutation in permutations]  # [k][ranks]
    count = np.sum(open_ways, axis=0) if open_ways else np.zeros(mass.size)
    portion = np.where(trains, mixing / (len(permutations) + 1), 1.0 / np.maximum(count, 1))
    sent = [np.where(way, mass * portion, 0.0) for way in open_ways]
    kept = np.where(~trains & (count > 0), 0.0, mass - np.sum(sent, axis=0) if sent else mass)
    return Flows(permutations, kept, sent)


class Neighbours:
    """An ``Exchange`` in which each rank hears a few others; when all finish together, all hear all.

    Args:
        channel: all ranks.
        topology: ``topology(number of the round, ranks)``: the permutations.
        mixing: less than 1: ranks keep more of their own.
    """

    def __init__(
        self, fragment: Fragment, channel: Channel, topology: Callable[[int, int], list[Permutation]], mixing: float
    ) -> None:
        self._channel, self._topology, self._mixing = channel, topology, mixing
        self._mean = Mean(fragment, parse_wire("fp32"), channel)
        self.spread = 0.0  # squared distance from the neighbours' mean at the last round, over its squared norm

    def arrays(self) -> dict[str, Float32s]:
        return {}

    def __call__(self, values: Float32s, meeting: Meeting) -> None:
        moved, norm = self._mix(values, meeting, meeting.votes)
        self.spread = moved / norm if norm else 0.0

    def beside(self, values: Float32s, meeting: Meeting, votes: Float64s) -> None:
        if not votes[self._channel.rank]:
            values[:] = 0
        self._mix(values, meeting, votes)

    def factor(self, meeting: Meeting) -> np.float32:
        return np.float32(1)

    def mean_of_all(self, values: Float32s, header: Header) -> None:
        """Replace ``values`` by their mean over all ranks, in which this one weighs what ``header`` says. Collective.

        Raises:
            DesyncError: other ranks came to a round.
            PlanError: no rank's weights are finite.
        """
        meeting = Meeting(self._channel.table(header.row()), self._channel.ranks)
        if not meeting.shares.any():
            raise PlanError("No rank's weights are finite: they have no mean. Go on from the job's last checkpoint.")
        self._mean.add_exactly(values, meeting.shares)

    def mass(self, meeting: Meeting) -> float:
        """How much this rank counts after the round."""
        return 1.0 if meeting.finishing else float(self._flows(meeting, meeting.votes).masses()[self._channel.rank])

    def _flows(self, meeting: Meeting, votes: Float64s) -> Flows:
        permutations = self._topology(meeting.number, self._channel.size)
        return flows(permutations, votes, meeting.phases == Phase.TRAINING, self._mixing)

    def _mix(self, values: Float32s, meeting: Meeting, votes: Float64s) -> tuple[float, float]:
        """The squared norms of what was added, and of the result."""
        if meeting.finishing:
            self._mean.add_exactly(values, shares_of(votes))
            return 0.0, 0.0
        plan, me = self._flows(meeting, votes), self._channel.rank
        heard: list[tuple[float, Float32s]] = []
        for permutation, mass in zip(plan.permutations, plan.sent, strict=True):
            source = int(np.flatnonzero(permutation == me)[0])
            theirs = self._channel.swap(values.view(np.uint8), int(permutation[me]), source).view(np.float32)
            if mass[source] > 0:
                heard.append((float(mass[source]), theirs))
        total = plan.kept[me] + sum(mass for mass, _ in heard)
        moved = norm = 0.0
        for block in blocks(values.size):
            # Differences: where all hold the same, nothing moves by a rounded weight.
            own, changes = values[block], [theirs[block] for _, theirs in heard]
            for (weight, _), change in zip(heard, changes, strict=True):
                change -= own
                change *= np.float32(weight / total)
            if changes:
                first, *others = changes
                for other in others:
                    first += other
                own += first
                moved += float(np.dot(first, first))
            norm += float(np.dot(own, own))
        return moved, norm
