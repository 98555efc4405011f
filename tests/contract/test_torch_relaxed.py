"""Rounds among the things a torch script does: schedulers, hooks, copies, scalers, frozen and late parameters."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import horovod.torch
import numpy as np
import pytest
import torch
from torch import nn

import hvdscale.torch as hvd
from hvdscale.sync import DiLoCo, LocalSGD


def batch(rank: int, step: int, features: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng([rank, step])
    return torch.from_numpy(rng.normal(size=(8, features))).float(), torch.from_numpy(rng.normal(size=(8, 1))).float()


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))


def step(model: nn.Module, optimizer: Any, rank: int, number: int) -> None:
    optimizer.zero_grad()
    x, y = batch(rank, number)
    (model(x) - y).square().mean().backward()
    optimizer.step()


def everyones(model: nn.Module) -> torch.Tensor:
    """[ranks, parameters]"""
    return hvd.allgather(torch.cat([p.detach().float().reshape(-1) for p in model.parameters()])[None])


def agree(model: nn.Module) -> bool:
    weights = everyones(model)
    return bool((weights == weights[0]).all())


def test_the_optimizer_stays_the_users_own(rank: int) -> None:
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[str] = []
    plain.register_step_post_hook(lambda *_: seen.append("before"))
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
    optimizer = hvd.DistributedOptimizer(plain, model=model, sync=LocalSGD(3))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    for number in range(4):
        step(model, optimizer, rank, number)
        scheduler.step()
    assert optimizer is plain
    assert isinstance(optimizer, torch.optim.SGD)
    assert seen == ["before", "after"] * 4
    assert optimizer.param_groups[0]["lr"] == 0.025


def test_a_closure_is_called_and_its_loss_returned(rank: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(2))
    x, y = batch(rank, 0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.item() == pytest.approx(float((network()(x) - y).square().mean()))
    optimizer.step(closure)
    assert agree(model)


def test_saved_parameters_keep_their_size_and_their_memory(rank: int) -> None:
    model = network()
    before = [p.data_ptr() for p in model.parameters()]
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=DiLoCo(2))
    for number in range(4):
        step(model, optimizer, rank, number)
    assert [p.data_ptr() for p in model.parameters()] == before
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(model[0].bias, file)
    torch.save(network()[0].bias, plain)
    assert file.getbuffer().nbytes == plain.getbuffer().nbytes


@pytest.mark.parametrize("way", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_a_copy_trains_with_rounds_of_its_own(rank: int, size: int, way: Any) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(3))
    twin_model, twin = way((model, optimizer))
    for number in range(2):
        step(twin_model, twin, rank, number)
    assert agree(twin_model) == (size == 1)
    step(twin_model, twin, rank, 2)
    assert agree(twin_model)
    assert optimizer.sync.metrics()["rounds"] == 0


def test_one_rank_may_copy_its_optimizer(rank: int) -> None:
    """To look at it, say: the others hear nothing of it."""
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=DiLoCo(2))
    step(model, optimizer, rank, 0)
    if rank == 0:
        twin = copy.deepcopy(optimizer)
        assert twin.param_groups[0]["lr"] == 0.1
    step(model, optimizer, rank, 1)
    assert agree(model)


def test_a_scaler_that_skips_on_one_rank_shifts_no_round(rank: int, size: int) -> None:
    """The skipped step counts; the rank's weights were not touched by infinities and it goes on voting."""
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(4))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for number in range(4):
        optimizer.zero_grad()
        x, y = batch(rank, number)
        scaler.scale((model(x) - y).square().mean()).backward()
        if number == 1 and rank == 0:
            model[0].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.sync.metrics()["steps"] == 4
    assert agree(model)
    assert torch.isfinite(everyones(model)).all()


@pytest.mark.parametrize("warmup", [0, 2])
def test_horovods_way_of_clipping_counts_steps_and_sees_what_was_unfrozen(rank: int, warmup: int) -> None:
    model = network()
    model[0].requires_grad_(False)
    plan = LocalSGD(2, warmup=warmup)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=plan)
    for number in range(warmup + 5):  # the change ends a period, and begins one of two steps
        if number == warmup + 2:
            assert set(optimizer.sync.outer_weights()) == {"2.weight", "2.bias"}
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        x, y = batch(rank, number)
        (model(x) - y).square().mean().backward()
        optimizer.synchronize()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        with optimizer.skip_synchronize():
            optimizer.step()
    assert optimizer.sync.metrics()["steps"] == warmup + 5
    optimizer.sync.flush()
    assert len(optimizer.sync.outer_weights()) == 4
    assert agree(model)


def test_bfloat16_parameters_have_a_float32_anchor(rank: int) -> None:
    model = network().to(torch.bfloat16)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=DiLoCo(2))
    for number in range(6):
        optimizer.zero_grad()
        x, y = (t.bfloat16() for t in batch(rank, number))
        (model(x) - y).square().mean().backward()
        optimizer.step()
    anchors = optimizer.sync.outer_weights()
    assert agree(model)
    for name, parameter in model.named_parameters():
        assert anchors[name].dtype == torch.float32
        assert torch.equal(anchors[name].bfloat16(), parameter)
    assert any((anchor != anchor.bfloat16()).any() for anchor in anchors.values())


def test_float64_weights_are_put_back_to_the_bit(rank: int) -> None:
    model = network().double()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(10))
    x, y = batch(rank, 0)
    (model(x.double()) - y).square().mean().backward()
    optimizer.step()
    own = [p.detach().clone() for p in model.parameters()]
    with optimizer.sync.evaluating():
        pass
    assert all(torch.equal(p, o) for p, o in zip(model.parameters(), own, strict=True))


def test_frozen_parameters_stay_out_until_they_are_trained(rank: int) -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(2))
    start = model[0].weight.clone()
    for number in range(2):
        step(model, optimizer, rank, number)
    assert set(optimizer.sync.outer_weights()) == {"2.weight", "2.bias"}
    assert torch.equal(model[0].weight, start)
    model[0].requires_grad_(True)
    for number in range(3):  # the change ends a period, and begins one of two steps
        step(model, optimizer, rank, number)
    optimizer.sync.flush()
    assert len(optimizer.sync.outer_weights()) == 4
    assert not torch.equal(model[0].weight, start)
    assert agree(model)


def test_a_group_added_later_takes_part_from_the_first_ranks_values(rank: int) -> None:
    model, more = network(), nn.Linear(1, 1)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=DiLoCo(2))
    for number in range(3):
        step(model, optimizer, rank, number)
    nn.init.constant_(more.weight, float(rank))
    optimizer.add_param_group({"params": list(more.parameters())})
    for number in range(2):
        optimizer.zero_grad()
        x, y = batch(rank, number)
        (more(model(x)) - y).square().mean().backward()
        optimizer.step()
    assert agree(model)
    assert agree(more)


def test_tied_weights_count_once(rank: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    model[1].weight = model[0].weight
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(2))
    for number in range(2):
        step(model, optimizer, rank, number)
    assert set(optimizer.sync.outer_weights()) == {"0.weight", "2.weight", "2.bias"}
    assert agree(model)


def test_running_statistics_become_those_of_all_ranks_samples(rank: int, size: int) -> None:
    """mean(var) + var(mean), and the counter stays."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=None), nn.Linear(3, 1))
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(1))
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(rank)) + rank
    model(x).square().mean().backward()
    optimizer.step()
    everything = torch.cat([torch.randn(64, 3, generator=torch.Generator().manual_seed(r)) + r for r in range(size)])
    within = torch.stack([block.var(0) for block in everything.split(64)]).mean(0)
    between = torch.stack([block.mean(0) for block in everything.split(64)]).var(0, unbiased=False)
    torch.testing.assert_close(model[0].running_mean, everything.mean(0))
    torch.testing.assert_close(model[0].running_var, within + between)
    assert model[0].num_batches_tracked == 1


@pytest.mark.parametrize("state", ["keep", "average", "reset"])
def test_moments_after_a_round(rank: int, size: int, state: Any) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.Adam(model.parameters()), model=model, sync=LocalSGD(2, state=state)
    )
    for number in range(2):
        step(model, optimizer, rank, number)
    held = optimizer.state.get(model[0].weight)
    if state == "reset":
        assert not held
        step(model, optimizer, rank, 2)
        assert optimizer.state[model[0].weight]["step"] == 1
        return
    assert held["step"] == 2
    for key in ("exp_avg", "exp_avg_sq"):
        theirs = hvd.allgather(held[key][None])
        same = bool((theirs == theirs[0]).all())
        assert same == (state == "average" or size == 1), key


def test_gradients_accumulated_over_passes_are_each_ranks_own(rank: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, backward_passes_per_step=2, sync=LocalSGD(2)
    )
    for number in range(4):
        x, y = batch(rank, number)
        (model(x) - y).square().mean().backward()
        if number % 2:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
    assert optimizer.sync.metrics()["steps"] == 2
    assert agree(model)


def test_sparse_embeddings_and_several_optimizers(rank: int) -> None:
    words, head = nn.Embedding(10, 3, sparse=True), nn.Linear(3, 1)
    first = hvd.DistributedOptimizer(
        torch.optim.SparseAdam(words.parameters(), lr=0.1), model=words, sync=LocalSGD(2, warmup=1)
    )
    second = hvd.DistributedOptimizer(torch.optim.SGD(head.parameters(), lr=0.1), model=head, sync=DiLoCo(3))
    for number in range(6):
        first.zero_grad()
        second.zero_grad()
        ids = torch.randint(10, (4,), generator=torch.Generator().manual_seed(rank + 7 * number))
        head(words(ids)).square().mean().backward()
        first.step()
        second.step()
    first.sync.flush()
    second.sync.flush()
    assert agree(words)
    assert agree(head)
    assert first.sync.metrics()["rounds"] == 3
    assert second.sync.metrics()["rounds"] == 2


def test_ranks_that_run_out_of_data_flush_and_are_waited_for(rank: int, size: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(3))
    for number in range(4 + 3 * rank):
        step(model, optimizer, rank, number)
    optimizer.sync.flush()
    assert agree(model)
    assert optimizer.sync.metrics()["steps"] == 4 + 3 * (size - 1)


@pytest.mark.parametrize("kind", ["AdamW", "Adagrad"])  # the second has state from the start
def test_after_nan_an_optimizer_goes_on_as_one_just_made(rank: int, size: int, kind: str) -> None:
    def made(model: nn.Module) -> Any:
        return getattr(torch.optim, kind)(model.parameters(), lr=0.01)

    model = network()
    optimizer = hvd.DistributedOptimizer(made(model), model=model, sync=LocalSGD(3))
    ill = rank == size - 1 and size > 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(3):
            step(model, optimizer, rank, number)
            if ill and number == 0:
                nn.init.constant_(model[0].bias, float("nan"))  # reaches all gradients, and so all moments
    told = [str(w.message) for w in caught if "not finite" in str(w.message)]
    assert [text.startswith(f"Rank {rank} ") for text in told] == [True] * ill
    twin = copy.deepcopy(nn.Sequential(*model))
    plain = made(twin)
    for number in range(3, 5):
        step(model, optimizer, rank, number)
        step(twin, plain, rank, number)
    if ill:
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))
    step(model, optimizer, rank, 5)
    assert agree(model)
    assert all(value.isfinite().all() for state in optimizer.state.values() for value in state.values())


def test_a_state_from_inside_the_warmup_brings_averaging_back(rank: int) -> None:
    model = network()
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(100, warmup=3)
    )
    step(model, optimizer, rank, 0)
    state, weights = optimizer.sync.state_dict(), copy.deepcopy(model.state_dict())
    ends = []
    for _ in range(2):
        for number in range(1, 3):
            step(model, optimizer, rank, number)
        assert agree(model)
        ends.append(everyones(model))
        for number in range(3, 5):  # past the warm-up, each alone
            step(model, optimizer, rank, number)
        model.load_state_dict(weights)
        optimizer.sync.load_state_dict(state)
    assert torch.equal(*ends)


def test_a_compiled_model_trains_with_rounds(rank: int) -> None:
    model = network()
    compiled = torch.compile(model, backend="eager")
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(2))
    for number in range(2):
        step(compiled, optimizer, rank, number)
    assert agree(model)


def test_horovods_own_optimizer_is_refused() -> None:
    model = network()
    stock = horovod.torch.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), named_parameters=model.named_parameters()
    )
    with pytest.raises(hvd.PlanError, match="is Horovod's DistributedOptimizer"):
        hvd.DistributedOptimizer(stock, model=model, sync=LocalSGD(2))


def test_compression_belongs_to_the_plan() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(hvd.PlanError, match='wire="fp16"'):
        hvd.DistributedOptimizer(optimizer, model=model, compression=hvd.Compression.fp16, sync=LocalSGD(2))


def test_a_state_of_rounds_does_not_go_into_an_optimizer_without() -> None:
    model = network()
    local = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, sync=LocalSGD(2))
    steady = hvd.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    steady.sync.flush()
    assert steady.sync.metrics() == {}
    with pytest.raises(hvd.StateError, match="keeps nothing between steps"):
        steady.sync.load_state_dict(local.sync.state_dict())
