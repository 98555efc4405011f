"""Ranks made equal: weights, buffers and optimizer state, without a step and without pickle."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.contract.driver import ContractDriver
from tests.contract.torch_network import assert_same_everywhere

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), amsgrad=True, weight_decay=0.1),
    "Adam, rate in a tensor": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}


def network(rank: int) -> nn.Sequential:
    torch.manual_seed(rank)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.randn(5, 3)).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)


def flat(value: Any) -> list[torch.Tensor]:
    """Every number of a state dictionary, in order."""
    if isinstance(value, dict):
        return [t for v in value.values() for t in flat(v)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in flat(v)]
    return [] if value is None or isinstance(value, str) else [torch.as_tensor(value)]


@pytest.mark.parametrize("params", ["state_dict", "named_parameters", "parameters", "list of pairs"])
def test_parameters_in_every_form(driver: ContractDriver, hvd: Any, rank: int, size: int, params: str) -> None:
    model, root = network(rank), size - 1
    pointers = [p.data_ptr() for p in model.parameters()]
    forms = {
        "state_dict": model.state_dict,
        "named_parameters": model.named_parameters,
        "parameters": model.parameters,
        "list of pairs": lambda: list(model.named_parameters()),
    }
    hvd.broadcast_parameters(forms[params](), root_rank=root)
    assert_same_everywhere(driver, model.parameters())
    assert torch.equal(model[0].weight, network(root)[0].weight)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_layouts_dtypes_and_what_is_no_tensor(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    tensors = {
        "transposed": torch.full((3, 2), float(rank)).t(),
        "bfloat16": torch.full((3,), rank, dtype=torch.bfloat16),
        "bool": torch.tensor([rank == 0]),
        "counter": torch.tensor(rank),
        "empty": torch.empty(0),
    }
    with pytest.warns(UserWarning, match="are not tensors as they are: version"):
        hvd.broadcast_parameters({**tensors, "version": 2, "none": None}, root_rank=0)
    for tensor in tensors.values():
        assert torch.equal(tensor, (tensor * 0 + (tensor.dtype == torch.bool)).to(tensor.dtype))


@pytest.mark.parametrize(
    ("call", "rule"),
    [
        (lambda hvd: hvd.broadcast_parameters(network(0), 0), "pass module.state_dict"),
        (lambda hvd: hvd.broadcast_parameters(3, 0), "got int"),
        (lambda hvd: hvd.broadcast_parameters(OPTIMIZERS["SGD"]([torch.ones(1)]).state_dict(), 0), "optimizer's state"),
        (lambda hvd: hvd.broadcast_parameters([torch.ones(1)], 99), "root_rank must be one of"),
        (lambda hvd: hvd.broadcast_optimizer_state(OPTIMIZERS["SGD"]([torch.ones(1)]), -1), "root_rank must be one of"),
    ],
    ids=["a module", "a number", "optimizer state", "no such rank", "no such rank for an optimizer"],
)
def test_what_cannot_be_broadcast(hvd: Any, call: Any, rule: str) -> None:
    with pytest.raises(hvd.PlanError, match=rule):
        call(hvd)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "distributed"])
@pytest.mark.parametrize("who_trained", ["root", "everyone", "nobody", "others"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimizer_state(
    driver: ContractDriver, hvd: Any, rank: int, size: int, kind: str, who_trained: str, wrapped: bool
) -> None:
    model = network(rank)
    parameters = list(model.parameters())
    optimizer = OPTIMIZERS[kind](parameters)
    root = size - 1
    if {"root": rank == root, "everyone": True, "nobody": False, "others": rank != root}[who_trained]:
        train(model, optimizer, rank + 1)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * (rank + 1)
    if wrapped:
        hvd.DistributedOptimizer(optimizer, model.named_parameters())
    weights = [p.detach().clone() for p in parameters]
    gradients = [None if p.grad is None else p.grad.clone() for p in parameters]
    before = copy.deepcopy(optimizer.state_dict())

    hvd.broadcast_optimizer_state(optimizer, root_rank=root, model=model)

    after = optimizer.state_dict()
    for p, weight, gradient in zip(parameters, weights, gradients, strict=True):
        assert torch.equal(p, weight), "weights moved"
        assert (p.grad is None) == (gradient is None)
    assert_same_everywhere(driver, flat(after))
    if rank == root:
        for old, new in zip(flat(before), flat(after), strict=True):
            assert torch.equal(old, new)
    assert bool(after["state"]) == (who_trained in ("root", "everyone") and kind != "SGD")
    assert type(after["param_groups"][0].get("betas")) is type(before["param_groups"][0].get("betas"))


def test_options_that_are_functions_stay(hvd: Any, rank: int) -> None:
    optimizer = torch.optim.SGD([{"params": [torch.ones(1)], "lr": 0.1 * (rank + 1), "schedule": len}])
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    assert optimizer.param_groups[0]["schedule"] is len
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_objects_as_in_horovod(hvd: Any, rank: int, size: int) -> None:
    assert hvd.broadcast_object({"rank": rank}, root_rank=0) == {"rank": 0}
    assert hvd.allgather_object((rank, "x")) == [(r, "x") for r in range(size)]


def test_objects_whose_types_differ_between_ranks(hvd: Any, rank: int, size: int) -> None:
    assert hvd.broadcast_object({"epoch": 3} if rank == 0 else None, root_rank=0) == {"epoch": 3}
    assert hvd.allgather_object("first" if rank == 0 else rank) == ["first", *range(1, size)]


def test_elastic_state(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = network(rank)
    optimizer = OPTIMIZERS["Adam"](model.parameters())
    if rank == 0:
        train(model, optimizer, 2)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, batch=rank)
    state.sync()
    assert state.batch == 0
    assert {int(s["step"]) for s in optimizer.state.values()} == {2}
    assert_same_everywhere(driver, [*model.state_dict().values(), *flat(optimizer.state_dict())])
    kept = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1)
    state.restore()
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("left", [0, 1, 2, 7])
def test_elastic_sampler_with_few_samples_left(driver: ContractDriver, hvd: Any, size: int, left: int) -> None:
    sampler = hvd.elastic.ElasticSampler(range(10), shuffle=False)
    sampler.load_state_dict({"epoch": 0, "processed_num": 10 - left})
    own = list(sampler)
    assert len(own) == len(sampler) == -(-left // size)
    if own:
        everyone = driver.everyones(torch.tensor(own).numpy())
        assert set(everyone.ravel()) == set(range(10 - left, 10))
