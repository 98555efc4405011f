"""A fragment on its way between ranks, beside the training step or while it waits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from hvdscale.runtime import timeline
from hvdscale.runtime.channel import Channel
from hvdscale.sync.aside import Aside
from hvdscale.sync.header import Header, Meeting
from hvdscale.sync.part import Departure, Part
from hvdscale.sync.state import copy_into
from hvdscale.update.outer import Float32s

__all__ = ["Courier", "Flight"]

T = TypeVar("T")


@dataclass(eq=False)
class Flight:
    """One fragment under way: what this rank left with, and what travels beside the weights. Both hold the means once
    ``meeting``, what all ranks said, is there."""

    fragment: int
    lands_at: int
    departure: Departure
    asides: list[Aside]
    meeting: Future[Meeting]

    def arrays(self) -> dict[str, Float32s]:
        """What belongs into a checkpoint; waits until all is there."""
        self.meeting.result()
        weights = {} if self.departure.weights is None else {"departed": self.departure.weights}
        asides = {f"aside.{i}": aside.values for i, aside in enumerate(self.asides)}
        named = {**weights, "mean": self.departure.values, **asides}
        return {f"flight.{self.fragment}.{name}": array for name, array in named.items()}

    def numbers(self) -> dict[str, Any]:
        table = self.meeting.result().table.tolist()
        said = {"fragment": self.fragment, "lands_at": self.lands_at, "finite": self.departure.finite}
        return {**said, "table": table}

    @classmethod
    def resumed(
        cls, saved: Mapping[str, Any], arrays: Mapping[str, Float32s], size: int, asides: list[Aside], channel: Channel
    ) -> Flight:
        """The flight with these ``numbers()`` and ``arrays()``, of a fragment of ``size`` values.

        Raises:
            StateError: an array is missing, or of another size.
        """
        at = f"flight.{saved['fragment']}"
        values = np.empty(size, np.float32)
        weights = np.empty(size, np.float32) if saved["finite"] else None
        copy_into(arrays, f"{at}.mean", values)
        if weights is not None:
            copy_into(arrays, f"{at}.departed", weights)
        for i, aside in enumerate(asides):
            copy_into(arrays, f"{at}.aside.{i}", aside.values)
        meeting: Future[Meeting] = Future()
        meeting.set_result(Meeting(np.array(saved["table"]), channel.ranks))
        departure = Departure(values, weights, saved["finite"], 0.0)
        return cls(saved["fragment"], saved["lands_at"], departure, asides, meeting)


class Courier:
    """Takes fragments round. ``beside``: in a thread of its own; otherwise whoever sends waits."""

    def __init__(self, channel: Channel, beside: bool) -> None:
        self._channel = channel
        self._thread = ThreadPoolExecutor(1, "hvdscale-rounds") if beside else None

    def send(self, part: Part, header: Header, departure: Departure, asides: list[Aside]) -> Future[Meeting]:
        """Hold the meeting, and exchange what this rank leaves with."""

        def travel() -> Meeting:
            meeting = Meeting(self._channel.table(header.row()), self._channel.ranks)
            if meeting.shares.any() and not meeting.all_leave:
                with timeline.travel("transfer", round=header.round, fragment=header.fragment):
                    part.exchange(departure.values, meeting)
                    for aside in asides if meeting.beside_votes.any() else ():
                        part.exchange.beside(aside.values, meeting, meeting.beside_votes)
            return meeting

        return self.run(travel)

    def run(self, travel: Callable[[], T]) -> Future[T]:
        """``travel()``, after what was sent before."""
        if self._thread is not None:
            return self._thread.submit(travel)
        done: Future[T] = Future()
        with timeline.span("wait"):
            done.set_result(travel())
        return done
