"""The verbs of the Keras adapter on the PyTorch backend; ``on_tensorflow`` is its twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import keras
import numpy as np
import torch

import hvdscale.torch as hvd
from hvdscale.torch.gradients import reduce_gradients
from hvdscale.torch.runtime import control, world

__all__ = [
    "apart_from_compilers",
    "as_dense",
    "broadcast_bytes",
    "compiled_by_xla",
    "control",
    "eager",
    "hvd",
    "initialised",
    "reduce_gradients",
    "scaled",
    "sum_over_ranks",
    "tensor",
    "world",
    "zeros_like",
]

FRAMEWORK = "torch"


def eager() -> AbstractContextManager[Any]:
    """What runs inside happens now: here everything does."""
    return nullcontext()


def initialised(variables: Sequence[Any]) -> bool:
    """Whether values can be read now: here always."""
    return True


def compiled_by_xla() -> bool:
    """Whether the graph being traced will be compiled by XLA: never here."""
    return False


def apart_from_compilers(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` as ``torch.compile`` sees it: left alone, and called as it is."""
    disabled: Callable[..., Any] = torch.compiler.disable(function)
    return disabled


def tensor(value: Any) -> Any:
    """A backend tensor of a number, an array, a tensor or a Keras variable."""
    if isinstance(value, keras.Variable):
        return value.value.detach()
    return value if isinstance(value, torch.Tensor) else torch.as_tensor(np.asarray(value))


def as_dense(gradient: Any) -> Any:
    """A dense tensor of a gradient that may be sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def scaled(gradient: Any, factor: float) -> Any:
    """``gradient * factor``, sparse or dense."""
    return gradient * factor


def zeros_like(variable: Any) -> Any:
    """A gradient of zeros for ``variable``."""
    return torch.zeros_like(variable.value)


def broadcast_bytes(data: np.ndarray, root_rank: int, process_set: Any, name: str) -> np.ndarray:
    """``data`` (uint8) of ``root_rank``, on every rank of ``process_set``."""
    sent = hvd.broadcast(torch.from_numpy(data.copy()), root_rank, name=name, process_set=process_set)
    result: np.ndarray = sent.numpy()
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, process_set: Any, name: str | None) -> torch.Tensor:
        ctx.process_set, ctx.name = process_set, name
        total: torch.Tensor = hvd.allreduce(value.detach().contiguous(), op=hvd.Sum, process_set=process_set, name=name)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        name = f"{ctx.name}.gradient" if ctx.name else None
        total = hvd.allreduce(gradients[0].contiguous(), op=hvd.Sum, process_set=ctx.process_set, name=name)
        return total, None, None


def sum_over_ranks(value: Any, process_set: Any, name: str | None = None) -> Any:
    """The sum of a float tensor over ranks; its gradient is summed over ranks too."""
    return _Sum.apply(value, process_set, name)  # type: ignore[no-untyped-call]
