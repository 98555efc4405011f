"""Values that stages give each other: tensors in lists, tuples and dictionaries, beside numbers and text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hvdscale.errors import PlanError

__all__ = ["map_tensors", "pack", "select", "shape_text", "unpack"]


def pack(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` as JSON can hold it; its tensors are appended to ``tensors``.

    Raises:
        PlanError: a value of a type that cannot be sent.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"t": len(tensors) - 1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"v": value}
    if isinstance(value, torch.Size):
        return {"s": list(value)}
    if isinstance(value, torch.dtype):
        return {"d": str(value).removeprefix("torch.")}
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return {"l" if isinstance(value, list) else "u": [pack(item, tensors) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"m": {key: pack(item, tensors) for key, item in value.items()}}
    raise PlanError(
        "Stages give each other tensors, numbers, text, and lists, tuples and dictionaries of them; a "
        f"{type(value).__name__} would have to cross. Return one of these, or keep the layers on one stage."
    )


def unpack(packed: Any, tensors: Sequence[Tensor]) -> Any:
    """What ``pack`` was given."""
    ((kind, held),) = packed.items()
    if kind == "t":
        return tensors[held]
    if kind == "s":
        return torch.Size(held)
    if kind == "d":
        return getattr(torch, held)
    if kind in ("l", "u"):
        items = [unpack(item, tensors) for item in held]
        return items if kind == "l" else tuple(items)
    if kind == "m":
        return {key: unpack(item, tensors) for key, item in held.items()}
    return held


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """``value`` with ``function`` of each of its tensors in their place."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(function, item) for key, item in value.items()}
    return value


def select(value: Any, piece: slice) -> Any:
    """The samples of ``piece`` of each tensor in ``value``."""
    return map_tensors(lambda tensor: tensor[piece], value)


def shape_text(value: Any) -> str:
    """Shapes and dtypes of a batch, readable."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(shape_text, value))})"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shape_text(item)}" for key, item in value.items()) + "}"
    return repr(value)
