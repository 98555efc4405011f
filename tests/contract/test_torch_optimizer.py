"""The torch optimizer stays the user's own: same object, same state, same habits; its gradients are everyone's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.contract.driver import ContractDriver

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1),
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
    flat = torch.cat([t.detach().double().reshape(-1) for t in tensors])
    everyone = driver.everyones(flat.numpy())
    assert (everyone == everyone[0]).all()


def assert_gradients(model: nn.Module, wanted: list[Tensor]) -> None:
    for p, g in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.grad, g)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer_equals_one_process(driver: ContractDriver, hvd: Any, rank: int, size: int, kind: str) -> None:
    alone, model = network(), network()
    reference = OPTIMIZERS[kind](list(alone.parameters()))
    plain = OPTIMIZERS[kind](list(model.parameters()))
    optimizer = hvd.DistributedOptimizer(plain, model.named_parameters())
    assert optimizer is plain
    assert isinstance(optimizer, type(reference))
    assert type(optimizer).__name__ == type(reference).__name__
    for step in range(3):
        for p, g in zip(alone.parameters(), mean_gradients(alone, size, step), strict=True):
            p.grad = g
        reference.step()
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    for p, q in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert_same_everywhere(driver, model.parameters())


def test_gradients_are_averaged_when_backward_returns(hvd: Any, rank: int, size: int) -> None:
    model = network()
    hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    backward(model, rank)
    assert_gradients(model, mean_gradients(model, size))


def test_horovods_way_of_clipping(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    start = [p.detach().clone() for p in model.parameters()]
    backward(model, rank)
    optimizer.synchronize()
    optimizer.synchronize()  # changes nothing
    assert_gradients(model, mean_gradients(model, size))
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    with optimizer.skip_synchronize():
        optimizer.step()
    moved = torch.cat([(p - s).reshape(-1) for p, s in zip(model.parameters(), start, strict=True)])
    torch.testing.assert_close(moved.norm(), torch.tensor(1e-3), rtol=1e-3, atol=0)
    assert_same_everywhere(driver, model.parameters())


@pytest.mark.parametrize("wrap_first", [True, False], ids=["scheduler after", "scheduler before"])
def test_schedulers_and_hooks(hvd: Any, rank: int, wrap_first: bool) -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    if wrap_first:
        hvd.DistributedOptimizer(optimizer, model.named_parameters())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    if not wrap_first:
        hvd.DistributedOptimizer(optimizer, model.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2):
            backward(model, rank, step)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    assert calls == ["before", "after"] * 2
    assert optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_takes_torchs_argument(hvd: Any, rank: int, size: int, set_to_none: bool) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    for step in range(2):
        optimizer.zero_grad(set_to_none=set_to_none)
        assert all((p.grad is None) if set_to_none or step == 0 else (p.grad == 0).all() for p in model.parameters())
        wanted = mean_gradients(model, size, step)
        backward(model, rank, step)
        assert_gradients(model, wanted)
        optimizer.step()


def test_state_from_before_is_kept_and_checkpoints_are_plain(hvd: Any, rank: int) -> None:
    model, twin = network(), network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    backward(model, 0)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    hvd.DistributedOptimizer(optimizer, model.named_parameters())
    after = optimizer.state_dict()
    assert after.keys() == before.keys()
    assert after["param_groups"] == before["param_groups"]
    for i, state in before["state"].items():
        for key, value in state.items():
            assert torch.equal(after["state"][i][key], value)
    file = io.BytesIO()
    torch.save(after, file)
    file.seek(0)
    plain = torch.optim.Adam(twin.parameters(), lr=0.5)
    plain.load_state_dict(torch.load(file, weights_only=True))
    assert plain.param_groups[0]["lr"] == 0.1
    optimizer.load_state_dict(plain.state_dict())
    backward(model, rank)
    optimizer.step()
    assert all(state["step"] == 2 for state in optimizer.state.values())


@pytest.mark.parametrize(
    "copy_of", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_is_distributed_too(hvd: Any, rank: int, size: int, copy_of: Any) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), groups=2
    )
    model, twin = copy_of((model, optimizer))
    assert twin is not optimizer
    backward(model, rank)
    assert_gradients(model, mean_gradients(model, size))
    twin.step()


def test_a_group_added_later_is_reduced(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model[0].parameters(), lr=0.1), model.named_parameters())
    optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.2})
    backward(model, rank)
    assert_gradients(model, mean_gradients(model, size))
    optimizer.step()
    assert_same_everywhere(driver, model.parameters())
    with pytest.raises(hvd.PlanError, match="Name all of them"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert len(optimizer.param_groups) == 2


def test_parameters_frozen_and_unfrozen_on_the_way(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1), model.named_parameters(), groups=2
    )
    kept = model[0].weight.detach().clone()
    backward(model, rank)
    optimizer.step()
    assert torch.equal(model[0].weight, kept), "frozen weights moved"
    model[0].requires_grad_(True)
    for step in range(2):  # the first round finds the new parameters at the step, later ones in the backward pass
        optimizer.zero_grad()
        wanted = mean_gradients(model, size, step)
        backward(model, rank, step)
        optimizer.synchronize()
        assert_gradients(model, wanted)
        optimizer.step()
    assert not torch.equal(model[0].weight, kept)
    assert_same_everywhere(driver, model.parameters())


def test_a_parameter_only_some_ranks_use(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    model = nn.ModuleDict({"always": nn.Linear(2, 1), "sometimes": nn.Linear(2, 1)})
    for p in model.parameters():
        nn.init.ones_(p)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model.named_parameters())
    for _ in range(2):
        x = torch.ones(1, 2)
        loss = model["always"](x).sum() + (model["sometimes"](x).sum() if rank == size - 1 else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(model["always"].weight, torch.full((1, 2), -1.0))
    torch.testing.assert_close(model["sometimes"].weight, torch.full((1, 2), 1 - 2 / size))
    assert_same_everywhere(driver, model.parameters())


def test_two_losses_reaching_different_parameters(hvd: Any, rank: int, size: int) -> None:
    model = nn.ModuleList([nn.Linear(3, 1), nn.Linear(3, 1)])
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    twin = copy.deepcopy(model)
    for part, other in zip(model, twin, strict=True):
        part(inputs(rank)).square().mean().backward()
        (sum(other(inputs(r)).square().mean() for r in range(size)) / size).backward()
    assert_gradients(model, [p.grad for p in twin.parameters()])
    optimizer.step()


def test_backward_passes_are_counted(hvd: Any, rank: int, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), backward_passes_per_step=2
    )
    assert optimizer.backward_passes_per_step == 2
    wanted = [sum(g) for g in zip(*(mean_gradients(model, size, step) for step in (0, 1)), strict=True)]
    backward(model, rank, 0)
    if size > 1:
        with pytest.raises(AssertionError, match=r"before optimizer\.step"):
            optimizer.zero_grad()
    backward(model, rank, 1)
    assert_gradients(model, wanted)
    if size > 1:
        with pytest.raises(AssertionError, match="more than backward_passes_per_step=2 times"):
            backward(model, rank, 2)
    optimizer.zero_grad()
    optimizer.set_backward_passes_per_step(1)
    wanted = mean_gradients(model, size, 3)
    backward(model, rank, 3)
    assert_gradients(model, wanted)
    optimizer.step()


def test_a_step_before_all_passes_reduces_what_is_there(hvd: Any, rank: int, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.0), model.named_parameters(), backward_passes_per_step=3, groups=1
    )
    backward(model, rank)
    optimizer.step()
    assert_gradients(model, mean_gradients(model, size))


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
    (model.weight * weight * (rank + 1)).sum().backward()
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


def test_weights_buffers_and_state_start_as_the_first_ranks(driver: ContractDriver, hvd: Any, rank: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    nn.init.constant_(model[0].weight, float(rank))
    model[1].running_mean.fill_(rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1 * (rank + 1))
    if rank == 0:
        model(inputs(0)).sum().backward()
        optimizer.step()
    hvd.DistributedOptimizer(optimizer, model=model)
    assert optimizer.param_groups[0]["lr"] == 0.1
    states = [v for state in optimizer.state.values() for v in state.values()]
    assert len(states) == 4 * 3
    assert_same_everywhere(driver, [*model.state_dict().values(), *states])


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


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (lambda m: {"named_parameters": [("a", p) for p in m.parameters()]}, "'a' appear more than once"),
        (lambda m: {"named_parameters": list(m.named_parameters())[:2]}, "2 parameters of the optimizer are not in it"),
        (lambda m: {"named_parameters": list(m.parameters())}, "sequence of tuples"),
        (lambda m: {"groups": [["0.weight"]]}, "lists of parameters; one holds a str"),
        (lambda m: {"groups": [[*m[0].parameters()], [*m.parameters()]]}, "one group only"),
        (lambda m: {"op": 99}, "op must be Average, Sum or Adasum"),
    ],
    ids=["repeated names", "missing names", "no names", "groups of names", "groups that overlap", "no such op"],
)
def test_arguments_that_cannot_be(hvd: Any, make: Any, rule: str) -> None:
    model = network()
    with pytest.raises(hvd.PlanError, match=rule):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), **make(model))


def test_nothing_to_train(hvd: Any) -> None:
    model = network().requires_grad_(False)
    with pytest.raises(hvd.PlanError, match="none of them is trainable"):
        hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    with pytest.raises(hvd.PlanError, match=r"torch\.optim\.Optimizer"):
        hvd.DistributedOptimizer(model)


def test_one_process_has_no_hooks(hvd: Any, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    assert bool(optimizer._optimizer_step_pre_hooks) == (size > 1)
    assert bool(model[0].weight._post_accumulate_grad_hooks) == (size > 1)
