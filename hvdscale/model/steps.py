"""Steps of a pipeline, in any framework: the ranks agree on a batch, run the schedule, and learn the loss."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import numpy as np
import xxhash

from hvdscale.errors import PlanError
from hvdscale.model.actions import Action
from hvdscale.model.batch import Batch, Claim, agree_on_batch, claim_of, cut, shares_of
from hvdscale.model.executor import Executor
from hvdscale.model.nests import Nests
from hvdscale.model.pipeline import Pipeline
from hvdscale.model.simulate import Event, Simulation
from hvdscale.model.verbs import Bytes, Verbs
from hvdscale.runtime.post import Post
from hvdscale.runtime.transport import Transport

__all__ = ["Stages", "Steps", "share_ties"]

T = TypeVar("T")


class Stages(Verbs[T], Protocol[T]):
    """The verbs, and what a whole step asks of them.

    Attributes:
        losses: of each micro-batch of the run, its share of the mean; on the last stage.
        error: what was wrong with the run, found in the middle of it; empty if nothing.
    """

    losses: dict[int, float]
    error: str

    def begin(self, batch: Batch) -> None:
        """The next run is of this batch."""
        ...

    def forget(self) -> None:
        """Throw away the gradients of this rank: the run was refused."""
        ...


class Steps:
    """What the ranks of one pipeline do at each step.

    Args:
        pipeline: the stages and their schedule.
        post: among its ranks, in the order of their stages.
        transport: among those of all pipelines of the copy, stage by stage.
        stages: this rank's.
        nests: values of the framework.
        count: of how many terms the loss of a target is the mean; ``None``: its samples.
        seed: of random numbers, for this copy of the model.
        around: what a training run happens inside of.
        abreast: pipelines of the copy, in which each stage is divided among tensor ranks; they take the same batches.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        post: Post,
        transport: Transport,
        stages: Stages[Any],
        nests: Nests[Any],
        count: Callable[[Any], Any] | None,
        seed: tuple[int, ...],
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        abreast: int = 1,
    ) -> None:
        self.taken = 0
        self._pipeline, self._transport, self._stages, self._nests = pipeline, transport, stages, nests
        self._count, self._seed, self._around = count or nests.rows, seed, around
        self._first, self._last = post.rank == 0, post.rank == pipeline.ranks - 1
        self._abreast, self._place = abreast, transport.rank % abreast
        self._executor: Executor[Any] = Executor(post, stages, list(pipeline.ties.values()))
        self._checked = False
        self._events: list[Event] = []

    def train(self, x: Any, y: Any, scale: float = 1.0) -> float:
        """Forward and backward passes of a batch: its loss. Collective over the pipeline.

        Raises:
            PlanError: a batch that cannot be divided, something missing, or a loss that is not a mean.
            DesyncError: ranks bring different batches.
        """
        value = self._run("train", x, y, scale)
        self.taken += 1
        return value

    def evaluate(self, x: Any, y: Any) -> float:
        """Forward passes alone: the loss. Collective over the pipeline; raises as ``train``."""
        return self._run("evaluate", x, y, 1.0)

    def measured(self) -> Simulation:
        """The last training step as it ran. Collective over the pipeline.

        Raises:
            PlanError: before the first training step.
        """
        if not self._events:
            raise PlanError("There is a measured step after the first train_step(); none was taken.")
        mine = [(event.action.text(), event.start, event.end) for event in self._events]
        every = [json.loads(data) for data in self._transport.allgather(json.dumps(mine).encode())]
        told = every[self._place :: self._abreast]
        begin = min(start for row in told for _, start, _ in row)
        events = tuple(
            tuple(Event(Action.parse(text), start - begin, end - begin) for text, start, end in row) for row in told
        )
        microbatches = max(event.action.microbatch for row in events for event in row if event.action.kind == "F") + 1
        return replace(self._pipeline.simulation, schedule=self._pipeline.training(microbatches), events=events)

    def _run(self, does: str, x: Any, y: Any, scale: float) -> float:
        agreed = agree_on_batch(self._transport, self._claim(does, x, y, scale), True, self._abreast)
        trains = does == "train"
        pieces = cut(agreed.samples, self._pipeline.microbatches)
        xs = [self._nests.select(x, piece) for piece in pieces] if self._first else []
        ys = [self._nests.select(y, piece) for piece in pieces] if self._last else []
        seed = (*self._seed, self.taken)
        self._stages.begin(Batch(xs, ys, shares_of(ys, self._count), trains, seed, scale, not self._checked))
        signature = (does, agreed.x, agreed.y)
        if trains:
            schedule = self._pipeline.training(len(pieces))
            with self._around():
                self._events = self._executor.run(schedule, signature, time.perf_counter)
        else:
            self._executor.run(self._pipeline.evaluation(len(pieces)), signature)
        self._checked = True
        return self._loss_of_all()

    def _claim(self, does: str, x: Any, y: Any, scale: float) -> Claim:
        claim = claim_of(does, x, y, scale, self._nests)
        if self._abreast == 1 or claim.error:
            return claim
        of_x = self._digest(x) if self._first else ""
        return replace(claim, x_digest=of_x, y_digest=self._digest(y) if self._last else "")

    def _digest(self, value: Any) -> str:
        if value is None:
            return ""
        tensors: list[Any] = []
        digest = xxhash.xxh64(json.dumps(self._nests.pack(value, tensors)).encode())
        for tensor in tensors:
            digest.update(self._stages.view(tensor).data)
        return digest.hexdigest()

    def _loss_of_all(self) -> float:
        """What the last stage found, told to all; an error of any stage is everyone's."""
        own = [sum(self._stages.losses.values()) if self._last else 0.0, self._stages.error]
        told = [json.loads(data) for data in self._transport.allgather(json.dumps(own).encode())]
        error = next((message for _, message in told if message), "")
        if error:
            self._checked = False
            self._stages.forget()
            raise PlanError(error)
        return float(told[-self._abreast + self._place][0])


def share_ties(post: Post, pipeline: Pipeline, values: Sequence[Bytes | None]) -> list[int]:
    """Shared parameters start from the values of the first rank that holds them. Collective over the pipeline.

    Args:
        values: the bytes of each, in the order of ``pipeline.ties``, to be sent or received into; ``None`` where
            other ranks alone hold it.

    Returns:
        The numbers of those that were received.
    """
    received = []
    for number, (stages, value) in enumerate(zip(pipeline.ties.values(), values, strict=True)):
        if value is None:
            continue
        first, *others = dict.fromkeys(stage % pipeline.ranks for stage in stages)
        if post.rank == first:
            for ticket in [post.send(np.ascontiguousarray(value), rank, number) for rank in others]:
                ticket.wait()
        else:
            post.receive(value, first, number).wait()
            received.append(number)
    return received
