"""A model whose layers lie on the ranks of a pipeline."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from horovod.torch import ProcessSet
from torch import Tensor, nn

from hvdscale.errors import HvdscaleError, PlanError
from hvdscale.model.actions import Action
from hvdscale.model.batch import Claim, agree_on_batch, cut
from hvdscale.model.executor import Executor
from hvdscale.model.mesh import Mesh
from hvdscale.model.partition import Objective
from hvdscale.model.pipeline import Pipeline, plan_pipeline
from hvdscale.model.simulate import Event, Simulation
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.post import Post, SoloPost
from hvdscale.runtime.transport import SoloTransport, Transport, broadcast
from hvdscale.torch.broadcast import broadcast_parameters
from hvdscale.torch.bundles import select, shape_text
from hvdscale.torch.capture import capture
from hvdscale.torch.channel import open_post
from hvdscale.torch.mean_check import rows
from hvdscale.torch.placing import Names, build, give_up, tie, tied_parameters
from hvdscale.torch.process_sets import intern
from hvdscale.torch.program import Program, from_layers
from hvdscale.torch.randomness import apart
from hvdscale.torch.reducer import Announcer
from hvdscale.torch.runtime import control, world
from hvdscale.torch.sharded import ShardedModel
from hvdscale.torch.stages import Batch, TorchStages
from hvdscale.torch.survey import graph_of

__all__ = ["Pipelined", "Staging", "shard_stages"]

Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Staging:
    """How a model is cut into stages and run; see ``shard_model`` for what each means."""

    microbatches: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    recompute: bool = False
    balance: Objective | None = None
    sample: Any = None
    memory_cap: float | None = None
    whole: Sequence[type[nn.Module] | str] = ()
    ties: Sequence[Sequence[str]] = ()
    count: Callable[[Any], Any] | None = None
    seed: int | None = None


class Pipelined(ShardedModel):
    """Made by ``shard_model(by="layers")`` and ``shard_model(by="graph")``.

    Attributes:
        pipeline: the stages and their schedule.
        steps: training steps taken; dropout depends on it.
    """

    def __init__(
        self,
        mesh: Mesh,
        program: Program,
        pipeline: Pipeline,
        loss: Loss,
        staging: Staging,
        seed: int,
        note: str = "",
    ) -> None:
        here = world().rank
        place = mesh.coordinates(here)
        mine = [node for stage in pipeline.stages_of(place.pp) for node in pipeline.part.parts[stage]]
        names = Names(program)
        layout = names.layout(program, pipeline, mesh)
        self._whole = sum({id(t): t.numel() for t in names.whole.values() if isinstance(t, nn.Parameter)}.values())
        known = build(program, mine, (seed, 0))
        local = names.local(layout, here, known)
        super().__init__(mesh, layout, give_up(program, mine), local)
        self.pipeline, self.steps = pipeline, 0
        self._program = program
        self._loss, self._count = loss, staging.count or rows
        self._seed, self._note = (seed, place.dp), note
        self._first, self._last = place.pp == 0, place.pp == (pipeline.stages - 1) % pipeline.ranks
        self._checked = False
        self._events: list[Event] = []
        post, self._control = _connections(mesh)
        tied = [_as_parameter(local[key]) if layout.holds(key, here) else None for key in pipeline.ties]
        self._stages = TorchStages(program, pipeline, loss, self._count, tied)
        self._executor: Executor[Tensor] = Executor(post, self._stages, list(pipeline.ties.values()))
        _share(post, pipeline, tied)
        self._announcer = Announcer(list(self.parameters()))
        self._stages.when_ready = self._stage_is_ready
        self._unready: dict[int, set[int]] = {}
        broadcast_parameters(dict(local), mesh.rank(0, place.pp, place.tp), self.data_ranks)

    def train_step(self, x: Any = None, y: Any = None, *, loss_scale: float = 1.0) -> Tensor:
        """One forward and backward pass of a batch, divided into micro-batches. Collective over the pipeline.

        Gradients of the mean loss over the batch are added to ``.grad``, as by ``loss.backward()`` in one process.

        Args:
            x: the input of the model; ranks without the first stage may leave it out.
            y: the target; ranks without the last stage may leave it out.
            loss_scale: what the loss is multiplied by before the backward pass.

        Returns:
            The loss, on every rank.

        Raises:
            PlanError: a batch that cannot be divided, something missing, or a loss that is not a mean.
            DesyncError: ranks bring different batches.
        """
        value = self._step("train", x, y, loss_scale)
        self.steps += 1
        return value

    def eval_step(self, x: Any = None, y: Any = None) -> Tensor:
        """The loss on one batch with all layers in evaluation mode, on every rank. Collective over the pipeline."""
        with self._evaluating(), torch.no_grad():
            return self._step("evaluate", x, y, 1.0)

    def measured(self) -> Simulation:
        """The last training step as it ran: beside ``pipeline.simulation``, what was predicted. Collective.

        ``hvdscale.model.drawing.as_picture(model.pipeline.simulation, "step.png", measured=model.measured())`` draws
        both. Ranks of one host share a clock; those of several do not, and their rows are shifted.

        Raises:
            PlanError: before the first training step.
        """
        if not self._events:
            raise PlanError("There is a measured step after the first train_step(); none was taken.")
        mine = [(event.action.text(), event.start, event.end) for event in self._events]
        told = [json.loads(data) for data in self._control.allgather(json.dumps(mine).encode())]
        begin = min(start for row in told for _, start, _ in row)
        events = tuple(
            tuple(Event(Action.parse(text), start - begin, end - begin) for text, start, end in row) for row in told
        )
        microbatches = max(event.action.microbatch for row in events for event in row if event.action.kind == "F") + 1
        predicted = self.pipeline.simulation
        return replace(predicted, schedule=self.pipeline.training(microbatches), events=events)

    def count(self) -> tuple[int, int]:
        return self._whole, sum(p.numel() for p in self.parameters())

    def describe(self) -> str:
        whole, held = self.count()
        lines = [self.pipeline.describe()]
        lines.append(f"{held:,} of {whole:,} parameters on rank {self._rank}: {held / max(whole, 1):.3f}")
        return "\n".join([*lines, *([self._note] if self._note else [])])

    def _step(self, does: str, x: Any, y: Any, scale: float) -> Tensor:
        agreed = agree_on_batch(self._control, _claim(does, x, y, scale), targets=True)
        trains = does == "train"
        pieces = cut(agreed.samples, self.pipeline.microbatches)
        xs = [select(x, piece) for piece in pieces] if self._first else []
        ys = [select(y, piece) for piece in pieces] if self._last else []
        seed = (*self._seed, self.steps)
        check = not self._checked
        self._stages.begin(Batch(xs, ys, _shares(ys, self._count), trains, seed, scale, check))
        plan = self.pipeline
        schedule = plan.training(len(pieces)) if trains else plan.evaluation(len(pieces))
        signature = (does, agreed.x, agreed.y)
        if trains:
            self._unready = self._stages_of_parameters()
            with self._announcer:
                self._events = self._executor.run(schedule, signature, time.perf_counter)
        else:
            self._executor.run(schedule, signature)
        self._checked = True
        return self._loss_of_all()

    def _stages_of_parameters(self) -> dict[int, set[int]]:
        """For each parameter here, by ``id``, the stages here that use it."""
        used: dict[int, set[int]] = {}
        for stage in self.pipeline.stages_of(self.mesh.coordinates(self._rank).pp):
            for node in self.pipeline.part.parts[stage]:
                for tensor in self._program.tensors(self._program.units[node]).values():
                    used.setdefault(id(tensor), set()).add(stage)
        return used

    def _stage_is_ready(self, stage: int) -> None:
        """Gradients that no other stage adds to can go to the other copies of the model."""
        done = []
        for parameter in self.parameters():
            stages = self._unready.get(id(parameter), set())
            if stage in stages:
                stages.discard(stage)
                done += [] if stages else [parameter]
        self._announcer.complete([parameter for parameter in done if parameter.requires_grad])

    def _loss_of_all(self) -> Tensor:
        """What the last stage found, told to all."""
        found = [sum(self._stages.losses.values()), self._stages.error] if self._last else None
        told = self._control.allgather(json.dumps(found).encode())
        value, error = next(message for message in map(json.loads, told) if message is not None)
        if error:
            self._checked = False
            for parameter in self.parameters():
                parameter.grad = None
            raise PlanError(error)
        return torch.tensor(value)


def shard_stages(model: Any, mesh: Mesh, by: str, loss: Loss | None, staging: Staging) -> Pipelined:
    """Cut ``model`` into the stages of a pipeline. Collective. See ``shard_model``.

    Raises:
        PlanError: a model, a mesh or a way to cut it that cannot be; on every rank.
        DesyncError: ranks hold different models or ask for different things.
    """
    mesh.check(world().size)
    program, note, error = None, "", ""
    try:
        _check(mesh, loss, staging)
        program, note = _units(model, by, staging)
    except HvdscaleError as refusal:
        error = str(refusal)
    _together(error)
    assert program is not None
    assert loss is not None
    names = Names(program)
    ties = tied_parameters(program, names)
    tensors = [(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in names.whole.items()]
    facts = {
        "mesh": mesh,
        "sharded": f"by {by}, {staging.schedule}, {staging.microbatches} micro-batches, {staging.chunks} stages a rank",
        "cut": f"{staging.balance}, recompute={staging.recompute}, memory_cap={staging.memory_cap}",
        "layers": ", ".join(unit.name for unit in program.units),
        "shared": ", ".join(ties.values()),
        "sample": shape_text(staging.sample),
    }
    agree(Fingerprint.of(tensors, facts), control(), "the model to be sharded")
    sample = None
    if staging.sample is not None:
        piece = cut(max(rows(staging.sample), 1), staging.microbatches)[0]
        sample = select(staging.sample, piece)
    with apart():
        graph = graph_of(program, sample, ties, control())
    readers = [number for number, unit in enumerate(program.units) if -1 in unit.reads]
    pipeline = plan_pipeline(
        graph,
        mesh.pp,
        staging.microbatches,
        staging.schedule,
        readers=readers,
        chunks=staging.chunks,
        recompute=staging.recompute,
        objective=staging.balance or ("time" if sample is not None else "params"),
        memory_cap=staging.memory_cap,
    )
    pipeline.training(staging.microbatches)
    seed = torch.initial_seed() if staging.seed is None else staging.seed
    seed = int(broadcast(control(), str(seed).encode()))
    return Pipelined(mesh, program, pipeline, loss, staging, seed, note)


def _check(mesh: Mesh, loss: Loss | None, staging: Staging) -> None:
    if mesh.tp > 1:
        raise PlanError(
            f"by='layers' and by='graph' make stages of whole layers, and the mesh has tp={mesh.tp}. Use tp=1, or "
            "by='features' for what one layer is divided into."
        )
    if not callable(loss):
        raise PlanError("A pipeline ends in its loss: give loss=..., a function of the model's output and the target.")
    reduction = getattr(loss, "reduction", "mean")
    if reduction != "mean":
        raise PlanError(
            f"loss must be a mean over samples, so that those of micro-batches add up; its reduction is {reduction!r}. "
            "Use reduction='mean'."
        )
    if staging.balance in ("time", "memory") and staging.sample is None:
        raise PlanError(f"balance={staging.balance!r} is measured: give sample=..., a batch of the model's input.")


def _units(model: Any, by: str, staging: Staging) -> tuple[Program, str]:
    if by == "layers":
        program, kept = from_layers(model), tuple[str, ...]()
    else:
        program, kept = capture(model, staging.whole)
    tie(program, staging.ties)
    note = ""
    if kept:
        note = f"in one piece, since it cannot be traced: {', '.join(kept)}"
    return program, note


def _together(error: str) -> None:
    """An error of one rank is everyone's."""
    told = control().allgather(error.encode())
    for rank, message in enumerate(told):
        if message:
            alone = len(set(told)) == 1
            raise PlanError(message.decode() if alone else f"rank {rank}: {message.decode()}")


def _connections(mesh: Mesh) -> tuple[Post, Transport]:
    """Among the ranks of this pipeline, in the order of their stages. Collective over all ranks."""
    if mesh.pp == 1:
        return SoloPost(), SoloTransport()
    groups = mesh.groups("pp")
    process_set: ProcessSet = intern(groups)[groups.index(mesh.group(world().rank, "pp"))]
    return open_post(process_set), control(process_set)


def _share(post: Post, pipeline: Pipeline, tied: Sequence[nn.Parameter | None]) -> None:
    """Shared parameters start from the values of the first rank that holds them."""
    for number, (stages, parameter) in enumerate(zip(pipeline.ties.values(), tied, strict=True)):
        if parameter is None:
            continue
        first, *others = dict.fromkeys(stage % pipeline.ranks for stage in stages)
        flat = parameter.detach().contiguous().view(-1)
        if post.rank == first:
            for ticket in [post.send(flat.view(torch.uint8).numpy(), rank, number) for rank in others]:
                ticket.wait()
        else:
            post.receive(flat.view(torch.uint8).numpy(), first, number).wait()
            with torch.no_grad():
                parameter.copy_(flat.view(parameter.shape))


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    assert isinstance(tensor, nn.Parameter)
    return tensor


def _claim(does: str, x: Any, y: Any, scale: float) -> Claim:
    samples = {name: rows(value) for name, value in (("x", x), ("y", y)) if value is not None}
    error = ""
    for name, count in samples.items():
        if count < 0:
            error = (
                f"the tensors of {name} have one first dimension, the samples; they are "
                f"{shape_text(x if name == 'x' else y)}."
            )
    if not error and len(set(samples.values())) > 1:
        error = f"x and y have as many samples; they have {samples['x']} and {samples['y']}."
    return Claim(
        does if scale == 1.0 else f"{does} with loss_scale={scale:g}",
        "" if x is None else shape_text(x),
        "" if y is None else shape_text(y),
        max(samples.values(), default=0),
        error,
    )


def _shares(ys: Sequence[Any], count: Callable[[Any], Any]) -> list[float]:
    counts = [float(count(y)) for y in ys]
    total = sum(counts)
    return [c / total if total else 1 / len(counts) for c in counts]
