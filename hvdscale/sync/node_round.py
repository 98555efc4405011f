"""A round inside a node: its ranks' weights become their mean. The anchor, which all nodes share, stays."""

from __future__ import annotations

from hvdscale.runtime.channel import Channel
from hvdscale.sync.anchored import Anchored
from hvdscale.sync.aside import Aside
from hvdscale.sync.exchange import Mean
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.header import Header, Meeting
from hvdscale.sync.part import Departure, Part
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.wire import parse_wire

__all__ = ["NodeRounds"]


class NodeRounds:
    """Rounds of ``plan`` among the ranks of ``channel``, in float32. Where there is one alone, nothing happens."""

    def __init__(self, plan: Relaxed, channel: Channel) -> None:
        self._plan, self._channel = plan, channel
        self._mean = Mean(Fragment((), coded=0, size=0), parse_wire("fp32"), channel)

    def hold(self, part: Part, header: Header, departure: Departure, asides: list[Aside]) -> Meeting:
        """Average what the ranks leave with, and take it. Collective."""
        meeting = Meeting(self._channel.table(header.row()), self._channel.ranks)
        # Alone, weights would only be rounded. A part without an anchor has no nodes.
        if meeting.shares.any() and self._channel.size > 1 and isinstance(part, Anchored):
            exchange = self._plan.by_row(part.fragment, self._mean)
            exchange(departure.values, meeting)
            part.take(departure.values, exchange.factor(meeting))
            for aside in asides if meeting.beside_votes.any() else ():
                self._mean.beside(aside.values, meeting, meeting.beside_votes)
                aside.arrive()
        return meeting
