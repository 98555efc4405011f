"""A small torch network, its optimizers, and what all ranks together should make of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.contract.driver import ContractDriver

# Denominators kept away from zero, so that rounding in the sums is not blown up.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-2, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-2, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, eps=1e-2),
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "own constructor": lambda p: Scaled(0.1, 2.0, params=p),
}


class Scaled(torch.optim.Optimizer):
    """An optimizer whose constructor Horovod could not call."""

    def __init__(self, rate: float, scale: float, *, params: Any) -> None:
        self.scale = scale
        super().__init__(params, {"rate": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["rate"] * self.scale)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def inputs(rank: int, step: int = 0) -> Tensor:
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(100 * rank + step))


def backward(model: nn.Module, rank: int, step: int = 0) -> None:
    model(inputs(rank, step)).square().mean().backward()


def mean_gradients(model: nn.Module, size: int, step: int = 0) -> list[Tensor]:
    """What all ranks should see: computed here, on a copy, from all ranks' inputs."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    (sum(twin(inputs(rank, step)).square().mean() for rank in range(size)) / size).backward()
    return [p.grad for p in twin.parameters()]


def assert_same_everywhere(driver: ContractDriver, tensors: Any) -> None:
    flat = torch.cat([t.detach().cpu().double().reshape(-1) for t in tensors])
    everyone = driver.everyones(flat.numpy())
    assert (everyone == everyone[0]).all()


def assert_gradients(model: nn.Module, wanted: list[Tensor]) -> None:
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)
