"""Gradient scaling: a scaler looks for infinities only once gradients are reduced.

Every rank then sees the same gradients, finds the same infinities, and skips the same steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hvdscale.torch.distributed import DistributedMixin

__all__ = ["watch_gradient_scalers"]


def watch_gradient_scalers() -> None:
    """Make ``torch.amp.GradScaler.unscale_`` and ``.step`` wait for a distributed optimizer's gradients first.

    Other optimizers are not touched. Calling it again changes nothing.
    """
    for name in ("unscale_", "step"):
        method = getattr(torch.amp.GradScaler, name)
        if not hasattr(method, "_hvdscale"):
            setattr(torch.amp.GradScaler, name, _after_synchronize(method))


def _after_synchronize(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(scaler: torch.amp.GradScaler, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        held = optimizer._hvdscale if isinstance(optimizer, DistributedMixin) and scaler.is_enabled() else None
        if held is None or (held.exchange is None and held.sharded is None):
            return method(scaler, optimizer, *args, **kwargs)
        if held.exchange is not None:
            held.exchange.before_scaler()
        steps = held.steps
        result = method(scaler, optimizer, *args, **kwargs)
        if held.sharded is not None and method.__name__ == "unscale_":
            for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                found.copy_(held.sharded.largest_of_copy(found))  # one rank's part may be finite, and another's not
        if held.exchange is not None and method.__name__ == "step" and held.steps == steps:
            held.exchange.step_skipped()
        return result

    wrapper._hvdscale = True  # type: ignore[attr-defined]
    return wrapper
