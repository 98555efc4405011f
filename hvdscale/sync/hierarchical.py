"""The mean over nodes: one rank of each speaks for it, and tells its own what came of it.

Ranks of a node have met before and bring the same values. So a slow link carries one message, however many ranks
stand behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hvdscale.runtime.channel import Channel
from hvdscale.sync.exchange import Mean
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Float64s, Meeting, shares_of
from hvdscale.sync.nodes import Nodes
from hvdscale.sync.wire import Codec
from hvdscale.update.outer import Float32s

__all__ = ["Hierarchical", "Roads"]


@dataclass(frozen=True)
class Roads:
    """Channels of their own: ``rounds`` inside this node, for its rounds, ``inside`` for what all nodes agreed on, and
    ``between`` the ranks that speak for their nodes (``None`` elsewhere)."""

    nodes: Nodes
    rounds: Channel
    inside: Channel
    between: Channel | None

    @classmethod
    def open(cls, nodes: Nodes, patient: bool) -> Roads:
        """``patient``: rounds of all nodes run beside the training step. Collective."""
        return cls(nodes, nodes.inside(), nodes.inside(patient), nodes.between(patient))

    @property
    def sent_bytes(self) -> int:
        return sum(road.sent_bytes for road in (self.rounds, self.inside, self.between) if road is not None)


class Hierarchical:
    """An ``Exchange`` among nodes. What the wire loses is kept by the ranks that speak."""

    def __init__(self, fragment: Fragment, codec: Codec, roads: Roads) -> None:
        self._roads = roads
        self._mean = None if roads.between is None else Mean(fragment, codec, roads.between)

    def arrays(self) -> dict[str, Float32s]:
        return {} if self._mean is None else self._mean.arrays()

    def __call__(self, values: Float32s, meeting: Meeting) -> None:
        if self._mean is not None:
            self._mean.add(values, self._roads.nodes.sums(meeting.shares))
        self._tell(values)

    def beside(self, values: Float32s, meeting: Meeting, votes: Float64s) -> None:
        if self._mean is not None:
            self._mean.add_exactly(values, self._roads.nodes.sums(shares_of(votes)))
        self._tell(values)

    def factor(self, meeting: Meeting) -> np.float32:
        return np.float32(1)

    def _tell(self, values: Float32s) -> None:
        if self._mean is None:
            values[:] = 0
        self._roads.inside.allreduce(values)
