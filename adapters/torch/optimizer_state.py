"""The state of an optimizer over a whole model, from the optimizers of the ranks that hold parts of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from hvdscale.errors import StateError
from hvdscale.model.positions import WholeOptimizer, tell_optimizers
from hvdscale.torch.runtime import control

if TYPE_CHECKING:
    from hvdscale.torch.sharded import ShardedModel

__all__ = ["load_optimizer", "save_optimizer"]

# What an optimizer keeps of a parameter is told as one of these.
_BESIDE, _TENSOR, _PLAIN = "beside", "tensor", "plain"


def save_optimizer(sharded: ShardedModel, optimizer: Optimizer, root: int | None) -> dict[str, Any]:
    """See ``ShardedModel.optimizer_state_dict``."""
    local, error = _names(sharded, optimizer)
    own = optimizer.state_dict()  # first: where updates are placed, it is collective over the data ranks
    flat = [name for group in local for name in group]
    held = {flat[number]: state for number, state in own["state"].items()} if not error else {}
    told = {
        name: {key: _described(value, sharded.layout.local_shape(name, sharded.rank)) for key, value in state.items()}
        for name, state in held.items()
    }
    whole = tell_optimizers(sharded.layout, sharded.rank, control(), local, told, error)
    state: dict[int, dict[str, Any]] = {}
    for number, name in enumerate(whole.names):
        if not whole.held[name]:
            continue
        state[number] = {}
        for key, (kind, *described) in whole.held[name].items():
            value = described[0]
            if kind == _BESIDE:
                value = sharded.join(name, held.get(name, {}).get(key), root, getattr(torch, value))
            elif kind == _TENSOR:
                value = torch.from_numpy(described[2].copy()).view(getattr(torch, value)).reshape(described[1])
            state[number][key] = value
    if root not in (None, sharded.rank):
        return {}
    return {**own, "state": state, "param_groups": _regrouped(own["param_groups"], whole)}


def load_optimizer(sharded: ShardedModel, optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """See ``ShardedModel.load_optimizer_state_dict``."""
    local, error = _names(sharded, optimizer)
    whole = tell_optimizers(sharded.layout, sharded.rank, control(), local, {}, error)
    given, wanted = [len(g["params"]) for g in state["param_groups"]], [len(group) for group in whole.groups]
    if given != wanted:
        raise StateError(
            f"The optimizer over the whole model has groups of {wanted} parameters; state for groups of {given} came."
        )
    numbers = {
        name: number
        for group, names in zip(state["param_groups"], whole.groups, strict=True)
        for name, number in zip(names, group["params"], strict=True)
    }
    own: dict[int, dict[str, Any]] = {}
    for position, name in enumerate(name for group in local for name in group):
        if numbers[name] in state["state"]:
            own[position] = {
                key: sharded.cut(name, value) if beside(value, sharded.layout[name].shape) else value
                for key, value in state["state"][numbers[name]].items()
            }
    here = WholeOptimizer(tuple(tuple(group) for group in local), {})
    optimizer.load_state_dict({**state, "state": own, "param_groups": _regrouped(state["param_groups"], here)})


def beside(value: Any, shape: tuple[int, ...]) -> bool:
    """Whether an optimizer keeps ``value`` beside a parameter of ``shape``, number for number."""
    return isinstance(value, Tensor) and value.dim() > 0 and tuple(value.shape) == shape


def _names(sharded: ShardedModel, optimizer: Optimizer) -> tuple[list[list[str]], str]:
    """The whole model's names of the optimizer's parameters, group by group; and what is wrong with them."""
    names = {id(p): name for name, p in sharded.named_parameters()}
    groups = [group["params"] for group in optimizer.param_groups]
    foreign = sum(id(p) not in names for group in groups for p in group)
    if foreign:
        return [], (
            f"{foreign} of the optimizer's parameters are none of the model's. Make it from sharded.parameters()."
        )
    return [[names[id(p)] for p in group] for group in groups], ""


def _described(value: Any, shape: tuple[int, ...]) -> list[Any]:
    if beside(value, shape):
        return [_BESIDE, str(value.dtype).removeprefix("torch.")]
    if isinstance(value, Tensor):
        flat = value.detach().to("cpu").contiguous().view(-1)
        bits = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
        return [_TENSOR, str(value.dtype).removeprefix("torch."), list(value.shape), bits]
    return [_PLAIN, value]


def _regrouped(groups: list[dict[str, Any]], optimizer: WholeOptimizer) -> list[dict[str, Any]]:
    """The settings of ``groups``, for the parameters of ``optimizer``."""
    number, made = 0, []
    for group, names in zip(groups, optimizer.groups, strict=True):
        named = {"param_names": list(names)} if "param_names" in group else {}
        made.append({**group, **named, "params": list(range(number, number + len(names)))})
        number += len(names)
    return made
