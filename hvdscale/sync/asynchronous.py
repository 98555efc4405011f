"""A rank under a parameter server: what it pushes and pulls, and what it serves, on any framework's tensors.

It stands where ``Rounds`` stands for plans with rounds.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from hvdscale.errors import PlanError, StateError
from hvdscale.runtime import timeline
from hvdscale.runtime.post import Post
from hvdscale.sync.aside import Aside
from hvdscale.sync.metrics import Told
from hvdscale.sync.parameter_server import ParameterServer
from hvdscale.sync.recovery import Recovery
from hvdscale.sync.requests import Ask, Message
from hvdscale.sync.servers import Servers
from hvdscale.sync.state import check_origin, copy_into, origin, reading
from hvdscale.sync.tensors import Store
from hvdscale.update.outer import Float32s

__all__ = ["Asynchronous"]


@dataclass
class _Figures:
    """Running figures of this rank.

    Args:
        rounds: pushes it made.
        seconds: its training spent on them, waiting and copying.
        bytes_sent, server_cpu_seconds: before its service of now: by the run that it resumes, or the store before.
        not_finite: pushes it withheld because its weights were not finite.
        lead_max: the most pushes it was ahead of the slowest when it went on.
        stale: how many of its pushes met so many pushes of others since its last pull.
    """

    rounds: int = 0
    seconds: float = 0.0
    bytes_sent: int = 0
    server_cpu_seconds: float = 0.0
    not_finite: int = 0
    lead_max: int = 0
    stale: dict[int, int] = field(default_factory=dict)

    def named(self, steps: int, ranks_lost: int) -> dict[str, float]:
        stale = dict(sorted(self.stale.items()))
        count = sum(stale.values())
        return {
            "rounds": self.rounds,
            "steps": steps,
            "seconds": self.seconds,
            "bytes_sent": self.bytes_sent,
            "server_cpu_seconds": self.server_cpu_seconds,
            "not_finite": self.not_finite,
            "ranks_lost": ranks_lost,
            "lead_max": self.lead_max,
            "stale_mean": sum(k * n for k, n in stale.items()) / count if count else 0.0,
            "stale_max": max(stale, default=0),
            **{f"stale_{k}": n for k, n in stale.items()},
        }


class Asynchronous:
    """Carries ``plan`` out on this rank's ``store``, which holds the same weights on every rank at first.

    ``before_step()`` and ``after_step()`` enclose each step of the inner optimizer; every rank calls ``flush()``.

    Args:
        plan: how far ranks may get apart, and where the shared weights lie.
        store: the tensors.
        connect: opens a post among the ranks. Collective.

    Raises:
        PlanError: more servers than ranks, none left to train, or complex weights.
    """

    def __init__(self, plan: ParameterServer, store: Store, connect: Callable[[], Post]) -> None:
        self.plan = plan
        self.step = 0
        self._figures = _Figures()
        self._store, self._connect = store, connect
        plan.check_weights(store.weights.specs)
        self._positions = range(len(store.weights.specs))
        total = sum(spec.size for spec in store.weights.specs)
        self._post = connect()
        self._servers = Servers(plan, self._post, total)
        self._service = self._servers.service
        self._recovery = Recovery(store, self._post.ranks[self._post.rank])
        self._base = np.empty(total, np.float32)  # the weights as last pulled
        narrow = any(spec.dtype != "float32" for spec in store.weights.specs)
        self._rounding = np.zeros_like(self._base) if narrow else None  # what writing them lost
        self._clock = 0  # pushes, as the servers count
        self._pushes = 0  # made by this rank
        self._since = 0  # steps since the last push
        self._told = Told()  # since the last step
        self._samples = 0.0  # since the last push
        self._begun = False
        self._fresh = True  # nothing was pushed since everyone flushed
        self._end = weakref.finalize(self, self._service.part)
        self._end.atexit = False  # then the service's own handler parts, which may have to go on serving first

    # Steps ----------------------------------------------------------------------------------------------------

    @property
    def trains(self) -> bool:
        """Whether this rank makes steps."""
        return self._servers.trains

    @property
    def warming_up(self) -> bool:
        """The next step is one of the first, in which gradients are averaged."""
        return self.step < self.plan.warmup

    @property
    def anew(self) -> int:
        """The step after which this rank's inner optimizer last began anew; 0 if it never did."""
        return self._recovery.at

    @property
    def meets_next(self) -> bool:
        """Whether ``after_step()`` of the next step will read or write tensors."""
        if not self._begun:
            return self.step + 1 >= self.plan.warmup
        return self._since + 1 >= self.plan.every

    def tell(self, loss: float, samples: float = 1.0) -> None:
        """How many samples this rank's batch has, before ``after_step()``; the loss is not used."""
        self._told.tell(loss, samples)
        self._told.losses.clear()

    def before_step(self) -> None:
        """The weights, if no rank has trained alone yet, are those shared.

        Raises:
            PlanError: this rank is set aside.
        """
        if not self.trains:
            raise self.plan.set_aside(self._servers.rank)
        if not self._begun and not self.warming_up:
            self._begin()

    def after_step(self) -> bool:
        """Count one step, and push if it is time to. Returns whether weights changed."""
        timeline.step()
        samples = self._told.a_step()
        self.step += 1
        if not self._begun:
            self.before_step()
            return False
        self._samples += samples
        self._since += 1
        if self._since < self.plan.every:
            return False
        self._push(Ask.PUSH)
        return True

    def flush(self) -> bool:
        """Push what is left, and wait until everyone flushes; on return every rank holds the shared weights.

        A rank set aside serves in here. Returns whether weights changed.

        Raises:
            TransportError: pushes were lost, or a rank is gone.
        """
        if not self._begun:
            if self.warming_up:
                return False
            self._begin()
        answers = self._push(Ask.FLUSH)
        self._servers.check_counts(answers, self._pushes)
        self._clock = max(answer.clock for answer in answers.values())
        self._fresh = self._service.idle = True
        return True

    def outer_weights(self) -> list[Float32s]:
        """The shared weights now: float32 in the shapes and the order of ``store.weights.specs``. Copies."""
        if not self._begun:
            self._store.weights.read(self._positions, self._base)
        weights = self._base.copy()
        if self._begun and not self._fresh:
            places = self._servers.places
            for server, answer in self._servers.ask({server: Message(Ask.READ) for server in places}).items():
                weights[places[server]] = answer.values
        specs = self._store.weights.specs
        parts = np.split(weights, np.cumsum([spec.size for spec in specs])[:-1])
        return [part.reshape(spec.shape) for spec, part in zip(specs, parts, strict=True)]

    def figures(self) -> dict[str, float]:
        """The figures by name; ``stale_k`` counts the pushes that met ``k`` of others."""
        return self._counted().named(self.step, len(self._service.missing))

    @staticmethod
    def first_figures() -> dict[str, float]:
        """The figures before anything has happened."""
        return _Figures().named(0, 0)

    def over(self, store: Store) -> Asynchronous:
        """Finish the period, and go on with ``store``, which has more tensors or fewer. Collective.

        Raises:
            PlanError: some ranks are set aside, which make no steps and do not see that it changed.
        """
        if self.plan.dedicated:
            raise PlanError(
                "With dedicated=True ranks set aside cannot follow when parameters are frozen, unfrozen or added. "
                "Do that before DistributedOptimizer is called, or leave dedicated out."
            )
        self.flush()
        twin = Asynchronous(self.plan, store, self._connect)
        self._end()
        twin._figures, twin.step, twin._recovery = self._counted(), self.step, self._recovery.over(store)
        return twin

    def _counted(self) -> _Figures:
        """The figures with what the service has counted so far."""
        figures, service = self._figures, self._service
        return replace(
            figures,
            bytes_sent=figures.bytes_sent + service.sent_bytes,
            server_cpu_seconds=figures.server_cpu_seconds + service.cpu_seconds,
        )

    # Exchange -------------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self._begun = True
        self._store.weights.read(self._positions, self._base)
        self._servers.begin(self._base)

    def _push(self, kind: Ask) -> dict[int, Message]:
        """Push what changed, if anything did, and take the weights that come back."""
        started = time.perf_counter()
        change = self._change() if self._since else None
        self._service.idle, self._fresh = False, False
        beside = Aside(self._store.buffers) if kind == Ask.FLUSH else None
        told = beside.values.astype(np.float64) if beside is not None and self.trains else np.zeros(0)
        places = self._servers.places
        first = min(places)
        self._clock += change is not None
        self._pushes += change is not None
        messages = {}
        for server, place in places.items():
            values = np.zeros(0, np.float32) if change is None else change[place]
            weight = self._samples if self._since else 0.0
            ledger = told if server == first else told[:0]
            messages[server] = Message(kind, self._clock, weight, ledger=ledger, values=values)
        with timeline.span("push and pull"), timeline.travel("transfer", push=self._pushes):
            answers = self._servers.ask(messages)
        if change is not None:
            self._note(answers)
        for server, place in places.items():
            self._base[place] = answers[server].values
        self._write()
        if change is not None and not change.size:
            self._recovery.come_back(self.step, voted=True)
        mean = answers[first].ledger[self._post.size :]  # empty where no rank's was finite
        if beside is not None and mean.size:
            beside.values[:] = mean
            beside.arrive()
        self._since, self._samples = 0, 0.0
        self._figures.seconds += time.perf_counter() - started
        return answers

    def _change(self) -> Float32s:
        """float32[n]: the weights as pulled minus those now; empty where they are not finite."""
        change = np.empty_like(self._base)
        self._store.weights.read(self._positions, change)
        if self._rounding is not None:
            change -= self._rounding
        np.subtract(self._base, change, out=change)
        if np.isfinite(np.dot(change, change)) or np.isfinite(change).all():
            return change
        self._figures.not_finite += 1
        return change[:0]

    def _write(self) -> None:
        self._store.weights.write(self._positions, self._base)
        if self._rounding is not None:
            self._store.weights.read(self._positions, self._rounding)
            self._rounding -= self._base

    def _note(self, answers: Mapping[int, Message]) -> None:
        figures = self._figures
        figures.rounds += 1
        met = max(answer.stale for answer in answers.values())
        figures.stale[met] = figures.stale.get(met, 0) + 1
        figures.lead_max = max(figures.lead_max, *(self._clock - answer.clock for answer in answers.values()))

    # Checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """This rank's state: numbers that JSON holds, and under ``"arrays"`` float32 vectors by name. Copies.

        Every rank that trains calls it after the same number of steps. The first one's holds the servers' state, too.
        """
        state: dict[str, Any] = {**self._origin(), "step": self.step, "begun": self._begun}
        if not self._begun or not self.trains:
            return {**state, "arrays": {}}
        answers = self._servers.ask({server: Message(Ask.SAVE, self._clock) for server in self._servers.places})
        arrays = {"base": self._base.copy()}
        if self._rounding is not None:
            arrays["rounding"] = self._rounding.copy()
        ledgers = {}
        for number, answer in enumerate(answers.values()):
            if answer.ledger.size:
                ledgers[str(number)] = answer.ledger.tolist()
                arrays[f"server.{number}"] = answer.values.copy()
        figures = asdict(self._counted())
        return {
            **state,
            "clock": self._clock,
            "pushes": self._pushes,
            "since": self._since,
            "samples": self._samples,
            "anew": self.anew,
            "servers": ledgers,
            "figures": {**figures, "stale": [[k, n] for k, n in figures["stale"].items()]},
            "arrays": arrays,
        }

    @reading()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where ``state_dict()`` was called. Every rank that trains calls it, before its first step.

        Raises:
            StateError: the state of another rank, model, plan or number of ranks, or one that is incomplete.
        """
        check_origin(state, self._origin())
        if self._begun and not state["begun"]:
            raise StateError(
                "This state of optimizer.sync is from the warm-up, and here ranks train alone already. Load it before "
                "the first step, into an optimizer wrapped anew."
            )
        self.step = state["step"]
        if not state["begun"] or not self.trains:
            return
        if not self._begun:
            self._begin()
        arrays, ledgers = state["arrays"], state["servers"]
        copy_into(arrays, "base", self._base)
        if self._rounding is not None:
            copy_into(arrays, "rounding", self._rounding)
        messages = {}
        for number, server in enumerate(self._servers.places):
            given = str(number) in ledgers
            if given and f"server.{number}" not in arrays:
                raise StateError(f"The state of optimizer.sync holds an array 'server.{number}'; it is not there.")
            ledger = np.array(ledgers[str(number)] if given else [], float)
            values = np.asarray(arrays[f"server.{number}"] if given else [], np.float32)
            messages[server] = Message(Ask.LOAD, ledger=ledger, values=values)
        self._clock, self._pushes = state["clock"], state["pushes"]
        self._since, self._samples = state["since"], state["samples"]
        self._recovery.at = state.get("anew", 0)  # not in states of older versions
        figures = dict(state["figures"])
        self._figures = _Figures(**{**figures, "stale": dict(figures["stale"])})
        self._fresh = self._service.idle = False
        self._servers.ask(messages)

    def _origin(self) -> dict[str, Any]:
        return origin(self.plan, self._store.weights.specs, self._post)
