"""Coded gradients among the things a torch script does: clipping, scalers, embeddings, frozen weights, hosts."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hvdscale.torch as hvd
from hvdscale.sync import EveryStep
from hvdscale.torch import coded
from tests.contract.driver import ContractDriver
from tests.contract.test_torch_pipeline import MODELS, SAMPLES, SEED, average, check_state, fresh, tokens
from tests.contract.torch_network import assert_same_everywhere, backward, mean_gradients, network

INT8 = EveryStep(wire="int8")


def distribute(model: nn.Module, plan: EveryStep = INT8, lr: float = 0.1, **more: Any) -> torch.optim.Optimizer:
    return hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr), model=model, sync=plan, **more)


def close(gradients: list[Tensor], wanted: list[Tensor], bound: float) -> None:
    largest = max(float(g.abs().max()) for g in wanted)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=0, atol=bound * largest)


def grads(model: nn.Module) -> list[Tensor]:
    return [p.grad for p in model.parameters()]


def test_gradients_are_the_mean_when_the_backward_pass_returns(driver: ContractDriver, rank: int, size: int) -> None:
    """So that clipping, scaling and norms see the same on every rank."""
    model = network()
    optimizer = distribute(model)
    wanted = mean_gradients(model, size)
    backward(model, rank)
    close(grads(model), wanted, 2 / 127)
    assert_same_everywhere(driver, grads(model))
    nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    assert_same_everywhere(driver, model.parameters())


def test_messages_leave_during_the_backward_pass_over_hosts(
    driver: ContractDriver, rank: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several of them, in one order; a parameter that some ranks leave out is sent as zeros in the end."""
    if size == 1:
        return
    hosts = SimpleNamespace(launch=SimpleNamespace(spans_hosts=True))
    monkeypatch.setattr(coded, "world", lambda: hosts)
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 1)])
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    optimizer = distribute(model, EveryStep(wire="fp16"))
    starts = [p.detach().clone() for p in model.parameters()]

    def loss(rank: int, step: int) -> Tensor:
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(10 * rank + step))
        first = model[rank % 2]  # each rank leaves one layer out
        return model[2](torch.tanh(first(x))).square().mean()

    for step in range(3):
        optimizer.zero_grad()
        loss(rank, step).backward()
        optimizer.synchronize()
        found = [g.clone() for g in grads(model)]
        (sum(loss(r, step) for r in range(size)) / size).backward()
        both = grads(model)
        wanted = [b - f for b, f in zip(both, found, strict=True)]  # backward passes add up
        close(found, wanted, 0.005)
        for parameter, gradient in zip(model.parameters(), found, strict=True):
            parameter.grad = gradient
        with optimizer.skip_synchronize():
            optimizer.step()
    assert_same_everywhere(driver, model.parameters())
    assert any(not torch.equal(p, start) for p, start in zip(model.parameters(), starts, strict=True))


def test_a_scaler_leaves_a_step_out_on_every_rank(driver: ContractDriver, rank: int) -> None:
    model = network()
    optimizer = distribute(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.full((4, 3), torch.inf if step == 1 and rank == 0 else 0.5 + rank)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(model(x).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        stayed = all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        assert stayed == (step == 1)
    assert scaler.get_scale() == 2.0
    assert_same_everywhere(driver, model.parameters())
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_gradients_after_some_that_no_step_used_are_averaged_too(driver: ContractDriver, rank: int, size: int) -> None:
    """Thrown away by the model's own ``zero_grad()``, of which the optimizer hears nothing."""
    model = network()
    optimizer = distribute(model)
    for _ in range(2):
        wanted = mean_gradients(model, size)
        model.zero_grad()
        backward(model, rank)
        optimizer.synchronize()
        close(grads(model), wanted, 2 / 127)
        assert_same_everywhere(driver, grads(model))


@pytest.mark.parametrize("dense", [True, False])
def test_sparse_gradients_go_dense_or_are_refused(driver: ContractDriver, rank: int, size: int, dense: bool) -> None:
    if size == 1:
        return
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
    optimizer = distribute(model, sparse_as_dense=dense)
    words = torch.tensor([rank, 5])
    if not dense:
        with pytest.raises(hvd.PlanError, match=r'gradient of 0.weight is sparse; wire="int8"'):
            model(words).sum().backward()
        return
    model(words).sum().backward()
    optimizer.step()
    assert_same_everywhere(driver, model.parameters())
    moved = model[0].weight.grad.abs().sum(1)
    assert (moved[:size] > 0).all()


def test_embeddings_travel_exactly(driver: ContractDriver, rank: int, size: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 3), nn.Linear(3, 1))
    optimizer = distribute(model, EveryStep(wire="int4"))
    twin = copy.deepcopy(model)
    (sum(twin(torch.tensor([r, 5])).sum() for r in range(size)) / size).backward()
    model(torch.tensor([rank, 5])).sum().backward()
    torch.testing.assert_close(model[0].weight.grad, twin[0].weight.grad)
    if size > 1:
        assert not torch.equal(model[1].weight.grad, twin[1].weight.grad)
    optimizer.step()


def test_bfloat16_gradients_are_added_in_float32(driver: ContractDriver, rank: int, size: int) -> None:
    model = network().bfloat16()
    optimizer = distribute(model, EveryStep(wire="fp16"))
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.0 if rank == 0 else 2.0**-9)
    optimizer.step()
    wanted = torch.tensor((1.0 + (size - 1) * 2.0**-9) / size).bfloat16()
    assert {p.grad.dtype for p in model.parameters()} == {torch.bfloat16}
    for parameter in model.parameters():
        torch.testing.assert_close(parameter.grad, wanted.expand_as(parameter), rtol=0, atol=0)


def test_weights_frozen_and_unfrozen_in_between(driver: ContractDriver, rank: int, size: int) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = distribute(model)
    start = model[0].weight.detach().clone()
    for step in range(4):
        if step == 2:
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
        assert torch.equal(model[0].weight, start) == (step < 2)
        assert_same_everywhere(driver, model.parameters())


def test_weights_frozen_in_turns_lose_nothing(driver: ContractDriver, rank: int, size: int) -> None:
    """What coding lost of a layer is sent when its turn comes again; a step with nothing to train is none."""
    model = nn.ModuleList([nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)])
    optimizer = distribute(model, EveryStep(wire="int4"), lr=1.0)
    starts = [layer.weight.detach().clone() for layer in model]
    means = [torch.zeros(4, 8), torch.zeros(4, 8)]
    for step in range(12):
        for number, layer in enumerate(model):
            layer.requires_grad_(number == step % 2)
        drawn = [torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + r)) for r in range(size)]
        optimizer.zero_grad()
        (model[step % 2].weight * drawn[rank]).sum().backward()
        optimizer.step()
        means[step % 2] += sum(drawn) / size
    optimizer.zero_grad()
    model.requires_grad_(False)
    optimizer.step()
    for layer, start, mean in zip(model, starts, means, strict=True):
        torch.testing.assert_close(start - layer.weight.detach(), mean, rtol=0, atol=0.45)
    assert_same_everywhere(driver, model.parameters())
    if size > 1:
        assert optimizer.sync.metrics()["rounds"] == 12


def test_weights_frozen_on_one_rank_only_are_told(driver: ContractDriver, rank: int, size: int) -> None:
    if size == 1:
        return
    for early in (True, False):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 1))
        optimizer = distribute(model)
        if not early:
            backward(model, rank)
            optimizer.step()
        model[min(rank, 1)].requires_grad_(False)  # two layers of the same sizes
        with pytest.raises(hvd.DesyncError, match="of other tensors than"):
            backward(model, rank)


def test_two_optimizers_meet_whichever_is_ready_first(driver: ContractDriver, rank: int) -> None:
    """One backward pass ends the gradients of both, in another order on each rank."""
    models = [network(), network()]
    optimizers = [distribute(model) for model in models]
    losses = {n: models[n](torch.full((4, 3), 0.5 + rank)).square().mean() for n in ((0, 1) if rank == 0 else (1, 0))}
    (losses[0] + losses[1]).backward()
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.step()
        assert_same_everywhere(driver, model.parameters())


def test_one_rank_may_copy_its_optimizer(driver: ContractDriver, rank: int) -> None:
    """To look at it, or to save it; a copy on every rank trains."""
    model = network()
    optimizer = distribute(model)
    if rank == 0:
        copy.deepcopy(optimizer)
    backward(model, rank)
    optimizer.step()
    twin, other = copy.deepcopy((model, optimizer))
    other.zero_grad()
    backward(twin, rank, 1)
    other.step()
    assert_same_everywhere(driver, twin.parameters())


def test_a_group_added_later_takes_part(driver: ContractDriver, rank: int, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model[0].parameters(), 0.1), model=model, sync=INT8)
    backward(model, rank)
    optimizer.step()
    optimizer.add_param_group({"params": list(model[2].parameters())})
    for step in range(2):
        optimizer.zero_grad()
        backward(model, rank, step)
        optimizer.step()
    assert_same_everywhere(driver, model.parameters())


def test_the_state_is_one_that_torch_loads_by_default(rank: int, size: int) -> None:
    model = network()
    optimizer = distribute(model)
    backward(model, rank)
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.sync.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    optimizer.sync.load_state_dict(state)
    if size > 1:
        again = optimizer.sync.state_dict()
        for name, array in state["arrays"].items():
            np.testing.assert_array_equal(again["arrays"][name], array)


def test_copies_of_stages_average_coded_gradients(rank: int, size: int) -> None:
    if size % 2:
        return
    mesh, model = hvd.Mesh(dp=2, pp=size // 2), MODELS["tied"]
    sharded = hvd.shard_model(fresh("tied"), mesh, loss=model.loss, microbatches=2, seed=SEED)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(sharded.parameters(), 0.1), model=sharded, sync=EveryStep(wire="fp16")
    )
    wholes = [fresh("tied") for _ in range(2)]
    plains = [torch.optim.SGD(whole.parameters(), 0.1) for whole in wholes]
    x, y = tokens(6)
    rows = (slice(0, 8), slice(6, SAMPLES))
    dp = mesh.coordinates(rank).dp
    for _ in range(3):
        optimizer.zero_grad()
        sharded.train_step(x[rows[dp]], y[rows[dp]])
        optimizer.step()
        for whole, plain, mine in zip(wholes, plains, rows, strict=True):
            plain.zero_grad()
            model.loss(whole(x[mine]), y[mine]).backward()
            plain.step()
        average(wholes)  # plain SGD: the mean of the weights is the step of the mean
    check_state(sharded, wholes[0], 2e-3)
    assert optimizer.sync.metrics()["rounds"] == 3
