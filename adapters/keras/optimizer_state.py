"""The state of an optimizer over a whole model, from the optimizers of the ranks that hold parts of it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from keras import ops

from hvdscale.errors import StateError
from hvdscale.keras.backend import verbs
from hvdscale.keras.names import renumbered
from hvdscale.keras.store import slots_of
from hvdscale.model.positions import tell_optimizers

if TYPE_CHECKING:
    from hvdscale.keras.sharded import ShardedModel

__all__ = ["load_optimizer", "save_optimizer"]


@dataclass(frozen=True)
class _Place:
    """One variable of the optimizer over the whole model.

    Args:
        path: of the variable there.
        dtype: its.
        own: this rank's; ``None`` where it trains no part of ``name``.
        name: of the model's variable beside which it is kept; ``None``: the optimizer has it once, as the step count.
    """

    path: str
    dtype: str
    own: Any
    name: str | None


def save_optimizer(sharded: ShardedModel, optimizer: Any, root: int | None) -> dict[str, np.ndarray]:
    """See ``ShardedModel.optimizer_state_dict``."""
    state: dict[str, np.ndarray] = {}
    with verbs.eager():
        for place in _places(sharded, optimizer):
            value = np.empty(0, place.dtype) if place.own is None else np.asarray(ops.convert_to_numpy(place.own))
            joined = sharded.join(place.name, value, root) if place.name is not None else value
            if joined is not None and root in (None, sharded.rank):
                state[place.path] = np.array(joined)
    return state


def load_optimizer(sharded: ShardedModel, optimizer: Any, state: Mapping[str, Any]) -> None:
    """See ``ShardedModel.load_optimizer_state_dict``."""
    with verbs.eager():
        places = _places(sharded, optimizer)
        shapes = [() if p.name is None else sharded.layout[p.name].shape for p in places]
        given = [(name, np.asarray(value)) for name, value in state.items()]
        if [value.shape for _, value in given] != shapes:
            wrong = next(
                (f"{n} has shape {list(v.shape)}" for (n, v), s in zip(given, shapes, strict=False) if v.shape != s), ""
            )
            raise StateError(
                f"{optimizer.name} over the whole model has {len(places)} variables; state of {len(given)} came"
                f"{f', and {wrong}' if wrong else ''}. Load what the same optimizer saved, in its order."
            )
        for place, (_, value) in zip(places, given, strict=True):
            if place.own is not None:
                part = value if place.name is None else sharded.layout.cut(place.name, value, sharded.rank)
                place.own.assign(part)


def _places(sharded: ShardedModel, optimizer: Any) -> list[_Place]:
    """The variables of the optimizer over the whole model, in its order. Collective.

    A twin of the optimizer is built on numbers that stand for the model's variables, and shows where each is kept.
    """
    if not optimizer.built:
        optimizer.build(sharded.trainable_variables)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    names = [sharded.name_of(variable) for variable in inner._trainable_variables]
    strange = [v.path for v, name in zip(inner._trainable_variables, names, strict=True) if name is None]
    error = f"The optimizer trains {strange[0]}, which is not of the sharded model." if strange else ""
    # Keras has the order of layers, which a stage may change; and it counts layers, which ranks may have more of.
    plain = dict(zip(sharded.layout.names, renumbered(sharded.layout.names), strict=True))
    ordered = [plain[name] for name in sharded.layout.names if name in names]
    everyones = replace(
        sharded.layout, placements=tuple(replace(p, name=plain[p.name]) for p in sharded.layout.placements)
    )
    told = tell_optimizers(everyones, sharded.rank, verbs.control(), [ordered], {}, error).names
    here = {theirs: ours for ours, theirs in plain.items()}
    whole = tuple(here[name] for name in told)
    twin = _twin(inner, whole, [sharded.layout[name].dtype for name in whole])
    theirs, slots = slots_of(twin), slots_of(inner)
    kept = {id(v): (slot, i) for slot, variables in theirs.items() for i, v in enumerate(variables)}
    owned = {id(v) for variables in slots.values() for v in variables}
    once = iter([v for v in inner.variables if id(v) not in owned])
    position = {name: i for i, name in enumerate(names)}
    outer = optimizer._variables if inner is not optimizer else []
    places = [_Place(v.path, str(v.dtype), v, None) for v in outer]
    for variable in twin.variables:
        if id(variable) not in kept:
            places.append(_Place(variable.path, str(variable.dtype), next(once), None))
            continue
        slot, i = kept[id(variable)]
        own = slots[slot][position[whole[i]]] if whole[i] in position else None
        places.append(_Place(variable.path, str(variable.dtype), own, whole[i]))
    return places


def _twin(optimizer: Any, names: tuple[str, ...], dtypes: list[str]) -> Any:
    """An optimizer of the same settings and name, built on one number for each of ``names``."""
    config = optimizer.get_config()
    if not isinstance(optimizer._learning_rate, keras.Variable):
        config["learning_rate"] = lambda: 0.0  # a schedule: there is no variable
    twin = getattr(type(optimizer), "_hvdscale_base", type(optimizer)).from_config(config)
    numbers = []
    for name, dtype in zip(names, dtypes, strict=True):
        number = keras.Variable(0.0, dtype=dtype, name="number")
        number._path = name
        numbers.append(number)
    twin.build(numbers)
    return twin
