"""Sharding by features: the layers of a module split over the tensor ranks, in place.

Shoeybi et al., "Megatron-LM", arXiv 1909.08053. The module keeps its code and its parameters' identity; the layers
named by the rules change their class and keep a part of their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from hvdscale.errors import DesyncError, PlanError
from hvdscale.model.layout import Layout, Placement, Split
from hvdscale.model.mesh import Mesh
from hvdscale.model.rules import Rules, check_rules
from hvdscale.model.ways import share_line
from hvdscale.runtime.agreement import Fingerprint, agree
from hvdscale.runtime.team import Team
from hvdscale.torch.broadcast import broadcast_parameters
from hvdscale.torch.host import in_memory
from hvdscale.torch.lazy import materialise
from hvdscale.torch.parallel_attention import HeadParallelAttention
from hvdscale.torch.parallel_layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    TeamDropout,
    VocabParallelEmbedding,
    keep_part,
    sizes_of,
)
from hvdscale.torch.randomness import set_state, state_of
from hvdscale.torch.roles import Part, find_parts
from hvdscale.torch.runtime import control, world
from hvdscale.torch.sharded import ShardedModel
from hvdscale.torch.teams import team_along, tensor_team

__all__ = [
    "FeatureSharded",
    "convert_layers",
    "placements_of",
    "shard_features",
    "split_layers",
    "splits_of",
    "take_parts",
]

Loss = Callable[[Any, Any], Tensor]


class FeatureSharded(ShardedModel):
    """A module whose layers are split over the tensor ranks. Call it as the module, with the same batch on each."""

    def __init__(self, mesh: Mesh, layout: Layout, module: nn.Module, parts: Mapping[str, Part], loss: Loss | None):
        super().__init__(mesh, layout, module, module.state_dict(keep_vars=True))
        self._parts, self._loss = dict(parts), loss

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        return self.module(*inputs, **named)

    def train_step(self, x: Any, y: Any) -> Tensor:
        loss = self._the_loss()(self.module(x), y)
        loss.backward()
        return loss.detach()

    def eval_step(self, x: Any, y: Any) -> Tensor:
        with self._evaluating(), torch.no_grad():
            return self._the_loss()(self.module(x), y)

    def _the_loss(self) -> Loss:
        if self._loss is None:
            raise PlanError(
                "This model was sharded without a loss. Give shard_model(..., loss=function(outputs, targets)), or "
                "call it as the module it was, and loss.backward()."
            )
        return self._loss

    def describe(self) -> str:
        whole, held = self.count()
        rows = [("layer", "role", "whole", f"rank {self.rank}")]
        for name, part in self._parts.items():
            weights = [n for n in self.layout.names if n.rpartition(".")[0] == name and self.layout[n].split]
            if weights:
                here = self.layout.local_shape(weights[0], self.rank)
                role = "heads" if part.heads or part.role == "attention" else part.role
                rows.append((name, role, str(list(self.layout[weights[0]].shape)), str(list(here))))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        share = f"{share_line(held, whole, self.rank)}, with tp={self.mesh.tp}"
        return "\n".join([*lines, share])


def shard_features(model: nn.Module, mesh: Mesh, rules: Rules, loss: Loss | None) -> FeatureSharded:
    """Split the layers of ``model`` in place. Collective. See ``shard_model``.

    Raises:
        PlanError: rules, layers or a mesh that cannot be.
        DesyncError: ranks hold different models.
    """
    mesh.check(world().size)
    if mesh.pp > 1:
        raise PlanError(
            f'by="features" makes no stages, and the mesh has pp={mesh.pp}. Use pp=1, or by="layers", which splits the '
            "layers of its stages over tp ranks by the same rules."
        )
    parts, layout = split_layers(model, mesh, check_rules(rules))
    _watch_inputs(model, tensor_team(mesh))
    return FeatureSharded(mesh, layout, model, parts, loss)


def split_layers(model: nn.Module, mesh: Mesh, rules: Rules) -> tuple[dict[str, Part], Layout]:
    """Give every rank the first rank's weights and random state, and its own part of each split layer. Collective."""
    team = tensor_team(mesh)
    parts = find_parts(model, rules)
    layout = Layout(mesh, placements_of(model, parts))
    tensors = [(p.name, p.shape, f"{p.dtype} {p.split}") for p in layout.placements]
    empty = [n for n, t in model.state_dict().items() if t.is_meta]
    facts = {"mesh": mesh, "sharded": "by features", "on the meta device": ", ".join(empty)}
    agree(Fingerprint.of(tensors, facts), control(), "the model to be sharded")
    _same_random_state(model, mesh)
    _take_parts(model, layout, team)
    convert_layers(model, parts, team, model)
    return parts, layout


def convert_layers(model: nn.Module, parts: Mapping[str, Part], team: Team, held: nn.Module) -> None:
    """Layers of ``held``, modules of ``model`` whose weights are this rank's parts by now, become split ones."""
    modules = dict(model.named_modules())
    here = {id(module) for module in held.modules()}
    columns = {name: modules[name] for name, part in parts.items() if part.role == "column"}
    outputs = {name: sizes_of(parts[name].split, layer.out_features, team.size) for name, layer in columns.items()}
    heads: dict[tuple[str, str], int] = {}
    for name, part in parts.items():
        if id(modules[name]) not in here:
            continue
        _convert(modules[name], part, team, outputs.get(part.of, ()))
        if part.heads:
            module, attribute = part.heads
            heads[part.heads] = sizes_of(Split(0), getattr(modules[module], attribute), team.size)[team.rank]
    for (module, attribute), number in heads.items():
        setattr(modules[module], attribute, number)
    _leave_fast_paths(held)


def _convert(layer: Any, part: Part, team: Team, sizes: tuple[int, ...]) -> None:
    if part.role == "column":
        ColumnParallelLinear.split(layer, team, part.split, part.whole_output)
    elif part.role == "row":
        RowParallelLinear.split(layer, team, part.split)
    elif part.role == "vocab":
        VocabParallelEmbedding.split(layer, team)
    elif part.role == "attention":
        HeadParallelAttention.split(layer, team)
    else:
        TeamDropout.split(layer, team, sizes)


def placements_of(model: nn.Module, parts: Mapping[str, Part]) -> tuple[Placement, ...]:
    """Of every parameter and buffer that is saved, on one stage."""
    splits = splits_of(model, parts)
    return tuple(
        Placement(name, tuple(t.shape), str(t.dtype).removeprefix("torch."), split=splits.get(name))
        for name, t in model.state_dict(keep_vars=True).items()
    )


def splits_of(model: nn.Module, parts: Mapping[str, Part]) -> dict[str, Split]:
    """How each parameter that is split is divided, by name.

    Raises:
        PlanError: tied parameters that are to be split differently.
    """
    splits: dict[str, Split] = {}
    for name, part in parts.items():
        splits |= {f"{name}.{p}".lstrip("."): split for p, split in _splits(model.get_submodule(name), part).items()}
    tensors = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    for tied in names.values():
        if len({splits.get(name) for name in tied}) > 1:
            how = ", ".join(f"{name} {splits.get(name) or 'whole'}" for name in tied)
            raise PlanError(
                f"Tied parameters are one tensor, which is split one way: {how}. Give their layers rules that split "
                "alike (an embedding and a head tied to it: 'vocab' for the one, 'column' or 'vocab' for the other)."
            )
    return splits


def _splits(layer: Any, part: Part) -> dict[str, Split]:
    """How the parameters of a layer are divided, by their names in it."""
    if part.role == "column":
        return {"weight": part.split, **({} if layer.bias is None else {"bias": part.split})}
    if part.role in ("row", "vocab"):
        return {"weight": part.split}
    if part.role == "dropout":
        return {}
    grain = layer.head_dim
    fused, own = Split(0, 3, grain), Split(0, 1, grain)
    known = {"in_proj_weight": fused, "in_proj_bias": fused, "out_proj.weight": Split(1, 1, grain)}
    known |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), own)
    present = {name for name, _ in layer.named_parameters()}
    return {name: split for name, split in known.items() if name in present}


def _take_parts(model: nn.Module, layout: Layout, team: Team) -> None:
    """The first rank's values, and of split parameters this rank's part.

    What is on the meta device gets its values one module at a time: no rank ever holds the whole model.
    """
    taken: set[int] = set()

    def take(prefix: str, module: nn.Module) -> None:
        held = {f"{prefix}.{n}".lstrip("."): t for n, t in module.state_dict(keep_vars=True).items()}
        fresh = {n: t for n, t in held.items() if not t.is_meta and id(t) not in taken}
        broadcast_parameters({n: t.detach() for n, t in fresh.items()}, 0)
        for name, tensor in fresh.items():
            split = layout[name].split
            if split is not None and id(tensor) not in taken:
                keep_part(tensor, split, team)
            taken.add(id(tensor))

    materialise(model, "", {}, take)
    take("", model)


def take_parts(local: Mapping[str, Tensor], layout: Layout, team: Team, stage: Team) -> None:
    """Tensors that are whole on each rank of a stage become its first rank's, and of those that are split, a part."""
    taken: set[int] = set()
    for name, tensor in local.items():
        if id(tensor) in taken:
            continue
        taken.add(id(tensor))
        bits = in_memory(tensor).view(-1).view(torch.uint8) if tensor.numel() else None
        if bits is not None:
            first = torch.from_numpy(stage.first(bits.numpy())).view(tensor.dtype).view(tensor.shape)
            tensor.data.copy_(first)
        split = layout[name].split
        if split is not None:
            assert isinstance(tensor, nn.Parameter), "buffers are not split"
            keep_part(tensor, split, team)


def _same_random_state(model: nn.Module, mesh: Mesh) -> None:
    """Dropout outside the split layers must be the same on all ranks of a copy: they go on from its first rank's."""
    team = team_along(mesh, "pp", "tp")
    set_state(model, torch.from_numpy(team.first(state_of(model).numpy()).copy()))


def _leave_fast_paths(model: nn.Module) -> None:
    """Torch's fused inference of encoder layers reads whole weights: layers that are split go the plain way."""
    kinds = (ColumnParallelLinear, RowParallelLinear, HeadParallelAttention)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and any(isinstance(m, kinds) for m in module.modules()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _watch_inputs(model: nn.Module, team: Team) -> None:
    """While training, ranks of a team must be given the same batch, and draw the same random numbers."""
    if team.size == 1:
        return

    def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training:
            return
        digest = xxhash.xxh64(state_of(model).numpy().tobytes())
        random = digest.intdigest()
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                plain = value.detach().to("cpu").contiguous().view(-1)
                digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        own = torch.tensor([digest.intdigest() >> 1, random >> 1], dtype=torch.int64).numpy()
        everyone = team.collect(own, [(2,)] * team.size)
        if all((theirs == own).all() for theirs in everyone):
            return
        different = [r for r, theirs in zip(team.ranks, everyone, strict=True) if (theirs != everyone[0]).any()]
        drawn = any(theirs[1] != everyone[0][1] for theirs in everyone)
        what = (
            "have drawn other random numbers: seed them alike, and let dropout between split layers of uneven width be "
            "an nn.Dropout of an nn.Sequential"
            if drawn
            else "were given another batch: ranks that share a model's features read the same data, "
            "mesh.coordinates(rank).dp of mesh.dp"
        )
        raise DesyncError(f"Of the tensor ranks {list(team.ranks)}, {different} {what}.")

    model.register_forward_pre_hook(compare, with_kwargs=True)
