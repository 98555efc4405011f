"""Playing a schedule through before it runs: what it takes, what it holds, and whether it can end at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hvdscale.errors import PlanError
from hvdscale.model.actions import Action, Kind, Schedule
from hvdscale.model.checking import check_actions
from hvdscale.model.passes import Links, chain_links

__all__ = ["Costs", "Event", "Simulation", "simulate"]


@dataclass(frozen=True)
class Costs:
    """Seconds (or any unit) that one micro-batch takes, by stage; and bytes, where memory is asked for.

    Args:
        forward: of each stage.
        backward: of each stage, both halves together; default: twice the forward pass.
        weight_share: the part of a backward pass that the gradients of weights take, where it is divided.
        transfer: from one rank to another, per message.
        activation_bytes: what a forward pass keeps, by stage.
        input_bytes: what it keeps where it is run again, by stage.
        reduction: the sum of one shared parameter.
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...] = ()
    weight_share: float = 1 / 3
    transfer: float | Mapping[tuple[int, int], float] = 0.0
    activation_bytes: tuple[int, ...] = ()
    input_bytes: tuple[int, ...] = ()
    reduction: float = 0.0

    @classmethod
    def even(cls, stages: int, forward: float = 1.0, backward: float | None = None, **more: Any) -> Costs:
        """The same for all stages."""
        return cls((forward,) * stages, ((2 * forward if backward is None else backward),) * stages, **more)

    def of(self, action: Action) -> float:
        """Of one action; messages take the rank no time."""
        forward = self.forward[action.stage]
        backward = self.backward[action.stage] if self.backward else 2 * forward
        return {
            "F": forward,
            "C": forward,
            "B": backward,
            "I": backward * (1 - self.weight_share),
            "W": backward * self.weight_share,
            "T": self.reduction,
        }.get(action.kind, 0.0)

    def between(self, source: int, target: int) -> float:
        """Of a message between two stages."""
        if isinstance(self.transfer, Mapping):
            return self.transfer.get((source, target), 0.0)
        return self.transfer


@dataclass(frozen=True)
class Event:
    """An action and when it ran."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Simulation:
    """A schedule played through. ``peak_activations`` counts passes of a stage that wait for their backward pass."""

    schedule: Schedule
    events: tuple[tuple[Event, ...], ...]  # by rank
    peak_activations: tuple[int, ...]  # by rank
    peak_bytes: tuple[int, ...]  # by rank; zeros where no bytes were given
    costs: Costs = field(repr=False)

    @property
    def makespan(self) -> float:
        """From the first action to the last."""
        return max(event.end for row in self.events for event in row)

    @property
    def busy(self) -> tuple[float, ...]:
        """What each rank computed; waiting for messages, in a measured step, is none of it."""
        work = ("F", "B", "I", "W", "C", "T")
        return tuple(sum(e.end - e.start for e in row if e.action.kind in work) for row in self.events)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time in which they wait; recomputation counts as work."""
        return 1 - sum(self.busy) / (self.makespan * self.schedule.ranks) if self.makespan else 0.0

    @property
    def speedup(self) -> float:
        """Over one rank that runs all stages, and recomputes nothing."""
        alone = sum(e.end - e.start for row in self.events for e in row if e.action.kind in ("F", "B", "I", "W"))
        return alone / self.makespan if self.makespan else 1.0

    def __str__(self) -> str:
        return (
            f"{self.schedule.name}: {self.schedule.ranks} ranks, {self.schedule.stages} stages, "
            f"{self.schedule.microbatches} micro-batches: {self.makespan:.6g} in all, bubble {self.bubble:.1%}, "
            f"{self.speedup:.2f} times one rank; activations of at most {max(self.peak_activations)} passes on a rank"
        )


def simulate(schedule: Schedule, costs: Costs | None = None, links: Links | None = None) -> Simulation:
    """Play ``schedule`` through.

    Ranks do their actions in order. A pass waits for what it reads; a receive for its message; a sum for all ranks
    that take part. Sends wait for nobody.

    Args:
        costs: default: 1 forward, 2 backward.
        links: which stages read which; default: each the one before it.

    Raises:
        PlanError: actions that are missing, too many, in an impossible order or on the wrong rank; and ranks that wait
            for each other, with what each of them waits for.
    """
    costs = costs or Costs.even(schedule.stages)
    links = chain_links(schedule.stages) if links is None else links
    check_actions(schedule, links)
    return _Play(schedule, costs, links).run()


class _Play:
    """The state of a simulation: when each action was over, and how far each rank has come."""

    def __init__(self, schedule: Schedule, costs: Costs, links: Links) -> None:
        self._schedule, self._costs = schedule, costs
        self._into: dict[int, list[int]] = {}
        self._out_of: dict[int, list[int]] = {}
        for source, target in links:
            self._into.setdefault(target, []).append(source)
            self._out_of.setdefault(source, []).append(target)
        self._over: dict[Action, float] = {}
        self._backward: Kind = "I" if schedule.splits_backward else "B"
        self._sums: dict[int, list[int]] = {}
        for rank, row in enumerate(schedule.actions):
            for action in row:
                if action.kind == "T":
                    self._sums.setdefault(action.microbatch, []).append(rank)

    def run(self) -> Simulation:
        rows = self._schedule.actions
        place, clock = [0] * len(rows), [0.0] * len(rows)
        events: list[list[Event]] = [[] for _ in rows]
        arrived: dict[int, dict[int, float]] = {}  # shared parameter -> rank -> when it came to the sum
        moved = True
        while moved:
            moved = False
            for rank, row in enumerate(rows):
                while place[rank] < len(row):
                    action = row[place[rank]]
                    if action.kind == "T":
                        arrived.setdefault(action.microbatch, {}).setdefault(rank, clock[rank])
                    start = self._start(action, arrived)
                    if start is None:
                        break
                    start = max(start, clock[rank])
                    end = start + self._costs.of(action)
                    self._over[action] = end
                    events[rank].append(Event(action, start, end))
                    clock[rank] = end
                    place[rank] += 1
                    moved = True
        stuck = {rank: row[place[rank]] for rank, row in enumerate(rows) if place[rank] < len(row)}
        if stuck:
            waits = "; ".join(f"rank {rank} at {action}" for rank, action in stuck.items())
            raise PlanError(
                f"Ranks wait for each other and none goes on: {waits}. Each needs what another would do only later: "
                "change the order of these actions."
            )
        return self._result(events)

    def _start(self, action: Action, arrived: Mapping[int, Mapping[int, float]]) -> float | None:
        """When what the action needs is there; ``None`` while that is not known."""
        stage, m, kind = action.stage, action.microbatch, action.kind
        if kind == "T":
            here = arrived[m]
            return max(here.values()) if len(here) == len(self._sums[m]) else None
        needs: list[tuple[Action, float]] = []
        if kind == "F":
            needs = [(Action("F", source, m), self._travel(source, stage)) for source in self._into.get(stage, [])]
        elif kind in ("B", "I"):
            needs = [
                (Action(self._backward, target, m), self._travel(target, stage))
                for target in self._out_of.get(stage, [])
            ]
        elif kind in ("RF", "RB") and action.peer is not None:
            sent = Action("SF" if kind == "RF" else "SB", action.peer, m, stage)
            needs = [(sent, self._travel(action.peer, stage))]
        times = [None if need not in self._over else self._over[need] + travel for need, travel in needs]
        if None in times:
            return None
        return max((time for time in times if time is not None), default=0.0)

    def _travel(self, source: int, target: int) -> float:
        same = self._schedule.rank_of(source) == self._schedule.rank_of(target)
        return 0.0 if same else self._costs.between(source, target)

    def _result(self, events: list[list[Event]]) -> Simulation:
        costs = self._costs
        recomputed = {(e.action.stage, e.action.microbatch) for row in events for e in row if e.action.kind == "C"}
        last = "W" if self._schedule.splits_backward else "B"
        counts, sizes = [], []
        for row in events:
            count = peak = size = peak_size = 0
            for event in row:
                action = event.action
                full = costs.activation_bytes[action.stage] if costs.activation_bytes else 0
                small = costs.input_bytes[action.stage] if costs.input_bytes else 0
                again = (action.stage, action.microbatch) in recomputed
                if action.kind == "F":
                    count, size = count + 1, size + (small if again else full)
                elif action.kind == "C":
                    size += full
                peak, peak_size = max(peak, count), max(peak_size, size)
                if action.kind == last:
                    count, size = count - 1, size - full - (small if again else 0)
            counts.append(peak)
            sizes.append(peak_size)
        return Simulation(self._schedule, tuple(map(tuple, events)), tuple(counts), tuple(sizes), costs)
