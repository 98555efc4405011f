"""Stages of a pipeline whose layers are split over tensor ranks train as the model does in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvdscale.torch as hvd
from hvdscale.model.batch import cut
from hvdscale.torch.randomness import apart, reseed
from tests.contract.test_torch_features import VOCABULARY, WIDTH, Block, Separate, batch, encoder, loss_of
from tests.contract.torch_pipelines import flat

SEED = 7


class Embed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(6, WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.tokens(tokens) + self.places.weight


def of_blocks(*blocks: nn.Module, tied: bool = False) -> nn.Sequential:
    model = nn.Sequential(Embed(), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=not tied))
    if tied:
        model[-1].weight = model[0].tokens.weight
    return model


def cut_inside() -> nn.Sequential:
    """An MLP taken apart: what a column gives, a part, goes to the row on the next stage."""
    middle = nn.Sequential(nn.Linear(WIDTH, 22), nn.GELU(), nn.Dropout(0.3), nn.Linear(22, WIDTH), nn.BatchNorm1d(6))
    return nn.Sequential(Embed(), *middle, nn.Linear(WIDTH, VOCABULARY))


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "written out": lambda: of_blocks(Block(0.2), Block()),
    "tied": lambda: of_blocks(Block(), Separate(), tied=True),
    "encoder": lambda: of_blocks(encoder(0.2), encoder(0.0, first=True)),
    "cut inside": cut_inside,
}
CUT_INSIDE = {"0.tokens": "vocab", "1": "column", "4": "row", "6": "column"}
VOCAB = {"*.qkv": "heads", "*.out": "row", "*.mlp.0": "column", "*.mlp.3": "row", "0.tokens": "vocab", "4": "vocab"}


def fresh(name: str) -> nn.Sequential:
    torch.manual_seed(3)
    return MODELS[name]()


def alone(whole: nn.Sequential, x: Tensor, y: Tensor, microbatches: int, step: int = 0, dp: int = 0) -> float:
    """As a pipeline draws: the loss of one process, gradients added to those of ``whole``."""
    total = 0.0
    for m, piece in enumerate(cut(len(x), microbatches)):
        value = x[piece]
        with apart():
            for number, layer in enumerate(flat(whole)):
                reseed(SEED, dp, step, m, number)
                value = layer(value)
        loss = loss_of(value, y[piece]) * (len(x[piece]) / len(x))
        loss.backward()
        total += loss.item()
    return total


def meshes(size: int) -> list[hvd.Mesh]:
    return [hvd.Mesh(pp=2, tp=2)] if size == 4 else [hvd.Mesh(tp=size), hvd.Mesh(pp=size)]


def shard(whole: Any, mesh: hvd.Mesh, **more: Any) -> Any:
    return hvd.shard_model(whole, mesh, **{"loss": loss_of, "seed": SEED, "microbatches": 2, **more})


@pytest.mark.parametrize("schedule", ["1f1b", "zb", "gpipe, again"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_gradients_and_training_are_those_of_one_process(size: int, rank: int, name: str, schedule: str) -> None:
    rules = CUT_INSIDE if name == "cut inside" else "auto"
    for mesh in meshes(size):
        torch.manual_seed(4 + rank)  # weights are those of a stage's first rank
        given = fresh(name) if mesh.coordinates(rank).tp == 0 else MODELS[name]()
        more = {"rules": rules} if mesh.tp > 1 else {}
        sharded = shard(given, mesh, schedule=schedule.split(",")[0], recompute="again" in schedule, **more)
        whole = fresh(name)
        assert all(torch.equal(t, whole.state_dict()[n]) for n, t in sharded.state_dict().items())
        held, every = sum(p.numel() for p in sharded.parameters()), sum(p.numel() for p in whole.parameters())
        assert held < every or mesh.size == 1
        optimizer = hvd.DistributedOptimizer(torch.optim.AdamW(sharded.parameters(), 1e-2, eps=1e-3), model=sharded)
        plain = torch.optim.AdamW(whole.parameters(), 1e-2, eps=1e-3)
        for step in range(3):
            x, y = batch(step, 5)
            optimizer.zero_grad()
            plain.zero_grad()
            expected = alone(whole, x, y, 2, step)
            assert sharded.train_step(x, y).item() == pytest.approx(expected, abs=1e-5)
            gradients = {n: sharded.join(n, dict(own(sharded)).get(n)) for n in sharded.layout.names}
            for parameter, value in whole.named_parameters():
                torch.testing.assert_close(gradients[parameter], value.grad, atol=1e-5, rtol=1e-4, msg=parameter)
            norm = hvd.clip_grad_norm_(sharded, 0.3)
            assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(whole.parameters(), 0.3).item(), rel=1e-4)
            optimizer.step()
            plain.step()
        for key, value in whole.state_dict().items():
            torch.testing.assert_close(sharded.state_dict()[key], value, atol=1e-4, rtol=1e-3, msg=key)
        moments = sharded.optimizer_state_dict(optimizer)
        for number, state in plain.state_dict()["state"].items():
            torch.testing.assert_close(moments["state"][number]["exp_avg"], state["exp_avg"], atol=1e-4, rtol=1e-3)
        resumed = torch.optim.AdamW(sharded.parameters(), 1e-2, eps=1e-3)
        sharded.load_optimizer_state_dict(resumed, copy.deepcopy(moments))
        again = sharded.optimizer_state_dict(resumed)
        assert all(torch.equal(again["state"][n]["exp_avg"], s["exp_avg"]) for n, s in moments["state"].items())


def test_copies_of_split_stages_train_on_their_own_data(size: int, rank: int) -> None:
    """dp x pp x tp = 2 x 2 x 2: weights are those of one process with the batches of both copies."""
    if size < 8:
        return
    mesh = hvd.Mesh(dp=2, pp=2, tp=2)
    dp = mesh.coordinates(rank).dp
    sharded, whole = shard(fresh("tied"), mesh), fresh("tied")
    optimizer = hvd.DistributedOptimizer(torch.optim.AdamW(sharded.parameters(), 1e-2, eps=1e-3), model=sharded)
    plain = torch.optim.AdamW(whole.parameters(), 1e-2, eps=1e-3)
    for step in range(3):
        batches = [batch(2 * step + copy, 5) for copy in range(2)]
        optimizer.zero_grad()
        plain.zero_grad()
        expected = [alone(whole, x, y, 2, step, copy) for copy, (x, y) in enumerate(batches)]
        for parameter in whole.parameters():
            assert parameter.grad is not None
            parameter.grad /= 2
        assert sharded.train_step(*batches[dp]).item() == pytest.approx(expected[dp], abs=1e-5)
        optimizer.synchronize()
        norm = hvd.clip_grad_norm_(sharded, 0.3)
        assert norm.item() == pytest.approx(nn.utils.clip_grad_norm_(whole.parameters(), 0.3).item(), rel=1e-4)
        with optimizer.skip_synchronize():
            optimizer.step()
        plain.step()
    for key, value in whole.state_dict().items():
        torch.testing.assert_close(sharded.state_dict()[key], value, atol=1e-4, rtol=1e-3, msg=key)


def own(sharded: Any) -> list[tuple[str, Tensor]]:
    """Gradients by name: of the state's names, those of parameters; buffers are as they are."""
    found = dict(sharded.local_state_dict())
    return [(n, t if t.grad is None else t.grad) for n, t in found.items()]


def test_logits_may_stay_apart_and_layers_may_be_made_here(size: int) -> None:
    """A head by vocabulary with parallel_cross_entropy, and layers that no rank builds whole."""
    mesh = meshes(size)[0]
    layers: list[Any] = [hvd.Lazy(Embed), hvd.Lazy(Block), hvd.Lazy(Block), hvd.Lazy(nn.LayerNorm, WIDTH)]
    layers.append(hvd.Lazy(nn.Linear, WIDTH, VOCABULARY))

    def parallel(logits: Tensor, targets: Tensor) -> Tensor:
        return hvd.parallel_cross_entropy(logits, targets, VOCABULARY, mesh)

    sharded = shard(layers, mesh, loss=parallel, **({"rules": VOCAB} if mesh.tp > 1 else {}))
    whole = of_blocks(Block(), Block())
    whole.load_state_dict(sharded.state_dict())
    x, y = batch(0)
    assert sharded.train_step(x, y).item() == pytest.approx(alone(whole, x, y, 2), abs=1e-5)
    gradients = {n: sharded.join(n, dict(own(sharded)).get(n)) for n in sharded.layout.names}
    for parameter, value in whole.named_parameters():
        torch.testing.assert_close(gradients[parameter], value.grad, atol=1e-5, rtol=1e-4, msg=parameter)
    assert sharded.eval_step(x, y).item() == pytest.approx(F.cross_entropy(whole(x).flatten(0, 1), y.flatten()).item())
    assert ("with tp=" in sharded.describe()) == (mesh.tp > 1)
    assert len(sharded.measured().events) == mesh.pp


def test_what_cannot_be_is_refused_on_every_rank(rank: int, size: int) -> None:
    if size < 2:
        return
    mesh = meshes(size)[0]
    for arguments, rule in (
        ({"by": "graph"}, "stages are of whole layers"),
        ({"rules": {"nothing": "column"}}, "'nothing' matches no layer"),
        ({"rules": {"4": "vocab"}, "microbatches": 0}, "micro-batches"),
    ):
        with pytest.raises(hvd.PlanError, match=rule):
            shard(fresh("written out"), mesh, **arguments)
    sharded = shard(fresh("written out"), mesh)
    x, y = batch(rank)
    with pytest.raises(hvd.DesyncError, match="the values of x"):
        sharded.train_step(x, batch(0)[1])
    with pytest.raises(hvd.DesyncError, match="the values of y"):
        sharded.train_step(batch(0)[0], y)
    with pytest.raises(hvd.PlanError, match="was given none"):
        sharded.train_step(None if rank == 1 else batch(0)[0], batch(0)[1])
    assert sharded.train_step(*batch(1)) > 0
