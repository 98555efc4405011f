"""What torch ranks can build differently, beyond the table of ``test_torch_plans.py``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.test_torch_plans import expectation

DIFFERENCES: dict[str, tuple[Callable[[nn.Sequential], Any], str]] = {
    "dtypes": (lambda m: m[1].double(), "float64"),
    "frozen parameters": (lambda m: m[1].requires_grad_(False), "(frozen)"),
    "names": (lambda m: m.__dict__["_modules"].update(last=m.__dict__["_modules"].pop("1")), "last.weight"),
    "more layers": (lambda m: m.append(nn.Linear(2, 2)), "number of parameters = 6"),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_models(driver: Any, hvd: Any, rank: int, size: int, difference: str) -> None:
    change, first = DIFFERENCES[difference]
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    if rank == size - 1:
        change(model)
    with expectation(driver, size) as caught:
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    if size > 1:
        assert first in str(caught.value)


def test_a_group_added_later(driver: Any, hvd: Any, rank: int, size: int) -> None:
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1))
    with expectation(driver, size):
        optimizer.add_param_group({"params": [torch.ones(2 + (rank == size - 1), requires_grad=True)]})
    assert len(optimizer.param_groups) == (1 if size > 1 else 2)


@pytest.mark.parametrize(
    ("tensors", "first"),
    [
        (lambda odd: {"a": torch.ones(2 + odd)}, "a float32[3]"),
        (lambda odd: {"a": torch.ones(2, dtype=torch.float64 if odd else torch.float32)}, "a float64[2]"),
        (lambda odd: {"b" if odd else "a": torch.ones(2)}, "b float32[2]"),
        (lambda odd: {"a": torch.ones(2), **({"b": torch.ones(2)} if odd else {})}, "number of parameters = 2"),
    ],
    ids=["shape", "dtype", "name", "number"],
)
def test_broadcast_parameters(driver: Any, hvd: Any, rank: int, size: int, tensors: Any, first: str) -> None:
    with expectation(driver, size) as caught:
        hvd.broadcast_parameters(tensors(rank == size - 1), root_rank=0)
    if size > 1:
        assert first in str(caught.value)


def test_broadcast_optimizer_state(driver: Any, hvd: Any, rank: int, size: int) -> None:
    sizes = [2, 1] if rank == size - 1 else [1, 2]
    groups = [{"params": [torch.ones(2) for _ in range(n)]} for n in sizes]
    with expectation(driver, size) as caught:
        hvd.broadcast_optimizer_state(torch.optim.SGD(groups, lr=0.1), root_rank=0)
    if size > 1:
        assert "group sizes = [2, 1]" in str(caught.value)
