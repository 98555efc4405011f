"""The rounds of the relaxed family: one engine for every plan, on any framework's tensors.

A fragment whose turn has come departs: what this rank has to say about it is averaged over the ranks. When it arrives,
at once or ``overlap`` steps later, the rank's weights move to what was agreed on, or towards it. Where ranks meet in
nodes, a round of the node comes first, and only every so often one of all ranks follows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from hvdscale.runtime import timeline
from hvdscale.runtime.channel import Channel
from hvdscale.sync.aside import Aside
from hvdscale.sync.calendar import Calendar
from hvdscale.sync.flight import Courier, Flight
from hvdscale.sync.fragments import cut
from hvdscale.sync.header import Header, Meeting, Phase
from hvdscale.sync.hierarchical import Roads
from hvdscale.sync.metrics import Metrics, Told
from hvdscale.sync.node_round import NodeRounds
from hvdscale.sync.nodes import find_nodes
from hvdscale.sync.part import Departure
from hvdscale.sync.recovery import Recovery
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.state import check_complete, check_origin, copy_into, origin, reading
from hvdscale.sync.tensors import Store
from hvdscale.update.outer import Float32s

__all__ = ["Rounds"]

_STATE = ("step", "begun", "departures", "losses", "calendar", "parts", "flights", "metrics", "arrays")


class Rounds:
    """Carries ``plan`` out on this rank's ``store``, which holds the same weights on every rank at first.

    ``before_step()`` and ``after_step()`` enclose each step of the inner optimizer; every rank calls them and
    ``flush()``.

    Args:
        plan: when and how ranks meet.
        store: the tensors.
        channel: the ranks that meet. Where it is not ``concurrent``, training waits for a fragment also with
            ``overlap``; what it learns in between is the same.
        roads: channels inside nodes and between them, where there are some already.

    Raises:
        PlanError: more fragments than tensors, complex ones, or groups that are not the ranks of ``channel``.
    """

    def __init__(self, plan: Relaxed, store: Store, channel: Channel, roads: Roads | None = None) -> None:
        self.plan = plan
        self.metrics = Metrics()
        self.step = 0
        self._store = store
        self._channel = channel
        plan.check_weights(store.weights.specs)
        fragments = cut(store.weights.specs, plan.fragments, plan.codec)
        nodes = None if roads is not None else find_nodes(plan.groups, channel)
        beside = plan.overlap > 0 and channel.concurrent
        self._roads = roads if nodes is None else Roads.open(nodes, patient=beside)
        self._parts = [plan.part(fragment, store.weights, channel, self._roads) for fragment in fragments]
        self._calendar = Calendar(plan, len(fragments))
        self._courier = Courier(channel, beside)
        self._desk = np.empty(0 if plan.overlap and self._roads is None else max(f.size for f in fragments), np.float32)
        self._inside = None if self._roads is None else NodeRounds(plan, self._roads.rounds)
        self._begun = False
        self._compared = False
        self._departures = 0
        self._told = Told()
        self._recovery = Recovery(store, channel.ranks[channel.rank])
        self._flights: list[Flight] = []
        self._sent_before_bytes = 0  # by the run that this one resumes

    @property
    def trains(self) -> bool:
        """Every rank does."""
        return True

    @property
    def warming_up(self) -> bool:
        """The next step is one of the first, in which gradients are averaged."""
        return self.step < self.plan.warmup

    @property
    def anew(self) -> int:
        """The step after which this rank's inner optimizer last began anew; 0 if it never did."""
        return self._recovery.at

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent for rounds."""
        inside = 0 if self._roads is None else self._roads.sent_bytes
        return self._sent_before_bytes + self._channel.sent_bytes + inside

    def figures(self) -> dict[str, float]:
        """The metrics by name, with ``steps`` and ``bytes_sent``."""
        return {**self.first_figures(), **asdict(self.metrics), "steps": self.step, "bytes_sent": self.bytes_sent}

    @staticmethod
    def first_figures() -> dict[str, float]:
        """The figures before anything has happened."""
        return {**asdict(Metrics()), "steps": 0, "bytes_sent": 0}

    def tell(self, loss: float, samples: float = 1.0) -> None:
        """The mean loss of this rank's batch of ``samples`` samples, before ``after_step()``."""
        self._told.tell(loss, samples)

    @property
    def meets_next(self) -> bool:
        """Whether ``after_step()`` of the next step will read or write tensors."""
        step = self.step + 1
        if not self._begun:
            return step >= self.plan.warmup
        return bool(self._calendar.due(step)) or any(flight.lands_at <= step for flight in self._flights)

    def before_step(self) -> None:
        """The weights, if no rank has trained alone yet, are the anchor. The first time is collective.

        Raises:
            DesyncError: ranks begin, or go on, with different shared weights.
            PlanError: with weights that are not finite.
        """
        if self.warming_up:
            return
        resumed = self._begun
        if not self._begun:
            self._begun = True
            for part in self._parts:
                part.begin()
        if not self._compared:
            self._compare(resumed)
            self._compared = True

    def after_step(self) -> bool:
        """Count one step, attempted or made, and hold the rounds that are due. Returns whether weights changed.

        The step counts for the samples told since the last one, or for one if nobody told.
        """
        timeline.step()
        samples = self._told.a_step()
        self.step += 1
        if not self._begun:
            self.before_step()
            return False
        for part in self._parts:
            part.samples += samples
            part.since += samples
        changed = self._land_due()
        for fragment in self._calendar.due(self.step):
            changed |= self._meet(fragment)
        return changed

    def flush(self) -> bool:
        """Finish the period: wait for ranks that still have steps to make, then agree on everything.

        On return every rank holds the same weights. On a boundary there is nothing left to say, and nothing is sent
        but headers. Returns whether weights changed.
        """
        if self.warming_up:
            return False
        self.before_step()  # a rank without a step, too: others may have made some
        changed = self._land_due(everything=True)
        while True:  # others may have rounds to come: join them, first with what is left to say, then with weight zero
            due, fragment = self._calendar.next()
            node_trains = self._meet_inside(fragment, Phase.LEAVING)
            changed |= node_trains
            if not self._calendar.crosses(fragment):
                self._calendar.met_inside(fragment)
                self.step = max(self.step, due) if node_trains else self.step
                continue
            flight = self._depart(fragment, Phase.LEAVING)
            meeting = flight.meeting.result()
            if meeting.all_leave:
                break
            self._said(fragment)
            self._calendar.met_everyone(fragment)
            self._land(flight)
            self.step, changed = max(self.step, due), True
        for fragment, part in enumerate(self._parts):
            self._meet_inside(fragment, Phase.FINISHING)
            changed |= self._land(self._depart(fragment, Phase.FINISHING), settle=False)
            part.finish()
        self.step = meeting.last_step
        self._calendar.restart(self.step)
        return changed

    def over(self, store: Store) -> Rounds:
        """Finish the period, and go on with ``store``, which has more tensors or fewer. Collective.

        The outer optimizer keeps what it knows of tensors with the same name and shape. New ones must hold the same
        values on every rank.

        Raises:
            PlanError: more fragments than tensors.
        """
        self.flush()
        twin = Rounds(self.plan, store, self._channel, self._roads)
        known = self._by_tensor()
        for name, arrays in twin._by_tensor().items():
            for slot, array in arrays.items():
                if name in known and known[name][slot].size == array.size:
                    array[:] = known[name][slot]
        twin.metrics, twin.step, twin._departures = self.metrics, self.step, self._departures
        twin._sent_before_bytes, twin._recovery = self._sent_before_bytes, self._recovery.over(store)
        for part, before in zip(twin._parts, self._parts, strict=True):
            part.load_numbers(before.numbers())
        twin._calendar.restart(max(self.step, self.plan.warmup))
        return twin

    def _by_tensor(self) -> dict[str, dict[str, Float32s]]:
        """The outer optimizer's arrays, cut into tensors: views by name of the tensor, then of the slot."""
        specs = self._store.weights.specs
        return {
            specs[position].name: {slot: array[place] for slot, array in part.slots.items()}
            for part in self._parts
            for position, place in part.tensors()
        }

    def outer_weights(self) -> list[Float32s]:
        """The weights all ranks share: float32, in the shapes and the order of ``store.weights.specs``. Copies.

        Where there are none between rounds, the mean of all ranks' weights; then it is collective.
        """
        for flight in self._flights:
            flight.meeting.result()  # one exchange at a time
        specs = self._store.weights.specs
        weights: dict[int, Float32s] = {}
        for part in self._parts:
            if not self._begun:  # ranks hold the same weights still
                part.begin()
            shared = part.shared()
            for position, place in part.tensors():
                weights[position] = shared[place].reshape(specs[position].shape).copy()
        return [weights[position] for position in range(len(specs))]

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, at any step: numbers that JSON holds, and under ``"arrays"`` float32 vectors by name.

        With fragments on their way it waits for them, so every rank must call it at the same step. Arrays are copies.
        """
        arrays = {f"{i}.{name}": array for i, part in enumerate(self._parts) for name, array in part.arrays().items()}
        for flight in self._flights:
            arrays |= flight.arrays()
        return {
            **origin(self.plan, self._store.weights.specs, self._channel),
            "step": self.step,
            "begun": self._begun,
            "departures": self._departures,
            "anew": self.anew,
            "losses": [list(told) for told in self._told.losses],
            "calendar": self._calendar.state(),
            "parts": [part.numbers() for part in self._parts],
            "flights": [flight.numbers() for flight in self._flights],
            "metrics": asdict(self.metrics) | {"bytes_sent": self.bytes_sent},
            "arrays": {name: array.copy() for name, array in arrays.items()},
        }

    @reading()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was called: from then on every bit is that of the uninterrupted run.

        The weights themselves, the inner optimizer and the data are loaded by whoever saved them.

        Raises:
            StateError: the state of another rank, model, plan or number of ranks, or one that is incomplete.
        """
        check_origin(state, origin(self.plan, self._store.weights.specs, self._channel))
        check_complete(state, _STATE)
        arrays = state["arrays"]
        for i, part in enumerate(self._parts):
            for name, array in part.arrays().items():
                copy_into(arrays, f"{i}.{name}", array)
            part.load_numbers(state["parts"][i])
        self._flights = [
            Flight.resumed(
                saved,
                arrays,
                self._parts[saved["fragment"]].fragment.size,
                self._asides(saved["fragment"]),
                self._channel,
            )
            for saved in state["flights"]
        ]
        self._calendar.load(state["calendar"])
        self._told = Told([(loss, samples) for loss, samples in state["losses"]])
        self.step, self._begun, self._departures = state["step"], state["begun"], state["departures"]
        self._compared = False
        self._recovery.at = state.get("anew", 0)  # not in states of older versions
        counted = dict(state["metrics"])
        self._sent_before_bytes += counted.pop("bytes_sent") - self.bytes_sent
        self.metrics = Metrics(**counted)

    def _compare(self, resumed: bool) -> None:
        """All ranks begin, or go on, with the same shared weights."""
        probes, squares = zip(*(part.probe(resumed) for part in self._parts), strict=True)
        header = Header(
            round=self._departures,
            fragment=0,
            phase=Phase.STARTING,
            step=self.step,
            weight=sum(probes),
            finite=bool(np.isfinite(squares).all()),
            square=sum(squares),
            loss=float("nan"),
            beside=0,
        )
        Meeting(self._channel.table(header.row()), self._channel.ranks).check_start()

    def _meet(self, fragment: int) -> bool:
        """The round of a fragment whose turn has come. Returns whether weights changed already."""
        changed = self._meet_inside(fragment)
        if not self._calendar.crosses(fragment):
            self._calendar.met_inside(fragment)
            return changed
        flight = self._depart(fragment)
        self._calendar.met_everyone(fragment)
        if self.plan.overlap:
            self._flights.append(flight)
            return changed
        return self._land(flight)

    def _meet_inside(self, fragment: int, phase: Phase = Phase.TRAINING) -> bool:
        """The round of this rank's node, where there are nodes. Returns whether one of its ranks is still training."""
        if self._inside is None:
            return False
        started = time.perf_counter()
        part = self._parts[fragment]
        with timeline.span("node round", fragment=fragment):
            departure = part.depart(self._desk[: part.fragment.size], travels=False)
            asides = self._asides(fragment)
            header = self._header(fragment, phase, departure, asides, part.samples, float("nan"))
            meeting = self._inside.hold(part, header, departure, asides)
        if not departure.finite and meeting.shares.any():
            self._come_back(fragment, meeting)
        part.samples = 0.0
        self.metrics.not_finite += len(meeting.not_finite)
        self.metrics.node_rounds += 1
        self.metrics.seconds += time.perf_counter() - started
        return not meeting.all_leave

    def _depart(self, fragment: int, phase: Phase = Phase.TRAINING) -> Flight:
        started = time.perf_counter()
        part, travels = self._parts[fragment], self.plan.overlap > 0 and phase is Phase.TRAINING
        out = np.empty(part.fragment.size, np.float32) if travels or not self._desk.size else self._desk
        with timeline.span("depart", round=self._departures, fragment=fragment):
            departure = part.depart(out[: part.fragment.size], travels)
        asides = self._asides(fragment)
        header = self._header(fragment, phase, departure, asides, part.weight(phase), self._told.loss)
        meeting = self._courier.send(part, header, departure, asides)
        self._departures += 1
        if phase is not Phase.LEAVING:
            self._said(fragment)
        self.metrics.seconds += time.perf_counter() - started
        return Flight(fragment, self.step + self.plan.overlap, departure, asides, meeting)

    def _header(
        self, fragment: int, phase: Phase, departure: Departure, asides: list[Aside], weight: float, loss: float
    ) -> Header:
        beside = sum(aside.values.size for aside in asides)
        return Header(
            round=self._departures,
            fragment=fragment,
            phase=phase,
            step=self.step,
            weight=weight,
            finite=departure.finite,
            square=departure.square,
            loss=loss,
            beside=beside if departure.finite and all(aside.finite for aside in asides) else -beside,
        )

    def _said(self, fragment: int) -> None:
        """What this rank had to say about the fragment is under way."""
        self._parts[fragment].samples = self._parts[fragment].since = 0.0
        self._told.losses.clear()

    def _asides(self, fragment: int) -> list[Aside]:
        asides = []
        if fragment == len(self._parts) - 1:  # once a period
            asides.append(Aside(self._store.buffers))
        if self.plan.state == "average":
            asides.append(Aside(self._store.moments(self._parts[fragment].fragment.positions)))
        return asides

    def _come_back(self, fragment: int, meeting: Meeting) -> None:
        """This rank's weights of ``fragment`` were not finite. They are those of the others now, and so must the rest
        be; where nobody had any, all are those of the last round again."""
        voted = bool(meeting.shares.any())
        restored = [number for number in range(len(self._parts)) if self._restore(number)]
        if voted or restored:
            self._recovery.come_back(self.step, voted, moments=self.plan.state == "keep" or not voted)
        elif not meeting.finite.any():
            self._recovery.give_up(self.step)

    def _restore(self, fragment: int) -> bool:
        """Where this rank's weights are not finite, hold those of the last round; returns whether it had to."""
        part = self._parts[fragment]
        if not part.restore():
            return False
        if self.plan.state != "keep":
            self._store.forget_moments(part.fragment.positions)
        for flight in self._flights:
            if flight.fragment == fragment and flight.departure.weights is not None:
                flight.departure.weights[:] = part.shared()  # it arrives as if it had left from there
        return True

    def _land_due(self, everything: bool = False) -> bool:
        landing = [flight for flight in self._flights if everything or flight.lands_at <= self.step]
        for flight in landing:
            self._flights.remove(flight)  # those that land after it may be changed by what it brings
            self._land(flight)
        return bool(landing)

    def _land(self, flight: Flight, settle: bool = True) -> bool:
        started = time.perf_counter()
        with timeline.span("wait", fragment=flight.fragment):
            meeting = flight.meeting.result()
        part, metrics = self._parts[flight.fragment], self.metrics
        metrics.not_finite += len(meeting.not_finite)
        voted = bool(meeting.shares.any())
        if voted:
            with timeline.span("arrive", fragment=flight.fragment):
                found = part.arrive(flight.departure, meeting, self._store.lr())
            for aside in flight.asides if meeting.beside_votes.any() else ():
                aside.arrive()
            if self.plan.state == "reset":
                self._store.forget_moments(part.fragment.positions)
            metrics.rounds += 1
            metrics.loss = metrics.loss if math.isnan(meeting.loss) else meeting.loss  # of the last told
            metrics.distance, metrics.drift = found.distance, found.drift
        if not flight.departure.finite:
            self._come_back(flight.fragment, meeting)
        if settle:
            self._calendar.settle(flight.fragment, metrics.drift)
        metrics.seconds += time.perf_counter() - started
        return voted or not flight.departure.finite
