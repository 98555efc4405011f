"""Gradients of every kind reach all ranks: sparse, empty, tied, scaled, half precision, compiled, from closures."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.driver import ContractDriver
from tests.contract.torch_network import (
    OPTIMIZERS,
    assert_gradients,
    assert_same_everywhere,
    backward,
    inputs,
    mean_gradients,
    network,
)


@pytest.mark.parametrize("kind", ["LBFGS", "SGD"])
def test_closures_are_evaluated_together(driver: ContractDriver, hvd: Any, rank: int, size: int, kind: str) -> None:
    model, alone = network(), network()
    made = {
        "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.5, max_iter=6, line_search_fn="strong_wolfe"),
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    }[kind]
    optimizer = hvd.DistributedOptimizer(made(model.parameters()), model.named_parameters())
    reference = made(alone.parameters())

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(inputs(rank)).square().mean()
        loss.backward()
        return loss

    def all_data() -> Tensor:
        reference.zero_grad()
        loss = sum(alone(inputs(r)).square().mean() for r in range(size)) / size
        loss.backward()
        return loss

    for _ in range(2):
        loss, wanted = optimizer.step(closure), reference.step(all_data)
        torch.testing.assert_close(loss, wanted.detach(), rtol=1e-3, atol=1e-5, check_layout=False)
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)
    assert_same_everywhere(driver, model.parameters())


@pytest.mark.parametrize("groups", [None, 1, 3])
def test_a_rank_that_never_saw_a_sparse_gradient_sends_one(
    driver: ContractDriver, hvd: Any, rank: int, size: int, groups: int | None
) -> None:
    """Without ``model=`` only ranks that use the table know: at the first step, and where it is used later."""
    tables = nn.ModuleList(nn.Embedding(4, 2, sparse=True) for _ in range(2))
    dense = nn.Linear(2, 2)
    parameters = [*tables.parameters(), *dense.parameters()]
    for p in parameters:
        nn.init.ones_(p)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(parameters, lr=0.1), groups=groups)
    for step in range(4):
        optimizer.zero_grad()
        rows = tables[step // 2](torch.tensor([step])) if rank == size - 1 else torch.ones(1, 2)
        dense(rows).sum().backward()
        optimizer.step()
        assert_same_everywhere(driver, parameters)
    touched = [(table.weight != 1).any(1).tolist() for table in tables]
    assert touched == [[True, True, False, False], [False, False, True, True]]


@pytest.mark.parametrize("as_dense", [False, True])
@pytest.mark.parametrize("kind", ["SparseAdam", "SGD"])
def test_sparse_gradients(driver: ContractDriver, hvd: Any, rank: int, size: int, kind: str, as_dense: bool) -> None:
    table, dense = nn.Embedding(10, 3, sparse=True), nn.Embedding(10, 3)
    made = {"SparseAdam": torch.optim.SparseAdam, "SGD": torch.optim.SGD}[kind]
    optimizer = hvd.DistributedOptimizer(made(table.parameters(), lr=0.1), model=table, sparse_as_dense=as_dense)
    rows = [[1, 3, 3], [3, 5, 1], [2, 2, 2], [0, 1, 9]]
    for step in range(3):
        optimizer.zero_grad()
        if step < 2 or rank == 0:  # in the last step only rank 0 has a gradient
            table(torch.tensor(rows[rank])).square().sum().backward()
        dense.load_state_dict(table.state_dict())
        dense.zero_grad()
        takers = range(size) if step < 2 else [0]
        sum(dense(torch.tensor(rows[r])).square().sum() for r in takers).backward()
        optimizer.synchronize()
        assert table.weight.grad.is_sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), dense.weight.grad / size)
        optimizer.step()
    assert_same_everywhere(driver, table.parameters())


LAYOUTS: dict[str, Callable[[], nn.Module]] = {
    "channels last": lambda: nn.Conv2d(2, 4, 3).to(memory_format=torch.channels_last),
    "bfloat16": lambda: nn.Conv2d(2, 4, 3).bfloat16(),
    "float16": lambda: nn.Conv2d(2, 4, 3).half(),
    "float64": lambda: nn.Conv2d(2, 4, 3).double(),
}


@pytest.mark.parametrize("groups", [None, 1], ids=["single", "grouped"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(hvd: Any, rank: int, size: int, layout: str, groups: int | None) -> None:
    torch.manual_seed(0)
    model = LAYOUTS[layout]()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, groups=groups)
    dtype = model.weight.dtype
    weight = torch.arange(model.weight.numel()).view_as(model.weight).to(dtype)
    ((model.weight * weight * (rank + 1)).sum() + 0 * model.bias.sum()).backward()
    optimizer.synchronize()
    torch.testing.assert_close(model.weight.grad, weight * (size + 1) / 2, rtol=1e-2, atol=1e-2)
    assert model.weight.grad.stride() == model.weight.stride()
    assert (model.bias.grad == 0).all()
    optimizer.step()


def test_empty_parameters(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = nn.ParameterDict({"empty": nn.Parameter(torch.empty(0, 3)), "some": nn.Parameter(torch.ones(2))})
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model=model)
    (model["empty"].sum() + (rank + 1) * model["some"].sum()).backward()
    optimizer.step()
    torch.testing.assert_close(model["some"].detach(), torch.full((2,), 1 - (size + 1) / 2))


def test_tied_weights_are_reduced_once(hvd: Any, rank: int, size: int) -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    named = list(model.named_parameters(remove_duplicate=False))
    assert len(named) == 2
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), named)
    twin = copy.deepcopy(model)
    x = inputs(rank)[:, :2]
    model["b"](model["a"](x)).square().mean().backward()
    (sum(twin["b"](twin["a"](inputs(r)[:, :2])).square().mean() for r in range(size)) / size).backward()
    torch.testing.assert_close(model["a"].weight.grad, twin["a"].weight.grad)
    optimizer.step()


def test_compiled_models(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = network()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    for step in range(2):
        optimizer.zero_grad()
        wanted = mean_gradients(model, size, step)
        backward(compiled, rank, step)
        assert_gradients(model, wanted)
        optimizer.step()
    assert_same_everywhere(driver, model.parameters())


def test_adasum_combines_weight_updates(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    """Orthogonal updates add up, parallel ones are averaged: what makes Adasum."""
    parameters = {"across": nn.Parameter(torch.zeros(8)), "along": nn.Parameter(torch.zeros(8))}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0, momentum=0.9)
    if hvd.size() > 1 and not hvd.mpi_enabled():
        with pytest.raises(hvd.PlanError, match="needs MPI"):
            hvd.DistributedOptimizer(optimizer, parameters.items(), op=hvd.Adasum)
        return
    hvd.DistributedOptimizer(optimizer, parameters.items(), op=hvd.Adasum)
    for _ in range(2):
        optimizer.zero_grad()
        (parameters["across"][rank] + parameters["along"].sum()).backward()
        optimizer.step()
    steps = 1.0 + 1.9
    across = torch.zeros(8)
    across[:size] = -steps
    torch.testing.assert_close(parameters["across"].detach(), across)
    torch.testing.assert_close(parameters["along"].detach(), torch.full((8,), -steps))
    if size > 1:
        with pytest.raises(AssertionError, match="Skipping"), optimizer.skip_synchronize():
            pass


@pytest.mark.parametrize("kind", ["SGD", "AdamW fused"])
@pytest.mark.parametrize("unscale", [True, False], ids=["unscaled by hand", "unscaled in step"])
def test_a_scaler_skips_the_same_steps_everywhere(
    driver: ContractDriver, hvd: Any, rank: int, size: int, kind: str, unscale: bool
) -> None:
    model = nn.ModuleDict({"used": nn.Linear(3, 1), "unused": nn.Linear(3, 1)})  # the round ends after backward
    optimizer = hvd.DistributedOptimizer(OPTIMIZERS[kind](model.parameters()), model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    scales = []
    for step in range(3):
        before = [p.detach().clone() for p in model.parameters()]
        loss = model["used"](inputs(rank, step)).mean()
        if step == 1 and rank == size - 1:
            loss = loss * float("inf")
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        if unscale:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved = not torch.equal(before[0], model["used"].weight)
        assert moved == (step != 1)
        assert_same_everywhere(driver, model.parameters())
    assert scales == [8.0, 4.0, 4.0]
