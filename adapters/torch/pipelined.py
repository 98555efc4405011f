"""A model whose layers lie on the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hvdscale.errors import HvdscaleError
from hvdscale.model.batch import cut
from hvdscale.model.layout import Layout
from hvdscale.model.mesh import Mesh
from hvdscale.model.pipeline import Pipeline
from hvdscale.model.rules import Rules, check_rules
from hvdscale.model.simulate import Simulation
from hvdscale.model.staging import Staging, refuse_together
from hvdscale.model.steps import Steps, share_ties
from hvdscale.model.survey import graph_of
from hvdscale.model.ways import share_line
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.post import Post
from hvdscale.runtime.transport import broadcast
from hvdscale.torch.broadcast import broadcast_parameters
from hvdscale.torch.bundles import NESTS
from hvdscale.torch.capture import capture
from hvdscale.torch.channel import open_post
from hvdscale.torch.features import convert_layers, placements_of, splits_of, take_parts
from hvdscale.torch.host import in_memory
from hvdscale.torch.placing import Names, build, give_up, tie, tied_parameters
from hvdscale.torch.program import Program, from_layers
from hvdscale.torch.randomness import apart
from hvdscale.torch.reducer import Announcer
from hvdscale.torch.roles import Part, find_parts
from hvdscale.torch.runtime import control, world
from hvdscale.torch.sharded import ShardedModel
from hvdscale.torch.stages import TorchStages
from hvdscale.torch.survey import measure, readings
from hvdscale.torch.teams import connect, team_along, tensor_team

__all__ = ["Pipelined", "shard_stages"]

Loss = Callable[[Any, Any], Tensor]


class Pipelined(ShardedModel):
    """Made by ``shard_model(by="layers")`` and ``shard_model(by="graph")``.

    Attributes:
        pipeline: the stages and their schedule.
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
        parts: Mapping[str, Part] | None = None,
    ) -> None:
        parts = parts or {}
        here = world().rank
        place = mesh.coordinates(here)
        mine = [node for stage in pipeline.stages_of(place.pp) for node in pipeline.part.parts[stage]]
        names = Names(program)
        layout = names.layout(program, pipeline, mesh, splits_of(program.root, parts))
        self._whole = sum({id(t): t.numel() for t in names.whole.values() if isinstance(t, nn.Parameter)}.values())
        known = build(program, mine, (seed, 0))
        local = names.local(layout, here, known)
        held = give_up(program, mine)
        if mesh.tp > 1:
            team = tensor_team(mesh)
            take_parts(local, layout, team, team_along(mesh, "dp", "tp"))
            convert_layers(program.root, parts, team, held)
        super().__init__(mesh, layout, held, local)
        self.pipeline, self._program, self._note = pipeline, program, note
        post, transport = connect(mesh, open_post, control)
        tied = [local[key] if layout.holds(key, here) else None for key in pipeline.ties]
        _share(post, pipeline, tied)
        parameters = list(self.parameters())
        self._stages = TorchStages(program, pipeline, loss, staging.count, parameters, tied)
        self._stages.when_ready = self._stage_is_ready
        self._announcer = Announcer(parameters)
        self._steps = Steps(
            pipeline, post, transport, self._stages, NESTS, staging.count, (seed, place.dp), self._announcing, mesh.tp
        )
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
        return torch.tensor(self._steps.train(x, y, loss_scale))

    def eval_step(self, x: Any = None, y: Any = None) -> Tensor:
        """The loss on one batch with all layers in evaluation mode, on every rank. Collective over the pipeline."""
        with self._evaluating(), torch.no_grad():
            return torch.tensor(self._steps.evaluate(x, y))

    def measured(self) -> Simulation:
        """The last training step as it ran: beside ``pipeline.simulation``, what was predicted. Collective.

        ``hvdscale.model.drawing.as_picture(model.pipeline.simulation, "step.png", measured=model.measured())`` draws
        both. Ranks of one host share a clock; those of several do not, and their rows are shifted.

        Raises:
            PlanError: before the first training step.
        """
        return self._steps.measured()

    @property
    def steps(self) -> int:
        """Training steps taken; dropout depends on it."""
        return self._steps.taken

    def count(self) -> tuple[int, int]:
        return self._whole, sum(p.numel() for p in self.parameters())

    def describe(self) -> str:
        whole, held = self.count()
        lines = [self.pipeline.describe(), share_line(held, whole, self.rank, self.mesh.tp)]
        return "\n".join([*lines, *([self._note] if self._note else [])])

    @contextmanager
    def _announcing(self) -> Iterator[None]:
        self._unready = self._stages_of_parameters()
        with self._announcer:
            yield

    def _stages_of_parameters(self) -> dict[int, set[int]]:
        """For each parameter here, by ``id``, the stages here that use it."""
        used: dict[int, set[int]] = {}
        for stage in self.pipeline.stages_of(self.mesh.coordinates(self.rank).pp):
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


def shard_stages(
    model: Any, mesh: Mesh, by: str, loss: Loss | None, staging: Staging, rules: Rules = "auto"
) -> Pipelined:
    """Cut ``model`` into the stages of a pipeline, and their layers over the tensor ranks. Collective.

    See ``shard_model``.

    Raises:
        PlanError: a model, a mesh or a way to cut it that cannot be; on every rank.
        DesyncError: ranks hold different models or ask for different things.
    """
    mesh.check(world().size)
    program, note, error = None, "", ""
    parts: dict[str, Part] = {}
    try:
        staging.check(mesh, loss, ("mean",), splits=by == "layers")
        program, note = _units(model, by, staging)
        if mesh.tp > 1:
            parts = find_parts(program.root, check_rules(rules))
            Layout(mesh, placements_of(program.root, parts))
    except HvdscaleError as refusal:
        error = str(refusal)
    refuse_together(error, control())
    assert program is not None
    assert loss is not None
    names = Names(program)
    ties = tied_parameters(program, names)
    tensors = [(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in names.whole.items()]
    facts = staging.facts(mesh, by, [unit.name for unit in program.units], list(ties.values()))
    facts["sample"] = NESTS.text(staging.sample)
    facts["split"] = ", ".join(f"{name} {part}" for name, part in parts.items())
    agree(Fingerprint.of(tensors, facts), control(), "the model to be sharded")
    sample = None
    if staging.sample is not None:
        sample = NESTS.select(staging.sample, cut(max(NESTS.rows(staging.sample), 1), staging.microbatches)[0])
    read = readings(program)
    with apart():
        graph = graph_of(read, ties, None if sample is None else lambda: measure(program, sample), control())
    pipeline = staging.plan(graph, mesh.pp, read)
    seed = torch.initial_seed() if staging.seed is None else staging.seed
    seed = int(broadcast(control(), str(seed).encode()))
    return Pipelined(mesh, program, pipeline, loss, staging, seed, note, parts)


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


def _share(post: Post, pipeline: Pipeline, tied: Sequence[Tensor | None]) -> None:
    """Shared parameters start from the values of the first rank that holds them."""
    flat = [None if p is None else in_memory(p).view(-1) for p in tied]
    views = [None if f is None else f.view(torch.uint8).numpy() for f in flat]
    for number in share_ties(post, pipeline, views):
        parameter, values = tied[number], flat[number]
        assert parameter is not None
        assert values is not None
        with torch.no_grad():
            parameter.copy_(values.view(parameter.shape))
