"""A model cut into stages trains as it does in one process: loss, every gradient, buffers and weights."""

from __future__ import annotations

import gc
import weakref
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hvdscale.torch as hvd
from hvdscale.torch.deferred import WeightsLater
from tests.contract.sharding import ALONG_DATA
from tests.contract.torch_pipelines import MODELS, SAMPLES, SEED, alone, fresh, plain, tokens, vectors

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb")


def shard(name: str, size: int, whole: nn.Module | None = None, **more: Any) -> Any:
    model = MODELS[name]
    arguments = {"loss": model.loss, "seed": SEED, "by": model.by, **more}
    return hvd.shard_model(fresh(name) if whole is None else whole, hvd.Mesh(pp=size), **arguments)


def check_gradients(sharded: Any, whole: nn.Module, close: float = 1e-6) -> None:
    expected = {name: p.grad for name, p in whole.named_parameters(remove_duplicate=False)}
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(
            parameter.grad, expected[name], atol=close, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def check_state(sharded: Any, whole: nn.Module, close: float = 1e-6) -> None:
    state = sharded.state_dict()
    assert list(state) == list(whole.state_dict())
    for key, tensor in whole.state_dict().items():
        torch.testing.assert_close(state[key], tensor, atol=close, rtol=10 * close, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("microbatches", [1, 2, 4, 7])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_are_those_of_one_process(size: int, name: str, schedule: str, microbatches: int) -> None:
    model = MODELS[name]
    chunks = 2 if schedule == "interleaved" and size == 2 else 1
    sharded = shard(name, size, microbatches=microbatches, schedule=schedule, chunks=chunks)
    whole = fresh(name)
    x, y = model.data(6)
    for step in range(2):  # the second one knows all shapes, and adds to the gradients of the first
        loss, _ = alone(model, whole, x, y, microbatches, step)
        assert sharded.train_step(x, y).item() == pytest.approx(loss, abs=1e-6)
        check_gradients(sharded, whole)
    check_state(sharded, whole)


@pytest.mark.parametrize("name", ["drawn", "skips", "tied"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_recomputation_changes_nothing(size: int, name: str, schedule: str) -> None:
    """Nor dropout's masks, nor running statistics, which must not count a micro-batch twice."""
    model = MODELS[name]
    again = shard(name, size, microbatches=4, schedule=schedule, recompute=True)
    whole = fresh(name)
    x, y = model.data(6)
    for step in range(2):
        loss, _ = alone(model, whole, x, y, 4, step)
        assert again.train_step(x, y).item() == pytest.approx(loss, abs=1e-6)
    check_gradients(again, whole)
    check_state(again, whole)


def test_one_micro_batch_is_bit_equal(size: int) -> None:
    sharded, whole = shard("plain", size), fresh("plain")
    x, y = vectors(6)
    loss = nn.functional.mse_loss(whole(x), y)
    loss.backward()
    assert sharded.train_step(x, y).item() == loss.item()
    for name, parameter in sharded.named_parameters():
        assert torch.equal(parameter.grad, whole.get_parameter(name).grad), name


@pytest.mark.parametrize("name", ["drawn", "tied"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_a_hundred_steps_of_training_track_one_process(size: int, name: str, schedule: str) -> None:
    model = MODELS[name]
    sharded, whole = shard(name, size, microbatches=4, schedule=schedule), fresh(name)
    optimizers = [
        torch.optim.SGD(parameters, 0.05, momentum=0.9) for parameters in (sharded.parameters(), whole.parameters())
    ]
    x, y = model.data(6)
    for step in range(100):
        for optimizer in optimizers:
            optimizer.zero_grad()
        rows = slice(0, SAMPLES - step % 3)  # batches of unequal size
        loss, _ = alone(model, whole, x[rows], y[rows], 4, step)
        assert sharded.train_step(x[rows], y[rows]).item() == pytest.approx(loss, abs=2e-4), step
        for optimizer in optimizers:
            optimizer.step()
    check_state(sharded, whole, 2e-3)


def test_evaluation_takes_another_batch_size_and_leaves_the_mode(size: int) -> None:
    sharded, whole = shard("drawn", size, microbatches=4), fresh("drawn").eval()
    x, y = vectors(6)
    for rows in (SAMPLES, 5, 1):
        expected = nn.functional.mse_loss(whole(x[:rows]), y[:rows]).item()
        assert sharded.eval_step(x[:rows], y[:rows]).item() == pytest.approx(expected, abs=1e-6)
    assert all(module.training for module in sharded.module.modules())
    assert all(parameter.grad is None for parameter in sharded.parameters())
    check_state(sharded, whole, 0)


def test_sequences_may_change_their_length(size: int) -> None:
    model = MODELS["tied"]
    sharded, whole = shard("tied", size, microbatches=3), fresh("tied")
    x, y = tokens(6)
    for step, length in enumerate((5, 2, 5, 3, 2)):
        loss, _ = alone(model, whole, x[:, :length], y[:, :length], 3, step)
        assert sharded.train_step(x[:, :length], y[:, :length]).item() == pytest.approx(loss, abs=1e-6)
    check_gradients(sharded, whole, 1e-5)


def test_only_the_ends_need_the_batch(rank: int, size: int) -> None:
    sharded, whole = shard("plain", size, microbatches=4), fresh("plain")
    x, y = vectors(6)
    loss, _ = alone(MODELS["plain"], whole, x, y, 4)
    mine = {"x": x if rank == 0 else None, "y": y if rank == size - 1 else None}
    assert sharded.train_step(**mine).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_travels_as_it_is(size: int, dtype: torch.dtype) -> None:
    sharded, whole = shard("plain", size, fresh("plain").to(dtype), microbatches=2), fresh("plain").to(dtype)
    x, y = (t.to(dtype) for t in vectors(6))
    loss, _ = alone(MODELS["plain"], whole, x, y, 2)
    assert sharded.train_step(x, y, loss_scale=8.0).item() == pytest.approx(loss, abs=1e-2)
    for name, parameter in sharded.named_parameters():
        torch.testing.assert_close(parameter.grad / 8, whole.get_parameter(name).grad, atol=1e-2, rtol=2e-2)


def test_a_mean_over_fewer_terms_is_told_by_count(size: int) -> None:
    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)

    x, y = tokens(6)
    y = y * (torch.arange(SAMPLES)[:, None] > 4)  # whole micro-batches without a term
    whole = fresh("tied")
    expected = loss(whole(x), y)
    expected.backward()
    sharded = shard("tied", size, microbatches=7, loss=loss, count=lambda targets: (targets != 0).sum())
    assert sharded.train_step(x, y).item() == pytest.approx(expected.item(), abs=1e-6)
    check_gradients(sharded, whole)
    wrong = shard("tied", size, microbatches=2, loss=loss)
    with pytest.raises(hvd.PlanError, match="count=lambda y"):
        wrong.train_step(x[3:], y[3:])


def test_stages_hold_their_share_and_say_so(rank: int, size: int) -> None:
    sharded = shard("plain", size, microbatches=4, sample=vectors(6)[0])
    held = sum(p.numel() for p in sharded.parameters())
    text = sharded.describe()
    assert f"{held:,} of {sum(p.numel() for p in plain().parameters()):,} parameters on rank {rank}" in text
    assert f"micro-batches on {size} ranks: bubble" in text
    everyone = hvd.allgather(torch.tensor([held])).tolist()
    assert sum(everyone) == sum(p.numel() for p in plain().parameters())


def test_a_measured_step_has_every_action_in_order(size: int) -> None:
    sharded = shard("plain", size, microbatches=4)
    with pytest.raises(hvd.PlanError, match="none was taken"):
        sharded.measured()
    sharded.train_step(*vectors(6))
    measured = sharded.measured()
    done = tuple(tuple(event.action for event in row) for row in measured.events)
    assert done == sharded.pipeline.training(4).actions
    assert 0 < sum(measured.busy) <= measured.makespan * size
    assert all(a.end <= b.start for row in measured.events for a, b in pairwise(row))


def test_the_memory_of_other_stages_is_given_up(rank: int, size: int) -> None:
    whole = fresh("plain")
    sharded = shard("plain", size, whole)
    own = {name for name, _ in sharded.named_parameters()}
    assert {name for name, p in whole.named_parameters() if not p.is_meta} == own


class Placed(nn.Module):
    """Reads a weight past the module that it belongs to, as language models read their places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places = nn.Embedding(12, 8), nn.Embedding(5, 8)
        self.blocks = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
        self.head = nn.Linear(8, 12, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.places.weight
        return self.head(torch.tanh(self.blocks(x)) + self.places.weight)


@pytest.mark.parametrize("kind", ["meta", "meta, by graph", "lazy", "lazy and tied"])
def test_a_model_that_no_rank_builds_whole(size: int, kind: str) -> None:
    """Its weights depend neither on the number of stages nor on how they are cut."""

    def build() -> Any:
        if "meta" in kind:
            with torch.device("meta"):
                return plain() if kind == "meta" else Placed()
        return [
            ("embed", hvd.Lazy(nn.Embedding, 12, 8)),
            *((f"blocks.{i}", hvd.Lazy(lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(5)))) for i in range(4)),
            torch.tanh,
            ("head", hvd.Lazy(nn.Linear, 8, 12, bias=False)),
        ]

    name = "plain" if kind == "meta" else "tied"
    more: dict[str, Any] = {"ties": [("embed.weight", "head.weight")]} if kind == "lazy and tied" else {}
    more |= {"by": "graph"} if "graph" in kind else {}
    states = []
    for balance in ("params", None):
        sharded = shard(name, size, build(), microbatches=2, balance=balance, **more)
        states.append(sharded.state_dict())
        value = sharded.train_step(*MODELS[name].data(6))
        assert torch.isfinite(value)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    if "lazy" in kind:
        assert set(states[0]) >= {"embed.weight", "blocks.0.0.weight", "blocks.3.1.running_mean", "head.weight"}
        assert torch.equal(states[0]["embed.weight"], states[0]["head.weight"]) == (kind == "lazy and tied")
        assert not torch.equal(states[0]["blocks.0.0.weight"], states[0]["blocks.1.0.weight"])
    digest = np.array([float(sum(t.double().sum() for t in states[0].values()))])
    assert len(set(hvd.allgather(torch.from_numpy(digest)).tolist())) == 1


@pytest.mark.parametrize("name", ["drawn", "tied", "graph"])
def test_the_whole_state_goes_into_one_process_and_back(size: int, name: str) -> None:
    torch.manual_seed(99)
    sharded = shard(name, size, MODELS[name].make(), microbatches=2)
    state = sharded.state_dict()
    whole = fresh(name)
    whole.load_state_dict(state)
    model = MODELS[name]
    x, y = model.data(6)
    loss, _ = alone(model, whole, x, y, 2)
    other = shard(name, size, microbatches=2, schedule="gpipe")
    other.load_state_dict(whole.state_dict())
    assert other.train_step(x, y).item() == pytest.approx(loss, abs=1e-6)


def test_copies_of_a_pipeline_train_on_their_own_data(rank: int, size: int) -> None:
    """dp = 2: gradients and clipping are those of one process with both batches."""
    if size % 2:
        return
    mesh = hvd.Mesh(dp=2, pp=size // 2)
    model = MODELS["tied"]
    sharded = hvd.shard_model(fresh("tied"), mesh, loss=model.loss, microbatches=2, seed=SEED)
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(sharded.parameters(), 0.1), model=sharded)
    whole = fresh("tied")
    plain_optimizer = torch.optim.SGD(whole.parameters(), 0.1)
    x, y = tokens(6)
    mine = slice(0, 8) if mesh.coordinates(rank).dp == 0 else slice(6, SAMPLES)
    for _ in range(3):
        optimizer.zero_grad()
        plain_optimizer.zero_grad()
        sharded.train_step(x[mine], y[mine])
        optimizer.synchronize()
        for rows in (slice(0, 8), slice(6, SAMPLES)):
            (model.loss(whole(x[rows]), y[rows]) / 2).backward()
        norm = hvd.clip_grad_norm_(sharded, 0.1)
        expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.1)
        assert norm.item() == pytest.approx(expected.item(), rel=1e-4)
        with optimizer.skip_synchronize():
            optimizer.step()
        plain_optimizer.step()
    check_state(sharded, whole, 1e-5)


PLANS = {**ALONG_DATA, "server": hvd.ParameterServer(0, every=2)}


@pytest.mark.parametrize("plan", PLANS)
def test_copies_of_a_pipeline_meet_in_rounds(rank: int, size: int, plan: str) -> None:
    """dp = 2: each copy trains on its own data, and each stage meets its twin; a shared weight stays one."""
    if size % 2:
        return
    mesh = hvd.Mesh(dp=2, pp=size // 2)
    model = MODELS["tied"]
    sharded = hvd.shard_model(fresh("tied"), mesh, loss=model.loss, microbatches=2, seed=SEED)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(sharded.parameters(), 0.1, momentum=0.5), model=sharded, sync=PLANS[plan]
    )
    wholes = [fresh("tied") for _ in range(2)]
    plain_optimizers = [torch.optim.SGD(whole.parameters(), 0.1, momentum=0.5) for whole in wholes]
    x, y = tokens(6)
    rows = (slice(0, 8), slice(6, SAMPLES))
    dp = mesh.coordinates(rank).dp
    for step in range(1, 5):
        optimizer.zero_grad()
        sharded.train_step(x[rows[dp]], y[rows[dp]])
        optimizer.step()
        for whole, plain_optimizer, mine in zip(wholes, plain_optimizers, rows, strict=True):
            plain_optimizer.zero_grad()
            model.loss(whole(x[mine]), y[mine]).backward()
        if plan == "warm-up, overlap" and step <= 2:
            for one, other in zip(wholes[0].parameters(), wholes[1].parameters(), strict=True):
                one.grad = other.grad = (one.grad + other.grad) / 2
        for plain_optimizer in plain_optimizers:
            plain_optimizer.step()
        if plan != "warm-up, overlap" and step % 2 == 0:
            average(wholes)
    if plan == "warm-up, overlap":
        optimizer.sync.flush()
        average(wholes)
    check_state(sharded, wholes[0], 1e-5)
    optimizer.sync.flush()
    assert optimizer.sync.metrics()["rounds"] >= 2
    assert set(optimizer.sync.outer_weights()) == {name for name, _ in sharded.named_parameters()}


@torch.no_grad()
def average(models: list[nn.Module]) -> None:
    for parameters in zip(*(model.parameters() for model in models), strict=True):
        mean = sum(parameters) / len(models)
        for parameter in parameters:
            parameter.copy_(mean)


def test_what_a_split_backward_pass_kept_is_let_go() -> None:
    """At once, without a search for cycles: activations would pile up."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Conv1d(4, 2, 1))
    gc.disable()
    try:
        later = WeightsLater()
        with later:
            hidden = layers[1](layers[0](torch.ones(5, 3)))
            loss = layers[2](hidden.t()[None]).sum()
        loss.backward()
        later.run()
        alive = weakref.ref(hidden)
        del hidden, loss
        assert alive() is None
    finally:
        gc.enable()


def test_the_random_state_of_the_script_is_left_alone(size: int) -> None:
    before = torch.get_rng_state()
    sharded = shard("drawn", size, fresh("drawn"), microbatches=2)
    after_building = torch.get_rng_state()
    sharded.train_step(*vectors(6))
    assert torch.equal(after_building, torch.get_rng_state())
    torch.set_rng_state(before)


class Dynamic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class HoldsDynamic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), Dynamic(), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def test_what_cannot_be_captured_stays_in_one_piece(size: int) -> None:
    torch.manual_seed(5)
    whole = HoldsDynamic()
    sharded = hvd.shard_model(whole, hvd.Mesh(pp=size), by="graph", loss=nn.functional.mse_loss)
    assert "in one piece, since it cannot be traced: layers.1" in sharded.describe()
    torch.manual_seed(5)
    expected = nn.functional.mse_loss(HoldsDynamic()(vectors(6)[0]), vectors(6)[1])
    assert sharded.train_step(*vectors(6)).item() == pytest.approx(expected.item(), abs=1e-6)


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "more stages than layers": (
        lambda: nn.Sequential(nn.Linear(6, 3)),
        {"chunks": 3, "schedule": "gpipe"},
        "needs a layer; the model has 1",
    ),
    "a mesh of another size": (plain, {"mesh": hvd.Mesh(pp=7)}, "1 \\* 7 \\* 1 = 7"),
    "a loss that is no mean": (plain, {"loss": nn.MSELoss(reduction="sum")}, "its reduction is 'sum'"),
    "no loss": (plain, {"loss": None}, "give loss="),
    "not layers": (HoldsDynamic, {}, "List its layers"),
    "data-dependent control flow": (Dynamic, {"by": "graph"}, "Dynamic.forward cannot be captured at .*line"),
    "an unknown schedule": (plain, {"schedule": "2f2b"}, "'2f2b' is none"),
    "no micro-batch": (plain, {"microbatches": 0}, "micro-batches"),
    "time without a sample": (plain, {"balance": "time"}, "give sample="),
    "no such tie": (plain, {"ties": [("0.weight", "nothing")]}, "'nothing' is none"),
    "a skip never pushed": (
        lambda: nn.Sequential(nn.Linear(6, 8), hvd.Skip().pop(), nn.Linear(8, 3)),
        {},
        "that no layer pushed",
    ),
    "no memory": (plain, {"memory_cap": 10.0}, "more than 10 bytes"),
    "rules": (plain, {"rules": {"x": "column"}}, "Leave them out"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_on_every_rank(size: int, what: str) -> None:
    make, more, rule = REFUSED[what]
    arguments = {"mesh": hvd.Mesh(pp=size), "loss": nn.functional.mse_loss, **more}
    with pytest.raises(hvd.PlanError, match=rule):
        hvd.shard_model(make(), **arguments)


def test_ranks_with_different_models_are_told(rank: int, size: int) -> None:
    if size == 1:
        return
    with pytest.raises(hvd.DesyncError, match=r"the model to be sharded: rank \d differs from rank 0"):
        hvd.shard_model(plain(7 if rank == size - 1 else 6), hvd.Mesh(pp=size), loss=nn.functional.mse_loss)


def test_a_wrong_batch_is_refused_on_every_rank_and_training_goes_on(rank: int, size: int) -> None:
    sharded = shard("plain", size, microbatches=2)
    x, y = vectors(6)
    with pytest.raises(hvd.PlanError, match="x and y have as many samples; they have 14 and 13"):
        sharded.train_step(x, y[:-1])
    with pytest.raises(hvd.PlanError, match="last stage reads the target"):
        sharded.train_step(x, None)
    with pytest.raises(hvd.PlanError, match="at least one sample"):
        sharded.train_step(x[:0], y[:0])
    if size > 1:
        with pytest.raises(hvd.DesyncError, match="same batch"):
            sharded.train_step(x[: 10 + rank], y[: 10 + rank])
    wrong = shard("plain", size, microbatches=2, loss=lambda out, target: (out - target).square().sum())
    with pytest.raises(hvd.PlanError, match="for the same samples twice"):
        wrong.train_step(x, y)
    assert all(parameter.grad is None for parameter in wrong.parameters())
    loss, _ = alone(MODELS["plain"], fresh("plain"), x, y, 2)
    assert sharded.train_step(x, y).item() == pytest.approx(loss, abs=1e-6)
