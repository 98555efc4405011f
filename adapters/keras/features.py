"""Sharding by features: the layers of a built Keras model split over the tensor ranks, in place.

Shoeybi et al., "Megatron-LM", arXiv 1909.08053. Models, layers and variables stay the same objects; the layers named by
the rules change their class, and their variables keep a part of their values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import xxhash
from keras import layers, ops, tree

from hvdscale.errors import DesyncError, PlanError
from hvdscale.keras.backend import verbs
from hvdscale.keras.keras_hooks import install_hooks
from hvdscale.keras.lazy import give_value
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
from hvdscale.keras.sharded import ShardedModel, unique_names
from hvdscale.model.layout import Layout, Placement, Split
from hvdscale.model.mesh import Mesh
from hvdscale.model.rules import Rules, check_rules
from hvdscale.model.ways import share_line
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.team import Team

__all__ = ["FeatureSharded", "shard_features"]

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
    every = named_layers(model)
    cuts = _cuts(every, parts)
    weights = list(model.weights)
    names = unique_names(weights)
    placements = tuple(
        Placement(n, tuple(v.shape), str(v.dtype), split=cuts.get(id(v))) for n, v in zip(names, weights, strict=True)
    )
    layout = Layout(mesh, placements)
    tensors = [(str(i), p.shape, f"{p.dtype} {p.split}") for i, p in enumerate(placements)]
    agree(Fingerprint.of(tensors, {"mesh": mesh, "sharded": "by features"}), verbs.control(), "the model to be sharded")
    _take_parts(weights, cuts, team, verbs.team_along(mesh, "dp", "pp", "tp"))
    _same_seeds(every, verbs.team_along(mesh, "pp", "tp"))
    for name, part in parts.items():
        _convert(every[name], part, team, layout, every)
    verbs.track_parts([model, *model._flatten_layers(include_self=False)])
    object.__setattr__(model, "_hvdscale_sharded", True)  # XLA is off: it has no kernels for what layers exchange
    _watch_inputs(model, team)
    return FeatureSharded(mesh, layout, model, parts, loss)


def _cuts(every: Mapping[str, Any], parts: Mapping[str, Part]) -> dict[int, Split]:
    """How each variable is divided, by its ``id``."""
    cuts: dict[int, Split] = {}

    def cut(name: str, variable: Any, split: Split) -> None:
        if cuts.setdefault(id(variable), split) != split:
            raise PlanError(f"{name} shares {variable.path} with a layer that splits it another way. Choose one way.")

    for name, part in parts.items():
        layer = every[name]
        if part.role == "heads":
            for inner, role in _inner(layer):
                for attribute, split in einsum_splits(name, inner, role):
                    cut(name, getattr(inner, attribute), split)
        elif part.role != "dropout":
            for attribute, split in part.splits:
                cut(name, getattr(layer, attribute), split)
    return cuts


def _inner(attention: Any) -> list[tuple[Any, str]]:
    """The layers of attention, and the role of each."""
    inputs = [attention._query_dense, attention._key_dense, attention._value_dense]
    inputs += [attention._gate_dense] if attention._use_gate else []
    return [*((layer, "column") for layer in inputs), (attention._output_dense, "row")]


def _take_parts(weights: list[Any], cuts: Mapping[int, Split], team: Team, everyone: Team) -> None:
    """One variable after the other becomes that of the first rank, and then this rank's part of it.

    Those that have no values yet (made under ``keras.StatelessScope(initialize_variables=False)``) get them here, so
    that no rank ever holds the whole model.
    """
    with verbs.eager():
        for variable in weights:
            give_value(variable)
            whole = np.ascontiguousarray(ops.convert_to_numpy(variable))
            first = everyone.first(whole.reshape(-1).view(np.uint8)).view(whole.dtype).reshape(whole.shape)
            if id(variable) in cuts:
                keep_part(variable, first, cuts[id(variable)], team)
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


def _convert(layer: Any, part: Part, team: Team, layout: Layout, every: Mapping[str, Any]) -> None:
    kernel = part.splits[0][1] if part.splits else Split(0)
    if part.role == "vocab" and isinstance(layer, layers.Embedding):
        parallel_class(layer, VocabParallelEmbedding, team, sizes_of(kernel, layer.input_dim, team.size))
    elif part.role == "heads":
        heads = sizes_of(Split(0), layer._num_heads, team.size)
        parallel_class(layer, HeadParallelAttention, team, heads)
        parallel_class(layer._output_dense, RowParallelEinsumDense, team, heads)
        if layer._dropout:
            parallel_class(layer._dropout_layer, TeamDropout, team, heads, dim=1)
    elif part.role == "dropout":
        column = every[part.of]
        parallel_class(layer, TeamDropout, team, column.sizes, dim=-1)
    else:
        name = next(n for n in layout.names if layout[n].split is not None and n.startswith(f"{layer.path}/kernel"))
        length = layout[name].shape[kernel.axis]
        dense = isinstance(layer, layers.Dense)
        if part.role == "row":
            cls: type = RowParallelDense if dense else RowParallelEinsumDense
            parallel_class(layer, cls, team, sizes_of(kernel, length, team.size))
        else:
            cls = ColumnParallelDense if dense else ColumnParallelEinsumDense
            sizes = sizes_of(kernel, length, team.size)
            parallel_class(layer, cls, team, sizes, whole_output=part.whole_output)
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
