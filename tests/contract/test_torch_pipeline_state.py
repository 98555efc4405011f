"""The optimizer of a pipeline, saved whole: one process, or another mesh, goes on from it to the bit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import hvdscale.torch as hvd
from tests.contract.torch_pipelines import MODELS, SEED, alone, fresh

Named = Iterable[tuple[str, nn.Parameter]]


def adam(named: Named) -> torch.optim.Optimizer:
    """Two groups: weight decay for matrices alone."""
    flat, rest = [], []
    for _, parameter in named:
        (flat if parameter.dim() > 1 else rest).append(parameter)
    groups = [{"params": flat, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 2e-2}]
    return torch.optim.AdamW(groups, 1e-2, eps=1e-4)


def momentum(named: Named) -> torch.optim.Optimizer:
    """With names, which torch saves."""
    return torch.optim.SGD(list(named), 0.05, momentum=0.9)


MAKERS: dict[str, Callable[[Named], torch.optim.Optimizer]] = {"AdamW": adam, "SGD": momentum}


def meshes(size: int) -> list[hvd.Mesh]:
    return [hvd.Mesh(pp=size), *([hvd.Mesh(dp=2, pp=size // 2)] if size > 1 and size % 2 == 0 else [])]


def shard(name: str, mesh: hvd.Mesh, whole: nn.Module, maker: str, **more: Any) -> tuple[Any, Any]:
    model = MODELS[name]
    sharded = hvd.shard_model(whole, mesh, loss=model.loss, seed=SEED, by=model.by, **more)
    optimizer = MAKERS[maker](sharded.named_parameters())
    return sharded, hvd.DistributedOptimizer(optimizer, model=sharded)


def train(name: str, models: Iterable[tuple[Any, Any]], steps: range) -> None:
    """Each sharded model and its optimizer, and each whole one, on the same batch, in one piece."""
    model = MODELS[name]
    x, y = model.data(6)
    for step in steps:
        for trained, optimizer in models:
            optimizer.zero_grad()
            if isinstance(trained, nn.Module):
                alone(model, trained, x, y, 1, step)
            else:
                trained.train_step(x, y)
            optimizer.step()


def same(one: Any, other: Any, close: float = 0.0) -> None:
    """Two states, nested."""
    assert type(one) is type(other) or isinstance(one, dict)
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, atol=close, rtol=10 * close)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key], close)
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            same(a, b, close)
    else:
        assert one == other


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("name", ["plain", "tied"])
def test_training_goes_on_in_one_process_and_on_another_mesh(size: int, name: str, maker: str) -> None:
    """Bit-equal where no two stages add to one gradient; the whole state is that of one process's optimizer."""
    close = 0.0 if name == "plain" else 1e-5  # a shared weight's gradients are added up in another order
    mesh, *others = meshes(size)
    sharded, optimizer = shard(name, mesh, fresh(name), maker)
    whole = fresh(name)
    plain = MAKERS[maker](whole.named_parameters())
    train(name, [(sharded, optimizer), (whole, plain)], range(3))
    state = sharded.optimizer_state_dict(optimizer)
    same(state, plain.state_dict(), close)
    assert len(state["state"]) == len(list(whole.parameters()))

    resumed = fresh(name)
    resumed.load_state_dict(sharded.state_dict())
    resumed_optimizer = MAKERS[maker](resumed.named_parameters())
    resumed_optimizer.load_state_dict(copy.deepcopy(state))
    torch.manual_seed(99)
    again = [shard(name, other, MODELS[name].make(), maker, schedule="gpipe") for other in (mesh, *others)]
    for model, its_optimizer in again:
        model.load_state_dict(resumed.state_dict())
        model.load_optimizer_state_dict(its_optimizer, copy.deepcopy(resumed_optimizer.state_dict()))
        same(model.optimizer_state_dict(its_optimizer), state)
    train(name, [(sharded, optimizer), (resumed, resumed_optimizer), *again], range(3, 6))
    for model, its_optimizer in ((sharded, optimizer), *again):
        same(model.state_dict(), dict(resumed.state_dict()), close)
        same(model.optimizer_state_dict(its_optimizer), resumed_optimizer.state_dict(), close)


def test_one_rank_alone_can_have_it_and_wrong_ones_are_refused(rank: int, size: int) -> None:
    sharded, optimizer = shard("plain", hvd.Mesh(pp=size), fresh("plain"), "AdamW")
    train("plain", [(sharded, optimizer)], range(1))
    state = sharded.optimizer_state_dict(optimizer)
    alone_has = sharded.optimizer_state_dict(optimizer, root=size - 1)
    same(alone_has, state if rank == size - 1 else {})
    fewer = {**state, "param_groups": state["param_groups"][:1]}
    foreign = torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1) if rank == size - 1 else optimizer
    uneven = torch.optim.SGD([{"params": [p]} for p in list(sharded.parameters())[: 1 + rank]], 0.1)
    backwards = torch.optim.SGD(list(sharded.parameters())[::-1], 0.1)
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: sharded.load_optimizer_state_dict(optimizer, fewer), "has groups of"),
        (lambda: sharded.optimizer_state_dict(foreign), "none of the model's"),
    ]
    if size > 1:
        refused += [
            (lambda: sharded.optimizer_state_dict(uneven), "have the same groups"),
            (lambda: sharded.optimizer_state_dict(backwards), "in the order of the model"),
        ]
    for call, rule in refused:
        with pytest.raises(hvd.StateError, match=rule):
            call()
    with pytest.raises(hvd.PlanError, match="rank 99"):
        sharded.optimizer_state_dict(optimizer, root=99)
