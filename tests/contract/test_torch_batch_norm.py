"""SyncBatchNorm on N ranks equals BatchNorm on the joined batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

CHANNELS = 3


def part(rank: int, step: int, uneven: bool, dims: int, dtype: torch.dtype) -> Tensor:
    """One rank's batch; with ``uneven`` the ranks hold 2, 3, 4, ... samples, the last one none."""
    length = rank + 2 if uneven else 4
    generator = torch.Generator().manual_seed(10 * rank + step)
    shape = (length, CHANNELS, 5, 2)[:dims]
    return (100 + 3 * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dims", [2, 4])
@pytest.mark.parametrize("uneven", [False, True], ids=["even", "uneven"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_equals_one_batch(
    hvd: Any, rank: int, size: int, affine: bool, momentum: float | None, uneven: bool, dims: int, dtype: torch.dtype
) -> None:
    alone_type = {2: nn.BatchNorm1d, 4: nn.BatchNorm2d}[dims]
    alone = alone_type(CHANNELS, momentum=momentum, affine=affine, dtype=torch.float64)
    ours = hvd.SyncBatchNorm(CHANNELS, momentum=momentum, affine=affine).to(dtype)
    close = {"rtol": 1e-3, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-9, "atol": 1e-9}
    for step in range(2):
        parts = [part(r, step, uneven, dims, dtype) for r in range(size)]
        whole = torch.cat(parts).double().requires_grad_()
        mine = parts[rank].clone().requires_grad_()
        factors = torch.linspace(-1, 1, whole.numel(), dtype=torch.float64).view_as(whole)
        start = sum(len(p) for p in parts[:rank])
        here = slice(start, start + len(mine))

        wanted, output = alone(whole), ours(mine)
        torch.testing.assert_close(output.double(), wanted[here], **close)
        (wanted * factors).sum().backward()
        (output * factors[here].to(dtype)).sum().backward()
        torch.testing.assert_close(mine.grad.double(), whole.grad[here], **close)
    if affine:
        for name in ("weight", "bias"):
            total = hvd.allreduce(getattr(ours, name).grad, op=hvd.Sum).double()
            torch.testing.assert_close(total, getattr(alone, name).grad, **close)
    torch.testing.assert_close(ours.running_mean.double(), alone.running_mean, **close)
    torch.testing.assert_close(ours.running_var.double(), alone.running_var, **close)
    assert ours.num_batches_tracked == 2
    ours.eval()
    alone.eval()
    torch.testing.assert_close(ours(mine).double(), alone(whole)[here], **close)
    assert ours.num_batches_tracked == 2


def test_a_rank_without_samples(hvd: Any, rank: int, size: int) -> None:
    ours, alone = hvd.SyncBatchNorm(CHANNELS), nn.BatchNorm1d(CHANNELS)
    parts = [part(r, 0, False, 2, torch.float32)[: 4 if r == 0 else 0] for r in range(size)]
    mine = parts[rank].clone().requires_grad_()
    output = ours(mine)
    torch.testing.assert_close(output, alone(torch.cat(parts))[: len(mine)], rtol=1e-3, atol=1e-4)
    output.square().sum().backward()
    assert mine.grad.isfinite().all()
    torch.testing.assert_close(ours.running_var, alone.running_var, rtol=1e-3, atol=1e-4)


def test_half_precision_is_computed_in_float32(hvd: Any, rank: int, size: int) -> None:
    ours = hvd.SyncBatchNorm(CHANNELS, track_running_stats=False).bfloat16()
    assert ours.running_mean is None
    for mode in (ours.train(), ours.eval()):  # without running statistics both use the batch's
        output = mode(part(rank, 0, False, 4, torch.bfloat16))
        assert output.dtype == torch.bfloat16
        mean = hvd.allreduce(output.float().mean((0, 2, 3)))
        torch.testing.assert_close(mean, torch.zeros(CHANNELS), rtol=0, atol=5e-2)


def test_shapes_that_cannot_be(hvd: Any) -> None:
    with pytest.raises(ValueError, match="at least 2D"):
        hvd.SyncBatchNorm(CHANNELS)(torch.ones(CHANNELS))
