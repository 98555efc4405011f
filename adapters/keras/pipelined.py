"""A Keras model whose layers lie on the ranks of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import keras
import numpy as np
from keras import ops, tree

from hvdscale.errors import HvdscaleError, PlanError
from hvdscale.keras.backend import NAME, verbs
from hvdscale.keras.capture import capture, from_layers
from hvdscale.keras.features import convert_layers, placements_of, splits_of, take_parts
from hvdscale.keras.held import Held
from hvdscale.keras.lazy import give_up, give_value
from hvdscale.keras.names import renumbered, unique_names
from hvdscale.keras.program import Program, Unit
from hvdscale.keras.replicas import broadcast_variables, path_of
from hvdscale.keras.roles import Part, find_parts, named_layers
from hvdscale.keras.sharded import ShardedModel
from hvdscale.keras.survey import measure, readings
from hvdscale.model.batch import cut
from hvdscale.model.layout import Layout, Split
from hvdscale.model.mesh import Mesh
from hvdscale.model.pipeline import Pipeline
from hvdscale.model.rules import Rules, check_rules
from hvdscale.model.simulate import Simulation
from hvdscale.model.staging import Staging, refuse_together
from hvdscale.model.steps import Steps, share_ties
from hvdscale.model.survey import graph_of
from hvdscale.model.ways import share_line
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.transport import broadcast

__all__ = ["Pipelined", "shard_stages"]

Loss = Callable[[Any, Any], Any]

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


class Pipelined(ShardedModel):
    """Made by ``shard_model(by="layers")`` and ``shard_model(by="graph")``.

    ``model`` holds this rank's layers. ``model.compile(optimizer)``, ``fit`` and ``evaluate`` work, where every rank
    gives the same batches.

    Attributes:
        pipeline: the stages and their schedule.
        loss: the one given.
    """

    def __init__(
        self,
        mesh: Mesh,
        program: Program,
        pipeline: Pipeline,
        loss: Loss,
        staging: Staging,
        seed: int,
        note: str,
        parts: Mapping[str, Part],
    ) -> None:
        here = verbs.world().rank
        place = mesh.coordinates(here)
        mine = [node for stage in pipeline.stages_of(place.pp) for node in pipeline.part.parts[stage]]
        weights = list(program.model.weights)
        splits = splits_of(program.model, parts)
        layout = _layout(mesh, program, pipeline, weights, splits)
        local = {name: v for name, v in zip(layout.names, weights, strict=True) if layout.holds(name, here)}
        self._whole = sum(int(np.prod(v.shape)) for v in weights if v.trainable)
        units = [program.units[node] for node in mine]
        own = list(local.values())
        _give_up_others(program, own, weights)
        if mesh.tp > 1:
            team = verbs.tensor_team(mesh)
            take_parts(own, splits, team, verbs.team_along(mesh, "dp", "tp"))
            convert_layers(program.model, parts, team, layout, [layer for unit in units for layer in unit.layers])
        for variable in (*own, *(generator.state for unit in units for generator in unit.generators)):
            give_value(variable)
        super().__init__(mesh, layout, _held(units, own, self), local)
        self.pipeline, self.loss, self._note = pipeline, getattr(loss, "given", loss), note
        post, transport = verbs.connect(mesh, verbs.open_post, verbs.control)
        keys = dict(zip(_keys(weights), weights, strict=True))
        tied: list[Any] = [keys[key] if any(keys[key] is v for v in local.values()) else None for key in pipeline.ties]
        arrays = [None if v is None else np.array(ops.convert_to_numpy(v)) for v in tied]
        flat = [None if a is None else a.reshape(-1).view(np.uint8) for a in arrays]
        for number in share_ties(post, pipeline, flat):
            tied[number].assign(arrays[number])
        values = [v.value for v in self.trainable_variables]
        shared = [None if v is None else v.value for v in tied]
        self._stages = verbs.Stages(program, pipeline, loss, staging.count, values, shared)
        self._steps = Steps(
            pipeline, post, transport, self._stages, verbs.NESTS, staging.count, (seed, place.dp), abreast=mesh.tp
        )
        broadcast_variables(list(local.values()), mesh.rank(0, place.pp, place.tp), self.data_ranks)

    def train_step(self, x: Any = None, y: Any = None, *, loss_scale: float = 1.0) -> tuple[Any, list[Any]]:
        """One forward and backward pass of a batch, divided into micro-batches. Collective over the pipeline.

        Args:
            x: the input of the model; ranks without the first stage may leave it out.
            y: the target; ranks without the last stage may leave it out.
            loss_scale: what the loss is multiplied by before the backward pass.

        Returns:
            The loss, on every rank, and the gradients of ``trainable_variables``; nothing is updated.

        Raises:
            PlanError: a batch that cannot be divided, something missing, or a loss that is not a mean.
            DesyncError: ranks bring different batches.
        """
        loss = self._steps.train(_tensors(x), _tensors(y), loss_scale)
        return ops.convert_to_tensor(loss, "float32"), self._stages.take_gradients()

    def eval_step(self, x: Any = None, y: Any = None) -> Any:
        """The loss on one batch, nothing being learned, on every rank. Collective over the pipeline."""
        return ops.convert_to_tensor(self._steps.evaluate(_tensors(x), _tensors(y)), "float32")

    def measured(self) -> Simulation:
        """The last training step as it ran: beside ``pipeline.simulation``, what was predicted. Collective.

        Raises:
            PlanError: before the first training step.
        """
        return self._steps.measured()

    @property
    def steps(self) -> int:
        """Training steps taken; dropout depends on it."""
        return self._steps.taken

    def count(self) -> tuple[int, int]:
        return self._whole, sum(int(np.prod(v.shape)) for v in self.trainable_variables)

    def describe(self) -> str:
        whole, held = self.count()
        lines = [self.pipeline.describe(), share_line(held, whole, self.rank, self.mesh.tp)]
        return "\n".join([*lines, *([self._note] if self._note else [])])


def shard_stages(
    model: Any, mesh: Mesh, by: str, loss: Loss | None, staging: Staging, rules: Rules = "auto"
) -> Pipelined:
    """Cut ``model`` into the stages of a pipeline, and their layers over the tensor ranks. Collective.

    See ``shard_model``.

    Raises:
        PlanError: a model, a mesh or a way to cut it that cannot be; on every rank.
        DesyncError: ranks hold different models or ask for different things.
    """
    mesh.check(verbs.world().size)
    program, error, note = None, "", ""
    if staging.schedule == "zb":  # Keras computes the gradients of a layer's inputs and weights together
        note = f'"zb" runs as "1f1b": Keras on {NAME} has no backward pass in two halves'
        staging = replace(staging, schedule="1f1b")
    parts: dict[str, Part] = {}
    try:
        staging.check(mesh, loss, _MEANS, splits=by == "layers")
        program = from_layers(model, staging.sample) if by == "layers" else capture(model, staging.sample)
        _check(program)
        if mesh.tp > 1:
            parts = find_parts(program.model, check_rules(rules))
            _check_splits(mesh, program, parts)
    except HvdscaleError as refusal:
        error = str(refusal)
    refuse_together(error, verbs.control())
    assert program is not None
    assert loss is not None
    weights = list(program.model.weights)
    ties = _ties(program, weights)
    tensors = [(path_of(v), tuple(v.shape), str(v.dtype)) for v in weights]
    facts = staging.facts(mesh, by, [path_of(unit) for unit in program.units], list(ties.values()))
    facts["split"] = _roles(program, parts)
    sample = _tensors(staging.sample)
    facts["sample"] = verbs.NESTS.text(sample)
    agree(Fingerprint.of(tensors, facts), verbs.control(), "the model to be sharded")
    if sample is not None:
        sample = verbs.NESTS.select(sample, cut(max(verbs.NESTS.rows(sample), 1), staging.microbatches)[0])
    read = readings(program)
    graph = graph_of(read, ties, None if sample is None else lambda: measure(program, sample), verbs.control())
    pipeline = staging.plan(graph, mesh.pp, read)
    seed = keras.src.utils.rng_utils.get_random_seed() if staging.seed is None else staging.seed
    seed = int(np.random.default_rng().integers(2**31)) if seed is None else seed
    seed = int(broadcast(verbs.control(), str(seed).encode()))
    return Pipelined(mesh, program, pipeline, loss, staging, seed, note, parts)


def _check(program: Program) -> None:
    for unit in program.units:
        held = [v.path for v in unit.variables if getattr(v, "regularizer", None) is not None]
        held += [layer.path for layer in unit.layers if getattr(layer, "activity_regularizer", None) is not None]
        if held:
            raise PlanError(
                f"{held[0]} has a regularizer, a loss of its own, which a pipeline does not count. Use the optimizer's "
                "weight_decay, or make it part of loss=..."
            )


def _check_splits(mesh: Mesh, program: Program, parts: Mapping[str, Part]) -> None:
    splits = splits_of(program.model, parts)
    for unit in program.units:
        for it in unit.holds:
            if id(it) in splits:
                raise PlanError(
                    f"{it.path} is split over the tensor ranks, and {unit.name} uses it by itself, as a whole. Give "
                    "rules=... without the layer it belongs to."
                )
    Layout(mesh, placements_of(program.model, splits))  # refuses an axis that cannot be divided so


def _roles(program: Program, parts: Mapping[str, Part]) -> str:
    """What becomes of each layer, in words that are the same on all ranks, whatever else they have built."""
    places = {name: place for place, name in enumerate(named_layers(program.model))}
    return ", ".join(f"{places[name]}: {part.role} {part.whole_output}" for name, part in parts.items())


def _keys(weights: Sequence[Any]) -> list[str]:
    """Names that are the same on all ranks, whatever else they have built."""
    return renumbered(unique_names(weights))


def _ties(program: Program, weights: Sequence[Any]) -> dict[int, str]:
    """Variables that several units train: ``id`` -> their key."""
    keys = {id(v): key for v, key in zip(weights, _keys(weights), strict=True)}
    users: dict[int, int] = {}
    for unit in program.units:
        for variable in unit.variables:
            users[id(variable)] = users.get(id(variable), 0) + variable.trainable
    return {number: keys[number] for number, count in users.items() if count > 1}


def _layout(
    mesh: Mesh, program: Program, pipeline: Pipeline, weights: Sequence[Any], splits: Mapping[int, Split]
) -> Layout:
    """Where each variable lies; what nothing uses stays on the first rank."""
    ranks: dict[int, set[int]] = {}
    for unit, stage in zip(program.units, pipeline.part.part_of, strict=True):
        for variable in unit.variables:
            ranks.setdefault(id(variable), set()).add(stage % pipeline.ranks)
    stages = [tuple(sorted(ranks.get(id(v), {0}))) for v in weights]
    placements = zip(placements_of(program.model, splits), stages, strict=True)
    return Layout(mesh, tuple(replace(placement, stages=some) for placement, some in placements))


def _give_up_others(program: Program, own: Sequence[Any], weights: Sequence[Any]) -> None:
    """Free the memory of what other ranks hold."""
    kept = {id(v) for v in own}
    every = [program.model, *program.model._flatten_layers(include_self=False)]
    give_up([v for v in weights if id(v) not in kept], every)


def _held(units: Sequence[Unit], own: Sequence[Any], sharded: Any) -> Held:
    """The layers of ``units``, as a model."""
    tops = list({id(it): it for unit in units for it in unit.holds}.values())
    layers = [it for it in tops if isinstance(it, keras.layers.Layer)]
    inside = {id(v) for layer in layers for v in layer.weights}
    return Held(layers, [v for v in own if id(v) not in inside], sharded)


def _tensors(value: Any) -> Any:
    """Arrays as backend tensors; real numbers as Keras keeps them, as ``fit`` does."""

    def tensor(array: Any) -> Any:
        if isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating):
            array = array.astype(keras.config.floatx())
        return ops.convert_to_tensor(array)

    return None if value is None else tree.map_structure(tensor, value)
