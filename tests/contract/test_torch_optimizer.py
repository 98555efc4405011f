"""The torch optimizer stays the user's own: same object, same state, same habits; its gradients are everyone's."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn

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
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters())
    backward(model, rank)
    assert_gradients(model, mean_gradients(model, size))
    optimizer.step()


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


@pytest.mark.parametrize("named", [True, False], ids=["in torch's way", "by place"])
def test_a_module_made_later_is_reduced(driver: ContractDriver, hvd: Any, rank: int, size: int, named: bool) -> None:
    """Its parameters could not be named when the others were."""
    model = network()
    given = list(model.named_parameters()) if named else [p for _, p in model.named_parameters()]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(given, lr=0.1), model=model)
    model.append(nn.Linear(1, 2))
    for p in model[3].parameters():
        nn.init.ones_(p)
    added = [(f"3.{n}", p) for n, p in model[3].named_parameters()] if named else list(model[3].parameters())
    optimizer.add_param_group({"params": added})
    backward(model, rank)
    assert_gradients(model, mean_gradients(model, size))
    optimizer.step()
    assert_same_everywhere(driver, model.parameters())


def test_a_copy_on_one_rank_only_shifts_nobodys_messages(
    driver: ContractDriver, hvd: Any, rank: int, size: int
) -> None:
    """As when one rank keeps the best model so far."""
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    kept = copy.deepcopy((model, optimizer)) if rank == 0 else None
    later = network(1)
    another = hvd.DistributedOptimizer(torch.optim.SGD(later.parameters(), lr=0.1), model=later)
    for net, its in ((model, optimizer), (later, another)):
        backward(net, rank)
        its.step()
        assert_same_everywhere(driver, net.parameters())
    assert (kept is None) == (rank != 0)


def test_a_copy_knows_what_is_sparse(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(table.parameters(), lr=1.0), model=table)
    table, optimizer = copy.deepcopy((table, optimizer))
    before = table.weight.detach().clone()
    if rank == 0:  # others have no gradient to tell them
        table(torch.tensor([1])).sum().backward()
    optimizer.step()
    assert_same_everywhere(driver, table.parameters())
    torch.testing.assert_close(before - table.weight, torch.tensor([[0.0], [1.0], [0.0], [0.0]]).expand(4, 2) / size)


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


@pytest.mark.parametrize("groups", [None, 2], ids=["own groups", "two groups"])
def test_parameters_unfrozen_between_two_passes_are_reduced_in_that_round(
    driver: ContractDriver, hvd: Any, rank: int, size: int, groups: int | None
) -> None:
    model = nn.ModuleList([nn.Linear(3, 1) for _ in range(4)])
    model[1:].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model.named_parameters(), backward_passes_per_step=2, groups=groups
    )
    for _ in range(2):
        sum(layer(torch.full((1, 3), rank + 1.0)) for layer in model).sum().backward()
        model[1:].requires_grad_(True)
    for layer, passes in zip(model, (2, 1, 1, 1), strict=True):
        torch.testing.assert_close(layer.weight.grad, torch.full((1, 3), passes * (size + 1) / 2))
        torch.testing.assert_close(layer.bias.grad, torch.full((1,), float(passes)))
    optimizer.step()
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


def test_unused_parameters_are_named_once_because_gradients_then_come_late(hvd: Any, rank: int, size: int) -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "unused": nn.Linear(2, 1)})
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model=model)
    told = []
    for _ in range(2):
        optimizer.zero_grad()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model["used"](torch.full((1, 2), float(rank))).sum().backward()
        told += [str(w.message) for w in caught if "optimizer.synchronize()" in str(w.message)]
        optimizer.synchronize()
        torch.testing.assert_close(model["used"].weight.grad, torch.full((1, 2), (size - 1) / 2))
        with optimizer.skip_synchronize():
            optimizer.step()
    assert len(told) == (1 if size > 1 else 0)
    assert all("unused.weight, unused.bias" in text for text in told)


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


@pytest.mark.parametrize("kept", [True, False], ids=["first kept", "first thrown away"])
def test_a_second_optimizer_for_the_same_model(hvd: Any, rank: int, size: int, kept: bool) -> None:
    """Gradients are reduced once, not once for each optimizer: a sum of sums would show."""
    model = network()
    first = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, op=hvd.Sum)
    if not kept:
        del first
    optimizer = hvd.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), model=model, op=hvd.Sum)
    for step in range(2):
        optimizer.zero_grad()
        wanted = [g * size for g in mean_gradients(model, size, step)]
        backward(model, rank, step)
        assert_gradients(model, wanted)
        optimizer.step()
