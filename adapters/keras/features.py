"""Sharding by features: the layers of a built Keras model split over the tensor ranks, in place.

Shoeybi et al., "Megatron-LM", arXiv 1909.08053. Models, layers and variables stay the same objects; the layers named by
the rules change their class, and their variables keep a part of their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import xxhash
from keras import layers, ops, tree

from hvdscale.errors import DesyncError, PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.keras_hooks import install_hooks
from hvdscale.keras.lazy import give_value
from hvdscale.keras.names import unique_names
from hvdscale.keras.parallel_layers import (
    ColumnParallelDense,
    ColumnParallelEinsumDense,
    HeadParallelAttention,
    RowParallelDense,
    RowParallelEinsumDense,
    TeamDropout,
    VocabParallelEmbedding,
    keep_part,
    parallel_class,
    sizes_of,
)
from hvdscale.keras.roles import Part, einsum_splits, find_parts, named_layers
from hvdscale.keras.sharded import ShardedModel
from hvdscale.model.layout import Layout, Placement, Split
from hvdscale.model.mesh import Mesh
from hvdscale.model.rules import Rules, check_rules
from hvdscale.model.ways import share_line
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.team import Team

__all__ = ["FeatureSharded", "convert_layers", "placements_of", "shard_features", "splits_of", "take_parts"]

Loss = Callable[[Any, Any], Any]


class FeatureSharded(ShardedModel):
    """A Keras model whose layers are split over the tensor ranks. ``model`` is still the model that was given."""

    def __init__(self, mesh: Mesh, layout: Layout, model: Any, parts: Mapping[str, Part], loss: Loss | None) -> None:
        super().__init__(mesh, layout, model, dict(zip(layout.names, model.weights, strict=True)))
        self._parts, self._loss = dict(parts), loss

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.model(*inputs, **named)

    def train_step(self, x: Any, y: Any) -> tuple[Any, list[Any]]:
        loss = self._the_loss()
        return verbs.value_and_gradients(lambda: loss(self.model(x, training=True), y), self.trainable_variables)

    def eval_step(self, x: Any, y: Any) -> Any:
        return self._the_loss()(self.model(x, training=False), y)

    def _the_loss(self) -> Loss:
        if self._loss is None:
            raise PlanError(
                "This model was sharded without a loss. Give shard_model(..., loss=function(outputs, targets)), or "
                "train it with fit."
            )
        return self._loss

    def describe(self) -> str:
        whole, held = self.count()
        rows = [("layer", "role", "variable", "whole", f"rank {self.rank}")]
        for name in self.layout.names:
            if self.layout[name].split is not None:
                owner = max((p for p in self._parts if f"/{p}/" in f"/{name}"), key=len, default="")
                here = self.layout.local_shape(name, self.rank)
                role = self._parts[owner].role if owner else ""
                rows.append((owner, role, name, str(list(self.layout[name].shape)), str(list(here))))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        share = f"{share_line(held, whole, self.rank)}, with tp={self.mesh.tp}"
        return "\n".join([*lines, share])


def shard_features(model: Any, mesh: Mesh, rules: Rules, loss: Loss | None) -> FeatureSharded:
    """Split the layers of ``model`` in place. Collective. See ``shard_model``.

    Raises:
        PlanError: rules, layers or a mesh that cannot be; a model that has no variables yet.
        DesyncError: ranks hold different models.
    """
    mesh.check(verbs.world().size)
    if mesh.pp > 1:
        raise PlanError(f'by="features" makes no stages, and the mesh has pp={mesh.pp}. Use pp=1, or by="layers".')
    if not model.built:
        raise PlanError("The model has no variables yet, so there is nothing to split. Call model.build(shape) first.")
    if getattr(getattr(model, "optimizer", None), "built", False):
        raise PlanError("The model's optimizer is built already, for whole variables. Shard the model before compile.")
    install_hooks()
    team = verbs.tensor_team(mesh)
    parts = find_parts(model, check_rules(rules))
    weights, splits = list(model.weights), splits_of(model, parts)
    placements = placements_of(model, splits)
    layout = Layout(mesh, placements)
    tensors = [(str(i), p.shape, f"{p.dtype} {p.split}") for i, p in enumerate(placements)]
    agree(Fingerprint.of(tensors, {"mesh": mesh, "sharded": "by features"}), verbs.control(), "the model to be sharded")
    take_parts(weights, splits, team, verbs.team_along(mesh, "dp", "pp", "tp"))
    _same_seeds(named_layers(model), verbs.team_along(mesh, "pp", "tp"))
    every = [model, *model._flatten_layers(include_self=False)]
    convert_layers(model, parts, team, layout, every)
    verbs.track_parts(every)
    object.__setattr__(model, "_hvdscale_sharded", True)  # XLA is off: it has no kernels for what layers exchange
    _watch_inputs(model, team)
    return FeatureSharded(mesh, layout, model, parts, loss)


def placements_of(model: Any, splits: Mapping[int, Split]) -> tuple[Placement, ...]:
    """Of every variable that is saved, on one stage."""
    weights = list(model.weights)
    return tuple(
        Placement(name, tuple(v.shape), str(v.dtype), split=splits.get(id(v)))
        for name, v in zip(unique_names(weights), weights, strict=True)
    )


def splits_of(model: Any, parts: Mapping[str, Part]) -> dict[int, Split]:
    """How each variable of ``model`` is divided, by its ``id``.

    Raises:
        PlanError: two layers share a variable, and split it in two ways.
    """
    every = named_layers(model)
    splits: dict[int, Split] = {}

    def divide(name: str, variable: Any, split: Split) -> None:
        if splits.setdefault(id(variable), split) != split:
            raise PlanError(f"{name} shares {variable.path} with a layer that splits it another way. Choose one way.")

    for name, part in parts.items():
        layer = every[name]
        if part.role == "heads":
            for inner, role in _inner(layer):
                for attribute, split in einsum_splits(name, inner, role):
                    divide(name, getattr(inner, attribute), split)
        elif part.role != "dropout":
            for attribute, split in part.splits:
                divide(name, getattr(layer, attribute), split)
    return splits


def _inner(attention: Any) -> list[tuple[Any, str]]:
    """The layers of attention, and the role of each."""
    inputs = [attention._query_dense, attention._key_dense, attention._value_dense]
    inputs += [attention._gate_dense] if attention._use_gate else []
    return [*((layer, "column") for layer in inputs), (attention._output_dense, "row")]


def take_parts(variables: Sequence[Any], splits: Mapping[int, Split], team: Team, everyone: Team) -> None:
    """One variable after the other becomes that of the first rank of ``everyone``, and then this rank's part of it.

    Those that have no values yet (made under ``keras.StatelessScope(initialize_variables=False)``) get them here, so
    that no rank ever holds the whole model.
    """
    with verbs.eager():
        for variable in variables:
            give_value(variable)
            whole = np.ascontiguousarray(ops.convert_to_numpy(variable))
            first = everyone.first(whole.reshape(-1).view(np.uint8)).view(whole.dtype).reshape(whole.shape)
            if id(variable) in splits:
                keep_part(variable, first, splits[id(variable)], team)
            else:
                variable.assign(first)


def _same_seeds(every: Mapping[str, Any], copy: Team) -> None:
    """Dropout outside the split layers must be the same on all ranks of a copy: all take its first rank's seeds."""
    verbs.same_random_state(copy)
    with verbs.eager():
        for layer in every.values():
            for generator in layer._seed_generators:
                state = np.ascontiguousarray(ops.convert_to_numpy(generator.state))
                generator.state.assign(copy.first(state))


def convert_layers(model: Any, parts: Mapping[str, Part], team: Team, layout: Layout, here: Sequence[Any]) -> None:
    """Make those of the layers ``here`` that are split, and whose variables are parts already, parallel ones."""
    every = named_layers(model)
    held = {id(layer) for layer in here}

    def sizes(name: str) -> tuple[int, ...]:
        """Of a dense layer, which may lie elsewhere: how much of its kernel each rank of the team has."""
        kernel, start = parts[name].splits[0][1], f"{every[name].path}/kernel"
        whole = next(layout[n].shape for n in layout.names if layout[n].split is not None and n.startswith(start))
        return sizes_of(kernel, whole[kernel.axis], team.size)

    for name, part in parts.items():
        layer = every[name]
        if id(layer) not in held:
            continue
        dense = isinstance(layer, layers.Dense)
        if part.role == "vocab" and isinstance(layer, layers.Embedding):
            parallel_class(layer, VocabParallelEmbedding, team, sizes_of(Split(0), layer.input_dim, team.size))
        elif part.role == "heads":
            heads = sizes_of(Split(0), layer._num_heads, team.size)
            parallel_class(layer, HeadParallelAttention, team, heads)
            parallel_class(layer._output_dense, RowParallelEinsumDense, team, heads)
            if layer._dropout:
                parallel_class(layer._dropout_layer, TeamDropout, team, heads, dim=1)
        elif part.role == "dropout":
            parallel_class(layer, TeamDropout, team, sizes(part.of), dim=-1)
        elif part.role == "row":
            parallel_class(layer, RowParallelDense if dense else RowParallelEinsumDense, team, sizes(name))
        else:
            cls = ColumnParallelDense if dense else ColumnParallelEinsumDense
            parallel_class(layer, cls, team, sizes(name), whole_output=part.whole_output)
        if dense:
            layer.input_spec = keras.layers.InputSpec(min_ndim=2)


def _watch_inputs(model: Any, team: Team) -> None:
    """In training, ranks of a team must be given the same batch."""
    if team.size == 1:
        return
    train_step = model.train_step

    def compare(*arrays: np.ndarray) -> np.ndarray:
        digest = xxhash.xxh64()
        for array in arrays:
            digest.update(np.ascontiguousarray(array).tobytes())
        own = np.array([digest.intdigest() >> 1], np.int64)
        everyone = np.concatenate(team.collect(own, [(1,)] * team.size))
        different = [r for r, theirs in zip(team.ranks, everyone, strict=True) if theirs != everyone[0]]
        if different:
            raise DesyncError(
                f"Of the tensor ranks {list(team.ranks)}, {different} were given another batch: ranks that share a "
                "model's features read the same data, mesh.coordinates(rank).dp of mesh.dp."
            )
        return np.int32(0)  # type: ignore[return-value]

    def step(data: Any) -> Any:
        return train_step(verbs.after_check(compare, data, tree.flatten(data)))

    object.__setattr__(model, "train_step", step)
