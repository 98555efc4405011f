"""Batch normalisation over the batches of all ranks, on any device.

Moments are merged as in Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
variances" (1979): one all-gather forward, one all-reduce backward.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from horovod.torch import ProcessSet, Sum, global_process_set
from torch import Tensor, nn

from hvdscale.torch.collectives import allgather_async
from hvdscale.torch.handles import synchronize
from hvdscale.torch.reductions import allreduce_async_

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """``BatchNorm`` whose statistics are those of all ranks' batches joined. Input ``(N, C, ...)``, any device.

    In training every rank calls it equally often; batches may differ in length and may be empty. In
    evaluation it uses the running statistics, as ``BatchNorm`` does, and exchanges nothing. Gradients of
    ``weight`` and ``bias`` are this rank's part, for the optimizer to reduce.

    Args:
        num_features: channels ``C``.
        eps: added to the variance.
        momentum: of the running statistics; ``None`` for a plain average over all batches.
        affine: learn ``weight`` and ``bias``.
        track_running_stats: keep running statistics.
        process_set: the ranks that share statistics.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self._process_set = process_set
        _keep_from_compilers()

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def forward(self, input: Tensor) -> Tensor:
        own_statistics = self.training or self.running_mean is None
        if not own_statistics or not self._process_set.included() or self._process_set.size() == 1:
            self._check_input_dim(input)
            return self._plain(input)
        self._check_input_dim(input)
        return self._normalise(input)

    def _plain(self, input: Tensor) -> Tensor:
        momentum = self._count_batch()
        return nn.functional.batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            momentum,
            self.eps,
        )

    def _normalise(self, input: Tensor) -> Tensor:
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps, self._process_set)
        momentum = self._count_batch()
        if self.training and self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                unbiased = variance * (count / (count - 1).clamp(min=1))
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        return output

    def _count_batch(self) -> float:
        """The weight of this batch in the running statistics."""
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum


class _Normalise(torch.autograd.Function):
    """``(input, weight, bias) -> (output, mean [C], biased variance [C], number of values [1])`` over all ranks."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Any, bias: Any, eps: float, process_set: ProcessSet) -> Any:
        x = _wide(input)
        axes, shape = _channels(x)
        count, channels = x.numel() // max(x.shape[1], 1), x.shape[1]
        if count:
            variance, mean = torch.var_mean(x, axes, correction=0)
        else:
            variance, mean = x.new_zeros(channels), x.new_zeros(channels)
        own = torch.cat([mean, variance * count, x.new_tensor([float(count)])])
        every = _gather(own, process_set).view(-1, 2 * channels + 1)  # [ranks, means | squared deviations | count]
        means, deviations, counts = every.split([channels, channels, 1], dim=1)
        total = counts.sum(0)  # [1]
        mean = (means * counts).sum(0) / total
        variance = (deviations + counts * (means - mean) ** 2).sum(0) / total
        scale = torch.rsqrt(variance + eps)  # [C]
        normal = (x - mean.view(shape)) * scale.view(shape)
        output = normal if weight is None else normal * _wide(weight).view(shape) + _wide(bias).view(shape)
        ctx.save_for_backward(input, weight, mean, scale, total)
        ctx.process_set = process_set
        ctx.mark_non_differentiable(mean, variance, total)
        return output.to(input.dtype), mean, variance, total

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *unused: Any) -> Any:
        input, weight, mean, scale, total = ctx.saved_tensors
        x, grad = _wide(input), _wide(grad)
        axes, shape = _channels(x)
        normal = (x - mean.view(shape)) * scale.view(shape)
        grad_bias, grad_weight = grad.sum(axes), (grad * normal).sum(axes)  # [C], this rank's
        grad_input = None
        if ctx.needs_input_grad[0]:
            sums = _add(torch.cat([grad_bias, grad_weight]), ctx.process_set) / total
            mean_grad, mean_grad_normal = sums.chunk(2)
            factor = scale if weight is None else scale * _wide(weight)
            inner = grad - mean_grad.view(shape) - normal * mean_grad_normal.view(shape)
            grad_input = (inner * factor.view(shape)).to(input.dtype)
        if weight is None:
            return grad_input, None, None, None, None
        return grad_input, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None


def _wide(tensor: Tensor) -> Tensor:
    """Half precision computed in float32."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _channels(x: Tensor) -> tuple[list[int], list[int]]:
    """The axes to reduce, and the shape that spreads ``[C]`` over ``x``."""
    return [axis for axis in range(x.dim()) if axis != 1], [1, -1] + [1] * (x.dim() - 2)


def _gather(own: Tensor, process_set: ProcessSet) -> Tensor:
    return synchronize(allgather_async(own, "hvdscale.batch_norm.moments", process_set))


def _add(own: Tensor, process_set: ProcessSet) -> Tensor:
    handle = allreduce_async_(own, op=Sum, name="hvdscale.batch_norm.gradients", process_set=process_set)
    return synchronize(handle)


@functools.cache
def _keep_from_compilers() -> None:
    """Make ``torch.compile`` leave the exchange alone. Once, with the first layer: it imports the compiler."""
    SyncBatchNorm._normalise = torch.compiler.disable(SyncBatchNorm._normalise)  # type: ignore[method-assign]
