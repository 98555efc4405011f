"""The rounds of the relaxed family: one engine for every plan, on any framework's tensors.

A fragment whose turn has come departs: its pseudo-gradient, the anchor minus this rank's weights, is averaged over
the ranks. When it arrives, at once or ``overlap`` steps later, the outer optimizer moves the anchor and the rank's
weights move towards it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from hvdscale.runtime.channel import Channel
from hvdscale.sync.aside import Aside
from hvdscale.sync.calendar import Calendar
from hvdscale.sync.fragments import cut
from hvdscale.sync.header import Header, Meeting, Phase
from hvdscale.sync.part import Part
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.state import check_origin, copy_into, origin
from hvdscale.sync.tensors import Store
from hvdscale.update.outer import Float32s

__all__ = ["Metrics", "Rounds"]


@dataclass
class Metrics:
    """Running figures of the rounds so far.

    Args:
        rounds: fragments exchanged.
        seconds: waited for them, or spent on them, by the training thread.
        drift: at the last round, the root of the mean squared distance of the ranks' weights from their mean,
            relative to the norm of the shared weights.
        distance: the same mean squared distance (consensus distance), not divided by anything.
        loss: mean training loss of all ranks over the last period, weighted by samples; NaN if nobody told it.
        not_finite: votes withheld because a rank's weights were not finite, over all rounds and ranks.
    """

    rounds: int = 0
    seconds: float = 0.0
    drift: float = 0.0
    distance: float = 0.0
    loss: float = float("nan")
    not_finite: int = 0


@dataclass(eq=False)
class _Cargo:
    """What came of a fragment's way: what all ranks said, the mean pseudo-gradient, and what travelled beside it."""

    meeting: Meeting
    mean: Float32s
    asides: list[Aside]


@dataclass(eq=False)
class _Flight:
    """A fragment on its way. ``departed`` are this rank's weights then; ``finite``: there was no NaN in them."""

    fragment: int
    lands_at: int
    departed: Float32s
    finite: bool
    cargo: Future[_Cargo]


class Rounds:
    """Carries ``plan`` out on this rank's ``store``, which holds the same weights on every rank at first.

    ``before_step()`` and ``after_step()`` enclose each step of the inner optimizer; every rank calls them and
    ``flush()``.

    Args:
        plan: when and how ranks meet.
        store: the tensors.
        channel: the ranks that meet. Where it is not ``concurrent``, training waits for a fragment also with
            ``overlap``; what it learns in between is the same.

    Raises:
        PlanError: more fragments than tensors.
    """

    def __init__(self, plan: Relaxed, store: Store, channel: Channel) -> None:
        self.plan = plan
        self.metrics = Metrics()
        self.step = 0
        self._store = store
        self._channel = channel
        codec, outer = plan.codec, plan.outer_optimizer()
        fragments = cut(store.weights.specs, plan.fragments, codec)
        self._parts = [Part(fragment, store.weights, outer, codec, channel) for fragment in fragments]
        self._calendar = Calendar(plan, len(fragments))
        self._begun = False
        self._departures = 0
        self._losses: list[tuple[float, float]] = []  # (loss, samples) since the last round
        self._samples = 0.0  # told since the last step
        self._flights: list[_Flight] = []
        self._courier = ThreadPoolExecutor(1, "hvdscale-rounds") if plan.overlap and channel.concurrent else None

    @property
    def trains(self) -> bool:
        """Every rank does."""
        return True

    @property
    def warming_up(self) -> bool:
        """The next step is one of the first, in which gradients are averaged."""
        return self.step < self.plan.warmup

    @property
    def bytes_sent(self) -> int:
        """Bytes this rank has sent for rounds."""
        return self._channel.sent_bytes

    def figures(self) -> dict[str, float]:
        """The metrics by name, with ``steps`` and ``bytes_sent``."""
        return {**asdict(self.metrics), "steps": self.step, "bytes_sent": self.bytes_sent}

    def tell(self, loss: float, samples: float = 1.0) -> None:
        """The mean loss of this rank's batch of ``samples`` samples, before ``after_step()``."""
        self._losses.append((float(loss), float(samples)))
        self._samples += samples

    @property
    def meets_next(self) -> bool:
        """Whether ``after_step()`` of the next step will read or write tensors."""
        step = self.step + 1
        if not self._begun:
            return step >= self.plan.warmup
        return bool(self._calendar.due(step)) or any(flight.lands_at <= step for flight in self._flights)

    def before_step(self) -> None:
        """The weights, if no rank has trained alone yet, are the anchor."""
        if not self._begun and not self.warming_up:
            self._begun = True
            for part in self._parts:
                part.begin()

    def after_step(self) -> bool:
        """Count one step, attempted or made, and hold the rounds that are due. Returns whether weights changed.

        The step counts for the samples told since the last one, or for one if nobody told.
        """
        samples, self._samples = self._samples or 1.0, 0.0
        self.step += 1
        if not self._begun:
            self.before_step()
            return False
        for part in self._parts:
            part.samples += samples
        changed = self._land_due()
        for fragment in self._calendar.due(self.step):
            flight = self._depart(fragment)
            if self.plan.overlap:
                self._flights.append(flight)
            else:
                self._land(flight, keep_work=self.plan.mixing < 1)
                changed = True
        return changed

    def flush(self) -> bool:
        """Finish the period: wait for ranks that still have steps to make, then agree on everything.

        On return every rank holds the anchor. On a boundary there is nothing left to say, and nothing is sent but
        headers. Returns whether weights changed.
        """
        if not self._begun:
            return False
        changed = self._land_due(everything=True)
        while True:  # others may have rounds to come: join them, first with what is left to say, then with weight zero
            due, fragment = self._calendar.next()
            flight = self._depart(fragment, Phase.LEAVING)
            meeting = flight.cargo.result().meeting
            if meeting.all_leave:
                break
            self._said(fragment)
            self._land(flight, keep_work=self.plan.mixing < 1)
            self.step, changed = max(self.step, due), True
        for fragment in range(len(self._parts)):
            flight = self._depart(fragment, Phase.FINISHING)
            changed |= self._land(flight, keep_work=False, settle=False)
            self._parts[fragment].adopt()  # also where nobody had anything to say: merging had rounded
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
        twin = Rounds(self.plan, store, self._channel)
        known = self._by_tensor()
        for name, arrays in twin._by_tensor().items():
            for slot, array in arrays.items():
                if name in known and known[name][slot].size == array.size:
                    array[:] = known[name][slot]
        twin.metrics, twin.step, twin._departures = self.metrics, self.step, self._departures
        for part, before in zip(twin._parts, self._parts, strict=True):
            part.lr = before.lr
        twin._calendar.restart(max(self.step, self.plan.warmup))
        return twin

    def _by_tensor(self) -> dict[str, dict[str, Float32s]]:
        """The outer optimizer's arrays, cut into tensors: views by name of the tensor, then of the slot."""
        specs, found = self._store.weights.specs, {}
        for part in self._parts:
            start = 0
            for position in part.fragment.positions:
                stop = start + specs[position].size
                found[specs[position].name] = {slot: array[start:stop] for slot, array in part.slots.items()}
                start = stop
        return found

    def outer_weights(self) -> list[Float32s]:
        """The anchor: float32 weights in the shapes and the order of ``store.weights.specs``. Copies."""
        if not self._begun:  # ranks hold the same weights still
            for part in self._parts:
                part.begin()
        specs = self._store.weights.specs
        weights: dict[int, Float32s] = {}
        for part in self._parts:
            start = 0
            for position in part.fragment.positions:
                stop = start + specs[position].size
                weights[position] = part.anchor[start:stop].reshape(specs[position].shape).copy()
                start = stop
        return [weights[position] for position in range(len(specs))]

    def state_dict(self) -> dict[str, Any]:
        """This rank's state, at any step: numbers that JSON holds, and under ``"arrays"`` float32 vectors by name.

        With fragments on their way it waits for them, so every rank must call it at the same step. Arrays are copies.
        """
        arrays = {f"{i}.{name}": array for i, part in enumerate(self._parts) for name, array in part.arrays().items()}
        flights = []
        for flight in self._flights:
            cargo = flight.cargo.result()
            at = f"flight.{flight.fragment}"
            arrays |= {f"{at}.departed": flight.departed, f"{at}.mean": cargo.mean}
            arrays |= {f"{at}.aside.{i}": aside.values for i, aside in enumerate(cargo.asides)}
            said = {"fragment": flight.fragment, "lands_at": flight.lands_at, "finite": flight.finite}
            flights.append({**said, "table": cargo.meeting.table.tolist()})
        return {
            **origin(self.plan, self._store, self._channel),
            "step": self.step,
            "begun": self._begun,
            "departures": self._departures,
            "losses": [list(told) for told in self._losses],
            "calendar": self._calendar.state(),
            "parts": [{"samples": part.samples, "lr": part.lr} for part in self._parts],
            "flights": flights,
            "metrics": asdict(self.metrics) | {"bytes_sent": self.bytes_sent},
            "arrays": {name: array.copy() for name, array in arrays.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was called: from then on every bit is that of the uninterrupted run.

        The weights themselves, the inner optimizer and the data are loaded by whoever saved them.

        Raises:
            StateError: the state of another rank, model, plan or number of ranks, or one that is incomplete.
        """
        check_origin(state, origin(self.plan, self._store, self._channel))
        arrays = state["arrays"]
        for i, part in enumerate(self._parts):
            for name, array in part.arrays().items():
                copy_into(arrays, f"{i}.{name}", array)
            part.samples, part.lr = state["parts"][i]["samples"], state["parts"][i]["lr"]
        self._flights = [self._resumed(flight, arrays) for flight in state["flights"]]
        self._calendar.load(state["calendar"])
        self._losses = [(loss, samples) for loss, samples in state["losses"]]
        self.step, self._begun, self._departures = state["step"], state["begun"], state["departures"]
        counted = dict(state["metrics"])
        self._channel.sent_bytes = counted.pop("bytes_sent")
        self.metrics = Metrics(**counted)

    def _resumed(self, saved: Mapping[str, Any], arrays: Mapping[str, Float32s]) -> _Flight:
        fragment = saved["fragment"]
        at, part = f"flight.{fragment}", self._parts[fragment]
        departed, mean = np.empty_like(part.anchor), np.empty_like(part.anchor)
        copy_into(arrays, f"{at}.departed", departed)
        copy_into(arrays, f"{at}.mean", mean)
        asides = self._asides(fragment)
        for i, aside in enumerate(asides):
            copy_into(arrays, f"{at}.aside.{i}", aside.values)
        cargo: Future[_Cargo] = Future()
        cargo.set_result(_Cargo(Meeting(np.array(saved["table"]), self._channel.ranks), mean, asides))
        return _Flight(fragment, saved["lands_at"], departed, saved["finite"], cargo)

    def _depart(self, number: int, phase: Phase = Phase.TRAINING) -> _Flight:
        started = time.perf_counter()
        part = self._parts[number]
        departed, change, square = part.departure()
        finite = bool(np.isfinite(square))
        asides = self._asides(number)
        told = sum(samples for _, samples in self._losses)
        header = Header(
            round=self._departures,
            fragment=number,
            phase=phase,
            step=self.step,
            weight=part.samples,
            finite=finite,
            square=square if finite else 0.0,
            loss=sum(loss * samples for loss, samples in self._losses) / told if told else float("nan"),
            beside=sum(aside.values.size for aside in asides),
        )

        def travel() -> _Cargo:
            meeting = Meeting(self._channel.table(header.row()), self._channel.ranks)
            if meeting.shares.any() and not meeting.all_leave:
                part.exchange(change, meeting.shares)
                for aside in asides:
                    aside.travel(self._channel, meeting.shares[self._channel.rank])
            return _Cargo(meeting, change, asides)

        cargo: Future[_Cargo] = Future()
        if self._courier is not None:
            cargo = self._courier.submit(travel)
        else:
            cargo.set_result(travel())
        self._departures += 1
        if phase is not Phase.LEAVING:
            self._said(number)
        self.metrics.seconds += time.perf_counter() - started
        return _Flight(number, self.step + self.plan.overlap, departed, finite, cargo)

    def _said(self, number: int) -> None:
        """What this rank had to say about the fragment is under way."""
        self._parts[number].samples, self._losses = 0.0, []

    def _asides(self, number: int) -> list[Aside]:
        asides = []
        if number == len(self._parts) - 1:  # once a period
            asides.append(Aside(self._store.buffers))
        if self.plan.state == "average":
            asides.append(Aside(self._store.moments(self._parts[number].fragment.positions)))
        return asides

    def _land_due(self, everything: bool = False) -> bool:
        landing = [flight for flight in self._flights if everything or flight.lands_at <= self.step]
        self._flights = [flight for flight in self._flights if flight not in landing]
        for flight in landing:
            self._land(flight, keep_work=True)
        return bool(landing)

    def _land(self, flight: _Flight, keep_work: bool, settle: bool = True) -> bool:
        started = time.perf_counter()
        part, cargo = self._parts[flight.fragment], flight.cargo.result()
        meeting, metrics = cargo.meeting, self.metrics
        metrics.not_finite += len(meeting.not_finite)
        voted = bool(meeting.shares.any())
        if voted:
            departed = flight.departed if keep_work and flight.finite else None
            norms = part.arrival(departed, cargo.mean, self.plan.mixing, self._store.lr())
            for aside in cargo.asides:
                aside.arrive()
            if self.plan.state == "reset":
                self._store.forget_moments(part.fragment.positions)
            metrics.rounds += 1
            metrics.loss = meeting.loss
            metrics.distance = max(0.0, meeting.mean_square - norms.mean_square)
            metrics.drift = (metrics.distance / norms.anchor_square) ** 0.5 if norms.anchor_square else 0.0
        if settle:
            self._calendar.settle(flight.fragment, metrics.drift)
        metrics.seconds += time.perf_counter() - started
        return voted
