"""A backward pass in two: gradients of inputs now, those of the weights of linear and convolution layers later.

Qi et al., "Zero Bubble Pipeline Parallelism", arXiv 2401.10241. Inside ``WeightsLater`` these functions note what the
gradients of their weights need; ``run`` computes them. Gradients of other parameters (norms, embeddings), cheap ones,
come with the inputs'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["WeightsLater"]


class WeightsLater(TorchFunctionMode):
    """While active, weights of linear and convolution layers get their gradients in ``run``, not in ``backward``."""

    def __init__(self) -> None:
        super().__init__()
        self._left: list[Callable[[], None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS and not torch.is_autocast_enabled("cpu"):
            given = dict(zip(("x", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
            given |= {"x" if name == "input" else name: value for name, value in kwargs.items()}
            weight = given["weight"]
            whole = not isinstance(given.get("padding", 0), str)
            if whole and isinstance(weight, nn.Parameter) and weight.requires_grad and torch.is_grad_enabled():
                return _apply(func, given, self._left)
        return func(*args, **kwargs)

    def run(self) -> None:
        """Add to the gradients of the weights what the backward pass left out."""
        left, self._left = self._left, []
        with torch.no_grad():
            for add in left:
                add()
        left.clear()  # it is on the graph, whose activations it holds: neither would ever be let go


def _apply(func: Any, given: dict[str, Any], left: list[Callable[[], None]]) -> Tensor:
    x, weight, bias = given["x"], given["weight"], given.get("bias")
    if func is F.linear:
        return _Linear.apply(x, weight, bias, left)
    spatial = 2 if func is F.conv2d else 1
    many = lambda value: (value,) * spatial if isinstance(value, int) else tuple(value)  # noqa: E731
    shape = (many(given.get("stride", 1)), many(given.get("padding", 0)), many(given.get("dilation", 1)))
    return _Convolution.apply(x, weight, bias, shape, given.get("groups", 1), left)


def _add(parameter: Tensor | None, gradient: Tensor) -> None:
    if parameter is None or not parameter.requires_grad:
        return
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, left: list[Callable[[], None]]) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.left = left
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors

        def later() -> None:
            rows = gradient.reshape(-1, gradient.shape[-1])  # [rows, outputs]
            _add(weight, rows.t() @ x.reshape(-1, x.shape[-1]))
            if bias is not None:
                _add(bias, rows.sum(0))

        ctx.left.append(later)
        return (gradient @ weight if ctx.needs_input_grad[0] else None), None, None, None


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, shape: Any, groups: int, left: list[Any]
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.shape, ctx.groups, ctx.left = shape, groups, left
        function: Any = F.conv2d if len(shape[0]) == 2 else F.conv1d
        return function(x, weight, bias, *shape, groups)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        x, weight, bias = ctx.saved_tensors

        def parts(mask: list[bool]) -> Any:
            sizes = None if bias is None else list(bias.shape)
            zeros = [0] * len(ctx.shape[0])
            return torch.ops.aten.convolution_backward(
                gradient, x, weight, sizes, *ctx.shape, False, zeros, ctx.groups, mask
            )

        def later() -> None:
            _, for_weight, for_bias = parts([False, True, bias is not None])
            _add(weight, for_weight)
            if bias is not None:
                _add(bias, for_bias)

        ctx.left.append(later)
        for_input = parts([True, False, False])[0] if ctx.needs_input_grad[0] else None
        return for_input, None, None, None, None, None


_FUNCTIONS = (F.linear, F.conv1d, F.conv2d)
