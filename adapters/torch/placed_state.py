"""Optimizer state, cut into this rank's slices and put together again.

Between steps ``optimizer.state`` is keyed by the slices' tensors. A state keyed by parameters is a whole one: it was
loaded, or is older than the distribution, and is cut before the next step.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from horovod.torch import ProcessSet
from torch import Tensor
from torch.optim import Optimizer

from hvdscale.errors import StateError
from hvdscale.torch.collectives import allgather_async
from hvdscale.torch.handles import synchronize
from hvdscale.torch.runtime import control
from hvdscale.torch.slices import Slice, Slices

__all__ = ["cut_state", "gather_state", "keep_precision", "state_bytes"]

MASTER = "master"  # the name of a float32 master among a parameter's state

State = dict[Any, dict[str, Any]]


def cut_state(optimizer: Optimizer, slices: Slices, parameters: Sequence[Tensor]) -> None:
    """Replace whole state by that of this rank's slices. Parameters that are not placed keep theirs.

    Raises:
        StateError: an entry that cannot be cut.
    """
    for position in slices.positions:
        parameter = parameters[position]
        if parameter not in optimizer.state:
            continue
        whole = optimizer.state.pop(parameter)
        held = slices.by_position.get(position)
        if held is None or not whole:
            continue
        if held.is_master and isinstance(whole.get(MASTER), Tensor):
            held.tensor.copy_(_cut(whole[MASTER], held, MASTER, optimizer))
            held.refresh()  # where the parameter was given other weights since, they count
        optimizer.state[held.tensor] = {
            key: _cut(value, held, key, optimizer) for key, value in whole.items() if key != MASTER
        }


def _cut(value: Any, held: Slice, key: str, optimizer: Optimizer) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.shape == held.parameter.shape and value.dim():
        part = value.reshape(-1)[held.piece.start : held.piece.stop].view(held.tensor.shape)
        widened = held.is_master and value.is_floating_point()
        return part.to(held.tensor.dtype if widened else value.dtype, copy=True)
    if value.dim() == 0 or held.piece.size == held.parameter.numel():
        return value.clone()
    raise StateError(
        f"The state {key!r} of {type(optimizer).__name__} has the shape {list(value.shape)} for a parameter of shape "
        f"{list(held.parameter.shape)}: it cannot be cut into slices. Load the state of this model; if it is, use "
        'update="central" or "local".'
    )


def gather_state(optimizer: Optimizer, slices: Slices, parameters: Sequence[Tensor], process_set: ProcessSet) -> State:
    """The whole state, keyed by parameters, on every rank. Collective; ``optimizer.state`` stays as it is.

    Raises:
        StateError: on every rank, where the state holds what cannot be put together.
    """
    loaded = [position for position in slices.positions if optimizer.state.get(parameters[position])]
    mine = {p: _describe(optimizer, held) for p, held in slices.by_position.items() if p not in loaded}
    message = json.dumps([loaded, mine]).encode()
    everyone = [json.loads(data) for data in control(process_set).allgather(message)]
    if any(theirs != loaded for theirs, _ in everyone):
        raise StateError(
            "Some ranks have loaded an optimizer state and others have not. Call load_state_dict() with the same state "
            "on every rank, or broadcast_optimizer_state() after loading it on one."
        )
    whole: State = defaultdict(dict)
    own = {id(held.tensor) for held in slices.by_position.values()}
    for key, value in optimizer.state.items():
        if id(key) not in own and value:
            whole[key] = value  # loaded since, of a parameter that is not placed, or under a name
    for position in slices.positions:
        described: dict[str, Any] = next((d[str(position)] for _, d in everyone if d.get(str(position))), {})
        if "" in described:
            raise StateError(described[""])
        if described:
            held = slices.by_position.get(position)
            entries = {} if held is None else {**optimizer.state.get(held.tensor, {}), MASTER: held.tensor}
            whole[parameters[position]] = _gather_one(entries, parameters[position], position, described, process_set)
    return whole


def _describe(optimizer: Optimizer, held: Slice) -> dict[str, Any]:
    """What this rank has for one parameter: numbers as they are, of tensors shape and dtype."""
    entries: dict[str, Any] = {}
    state = dict(optimizer.state.get(held.tensor, {}))
    if held.is_master:
        state[MASTER] = held.tensor
    for key, value in state.items():
        if isinstance(value, Tensor):
            number = value.item() if value.dim() == 0 else None
            shape = None if value.shape == held.tensor.shape else list(value.shape)
            entries[key] = [_name(value.dtype), value.device.type, number, shape]
        elif value is None or isinstance(value, (bool, int, float, str)):
            entries[key] = value
        else:
            return {
                "": f"The state {key!r} of {type(optimizer).__name__} is a {type(value).__name__}; only tensors, "
                'numbers and text can be put together from ranks. Use update="local".'
            }
    return entries


def _gather_one(
    own: Mapping[str, Any],
    parameter: Tensor,
    position: int,
    described: Mapping[str, Any],
    process_set: ProcessSet,
) -> dict[str, Any]:
    """The whole state of one parameter from all ranks' ``own``."""
    result: dict[str, Any] = {}
    handles = {}
    for key, entry in described.items():
        if not isinstance(entry, list):
            result[key] = entry
            continue
        dtype, device, number, shape = getattr(torch, entry[0]), entry[1], entry[2], entry[3]
        place = "cpu" if device == "cpu" else parameter.device
        if number is not None:
            result[key] = torch.tensor(number, dtype=dtype, device=place)
            continue
        part = own[key].detach().reshape(-1) if key in own else torch.empty(0, dtype=dtype, device=place)
        result[key] = shape  # keeps the order of entries
        handles[key] = allgather_async(part, f"hvdscale.state.{position}.{key}", process_set)
    for key, handle in handles.items():
        joined = synchronize(handle)
        result[key] = joined.view(parameter.shape if result[key] is None else result[key])
    return result


def keep_precision(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """After ``load_state_dict``: float32 state of half-precision parameters, which torch has just rounded, as saved."""
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in zip(numbers, parameters, strict=True):
        if parameter.dtype not in (torch.float16, torch.bfloat16):
            continue
        for key, value in saved["state"].get(number, {}).items():
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                optimizer.state[parameter][key] = value.to(parameter.device, copy=True)


def state_bytes(optimizer: Optimizer, slices: Slices | None) -> int:
    """What this rank's optimizer state takes, float32 masters included."""
    tensors = [v for entry in optimizer.state.values() for v in entry.values() if isinstance(v, Tensor)]
    tensors += [held.tensor for held in (slices.by_position.values() if slices else ()) if held.is_master]
    return sum(tensor.nbytes for tensor in tensors)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
