"""Gradient scaling: a scaler looks for infinities only once gradients are reduced.

Every rank then sees the same gradients, finds the same infinities, and skips the same steps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from hvdscale.errors import PlanError
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
        if isinstance(optimizer, DistributedMixin) and scaler.is_enabled():
            exchange = optimizer._hvdscale.exchange
            if exchange is not None and not exchange.watches_gradients:
                raise PlanError(
                    "op=Adasum keeps each rank's own gradients, so that ranks would skip different steps under "
                    "a GradScaler. Use op=Average, or bfloat16, which needs no scaler."
                )
            optimizer.synchronize()
        return method(scaler, optimizer, *args, **kwargs)

    wrapper._hvdscale = True  # type: ignore[attr-defined]
    return wrapper
