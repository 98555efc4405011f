"""Nested values (numbers, text, tensors, lists, dictionaries) as JSON plus a list of tensors, and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hvdscale.errors import StateError

__all__ = ["decode", "encode"]

_KEEP = "keep"


def encode(value: Any, tensors: list[Tensor], where: str, optional: bool = False) -> Any:
    """``value`` as JSON; its tensors are appended to ``tensors`` in the order ``decode`` will meet them.

    Args:
        where: for the error message.
        optional: a value of another type is marked "keep your own" instead of refused.

    Raises:
        StateError: a value of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    if isinstance(value, Tensor):
        tensors.append(value)
        dtype = str(value.dtype).removeprefix("torch.")
        return {"tensor": list(value.shape), "dtype": dtype, "device": value.device.type}
    if type(value) in (list, tuple):
        return {type(value).__name__: [encode(v, tensors, where, optional) for v in value]}
    if isinstance(value, dict) and all(isinstance(k, (str, int)) for k in value):
        return {"dict": [[k, encode(v, tensors, f"{where}, {k}", optional)] for k, v in value.items()]}
    if optional:
        return {_KEEP: type(value).__name__}
    raise StateError(
        f"{where} holds a {type(value).__name__}, which cannot be sent. Numbers, text, tensors, and "
        "lists, tuples and dictionaries of them can."
    )


def decode(description: Any, tensors: list[Tensor], like: Any = None, device: torch.device | None = None) -> Any:
    """The value described by ``encode``, its tensors yet to be filled and appended to ``tensors``.

    Args:
        like: what stands in this place now: a tensor of the same shape and dtype is used again.
        device: of new tensors; those the sender held on the CPU stay there.
    """
    ((kind, content),) = [(k, v) for k, v in description.items() if k not in ("dtype", "device")]
    if kind == "value":
        return content
    if kind == _KEEP:
        return like
    if kind == "tensor":
        tensor = _tensor(description, like, device)
        tensors.append(tensor)
        return tensor
    if kind == "dict":
        old = like if isinstance(like, dict) else {}
        return {k: decode(v, tensors, old.get(k), device) for k, v in content}
    old_items = list(like) if isinstance(like, (list, tuple)) else []
    old_items += [None] * (len(content) - len(old_items))
    items = [decode(v, tensors, old, device) for v, old in zip(content, old_items, strict=False)]
    return tuple(items) if kind == "tuple" else items


def _tensor(description: Any, like: Any, device: torch.device | None) -> Tensor:
    shape, dtype = torch.Size(description["tensor"]), getattr(torch, description["dtype"])
    if isinstance(like, Tensor) and like.shape == shape and like.dtype == dtype:
        return like
    on_cpu = device is None or description["device"] == "cpu"
    return torch.zeros(shape, dtype=dtype, device="cpu" if on_cpu else device)
