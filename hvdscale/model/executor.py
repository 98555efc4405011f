"""Carrying a schedule out on one rank: the same object that was simulated, through a framework's verbs and a post."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import numpy as np

from hvdscale.model.actions import Action, Schedule
from hvdscale.model.shapes import Form, Shapes, Signature
from hvdscale.model.simulate import Event
from hvdscale.model.verbs import Bundle, Bytes, Spec, Verbs
from hvdscale.runtime.post import Post, Ticket

__all__ = ["Executor"]

T = TypeVar("T")
Clock = Callable[[], float]

# How many receives beyond the one that is waited for have their buffers ready.
_WINDOW = 4


@dataclass
class _Run(Generic[T]):
    """One pass through a schedule. Values are kept by (stage, micro-batch), then by the other stage."""

    schedule: Schedule
    shapes: Shapes
    row: tuple[Action, ...]
    inputs: dict[tuple[int, int], dict[int, Bundle[T]]] = field(default_factory=dict)
    outputs: dict[tuple[int, int], dict[int, Bundle[T]]] = field(default_factory=dict)
    gradients_in: dict[tuple[int, int], dict[int, Sequence[T]]] = field(default_factory=dict)
    gradients_out: dict[tuple[int, int], dict[int, Sequence[T]]] = field(default_factory=dict)
    posted: dict[Action, tuple[list[T], list[Ticket]]] = field(default_factory=dict)
    outgoing: deque[tuple[Ticket, object]] = field(default_factory=deque)  # with what must stay alive until then

    def __post_init__(self) -> None:
        self.to_post = deque(action for action in self.row if action.kind in ("RF", "RB"))
        self.recomputed = {(action.stage, action.microbatch) for action in self.row if action.kind == "C"}
        self.trains = any(action.kind in ("B", "I") for action in self.row)


class Executor(Generic[T]):
    """Runs schedules on this rank.

    Args:
        post: among the ranks of the pipeline, in the order of their first stages.
        verbs: this rank's stages.
        ties: for each shared parameter the stages that hold it.

    Shapes are learned: in the first run of a signature a header precedes every bundle; later runs of the same
    signature post their receives ahead, into buffers of the right size.
    """

    def __init__(self, post: Post, verbs: Verbs[T], ties: Sequence[Sequence[int]] = ()) -> None:
        self._post, self._verbs, self._ties = post, verbs, ties
        self._known: dict[Signature, Shapes] = {}

    def run(self, schedule: Schedule, signature: Signature, clock: Clock | None = None) -> list[Event]:
        """Do this rank's actions. All ranks of the pipeline call it with the same schedule and signature.

        A rank that fails closes its post, so that those who wait for it are told.

        Args:
            signature: equal where all shapes and dtypes of the run are equal.
            clock: seconds from any moment on.

        Returns:
            Each action with its times, if there is a clock.

        Raises:
            TransportError: another rank is gone, or has sent something else.
            PlanError: activations have other shapes than in an earlier run of the same signature.
        """
        run: _Run[T] = _Run(schedule, self._known.get(signature, Shapes()), schedule.actions[self._post.rank])
        events: list[Event] = []
        try:
            for action in run.row:
                self._post_ahead(run)
                start = clock() if clock else 0.0
                self._do(run, action)
                if clock:
                    events.append(Event(action, start, clock()))
                while run.outgoing and run.outgoing[0][0].test():
                    run.outgoing.popleft()
            for ticket, _ in run.outgoing:
                ticket.wait()
        except BaseException:
            self._post.close()
            raise
        run.shapes.complete = True
        self._known[signature] = run.shapes
        return events

    def _do(self, run: _Run[T], action: Action) -> None:
        kind, stage, m = action.kind, action.stage, action.microbatch
        if kind == "F":
            self._forward(run, stage, m)
        elif kind in ("B", "I"):
            self._backward(run, stage, m, kind)
        elif kind == "W":
            self._verbs.backward_weight(stage, m)
        elif kind == "C":
            self._verbs.recompute(stage, m)
        elif kind == "D":
            self._verbs.ready(stage)
        elif kind == "T":
            self._sum_tied(run, m)
        elif kind == "SF":
            self._send_outputs(run, action)
        elif kind == "RF":
            self._receive_inputs(run, action)
        elif kind == "SB":
            self._send(run, action, run.gradients_out[stage, m].pop(_peer(action)))
        elif kind == "RB":
            run.gradients_in.setdefault((stage, m), {})[_peer(action)] = self._arrived(run, action)

    def _forward(self, run: _Run[T], stage: int, m: int) -> None:
        keep = run.trains and (stage, m) not in run.recomputed
        given = self._verbs.forward(stage, m, run.inputs.pop((stage, m), {}), keep)
        for target, bundle in given.items():
            if run.schedule.rank_of(target) == self._post.rank:
                run.shapes.learn((stage, target, m), self._form(bundle))
                run.inputs.setdefault((target, m), {})[stage] = bundle
            else:
                run.outputs.setdefault((stage, m), {})[target] = bundle

    def _backward(self, run: _Run[T], stage: int, m: int, kind: str) -> None:
        backward = self._verbs.backward if kind == "B" else self._verbs.backward_input
        for source, gradients in backward(stage, m, run.gradients_in.pop((stage, m), {})).items():
            here = run.schedule.rank_of(source) == self._post.rank
            if here:
                run.gradients_in.setdefault((source, m), {})[stage] = gradients
            else:
                run.gradients_out.setdefault((stage, m), {})[source] = gradients

    def _send_outputs(self, run: _Run[T], action: Action) -> None:
        stage, m, target = action.stage, action.microbatch, _peer(action)
        bundle = run.outputs[stage, m].pop(target)
        form = self._form(bundle)
        run.shapes.learn((stage, target, m), form)
        if not run.shapes.complete:
            header = form.encode()
            length = np.array([header.nbytes], np.int64).view(np.uint8)
            for part in (length, header):
                self._dispatch(run, part, part, action)
        self._send(run, action, bundle.tensors)

    def _receive_inputs(self, run: _Run[T], action: Action) -> None:
        stage, m, source = action.stage, action.microbatch, _peer(action)
        if not run.shapes.complete:
            length = np.empty(8, np.uint8)
            self._collect(run, length, action).wait()
            header = np.empty(int(length.view(np.int64)[0]), np.uint8)
            self._collect(run, header, action).wait()
            run.shapes.learn((source, stage, m), Form.decode(header))
        bundle = Bundle(tuple(self._arrived(run, action)), run.shapes[source, stage, m].structure)
        run.inputs.setdefault((stage, m), {})[source] = bundle

    def _post_ahead(self, run: _Run[T]) -> None:
        """Receives in the order in which they will be waited for, so that messages find their buffers there."""
        while run.shapes.complete and run.to_post and len(run.posted) <= _WINDOW:
            self._post_receive(run, run.to_post.popleft())

    def _post_receive(self, run: _Run[T], action: Action) -> None:
        tensors = [self._verbs.empty(spec) for spec in self._expected(run, action)]
        tickets = [self._collect(run, self._verbs.view(tensor), action) for tensor in tensors]
        run.posted[action] = (tensors, tickets)

    def _arrived(self, run: _Run[T], action: Action) -> Sequence[T]:
        if action not in run.posted:
            self._post_receive(run, action)
        tensors, tickets = run.posted.pop(action)
        for ticket in tickets:
            ticket.wait()
        return tensors

    def _expected(self, run: _Run[T], action: Action) -> tuple[Spec, ...]:
        peer, m = _peer(action), action.microbatch
        if action.kind == "RF":
            return run.shapes[peer, action.stage, m].specs
        return run.shapes[action.stage, peer, m].gradients

    def _form(self, bundle: Bundle[T]) -> Form:
        return Form(tuple(self._verbs.spec(tensor) for tensor in bundle.tensors), bundle.structure)

    def _send(self, run: _Run[T], action: Action, tensors: Sequence[T]) -> None:
        for tensor in tensors:
            self._dispatch(run, self._verbs.view(tensor), tensor, action)

    def _dispatch(self, run: _Run[T], data: Bytes, owner: object, action: Action) -> None:
        to = run.schedule.rank_of(_peer(action))
        run.outgoing.append((self._post.send(data, to, _tag(run.schedule, action)), (data, owner)))

    def _collect(self, run: _Run[T], out: Bytes, action: Action) -> Ticket:
        return self._post.receive(out, run.schedule.rank_of(_peer(action)), _tag(run.schedule, action))

    def _sum_tied(self, run: _Run[T], number: int) -> None:
        """The sum is made of the same parts in the same order on every rank, so it has the same bits."""
        ranks = list(dict.fromkeys(run.schedule.rank_of(stage) for stage in sorted(self._ties[number])))
        own = self._verbs.tied_gradient(number)
        tag = 2 * run.schedule.stages**2 * run.schedule.microbatches + number
        spec, view = self._verbs.spec(own), self._verbs.view(own)
        parts = {rank: own if rank == self._post.rank else self._verbs.empty(spec) for rank in ranks}
        others = [rank for rank in ranks if rank != self._post.rank]
        tickets = [self._post.receive(self._verbs.view(parts[rank]), rank, tag) for rank in others]
        tickets += [self._post.send(view, rank, tag) for rank in others]
        for ticket in tickets:
            ticket.wait()
        self._verbs.set_tied_gradient(number, [parts[rank] for rank in ranks])


def _peer(action: Action) -> int:
    assert action.peer is not None, f"a message has another stage; {action} names none"
    return action.peer


def _tag(schedule: Schedule, action: Action) -> int:
    """The same on both sides: of a link, a direction and a micro-batch."""
    source, target = sorted((action.stage, _peer(action)))
    backward = action.kind in ("SB", "RB")
    link = (source * schedule.stages + target) * 2 + backward
    return link * schedule.microbatches + action.microbatch
