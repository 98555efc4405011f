"""Sharding by features in torch: the loss, every gradient and a run of steps are those of one process."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hvdscale.torch as hvd
from tests.contract.sharding import meshes

VOCABULARY, CONTEXT, WIDTH, HEADS = 29, 6, 12, 4


class Block(nn.Module):
    """Attention written out, as in the examples."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.heads = HEADS
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 22), nn.GELU(), nn.Dropout(drop), nn.Linear(22, WIDTH))
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm_1(x)).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(y.transpose(1, 2).flatten(-2)))
        return x + self.mlp(self.norm_2(x))


class Separate(nn.Module):
    """Queries, keys and values apart, and a gated MLP by its usual names."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = HEADS
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.mlp = nn.Module()
        self.mlp.gate_proj, self.mlp.up_proj = nn.Linear(WIDTH, 18), nn.Linear(WIDTH, 18)
        self.mlp.down_proj = nn.Linear(18, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            p(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.o_proj(y.transpose(1, 2).flatten(-2))
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(x)) * self.mlp.up_proj(x))


class Model(nn.Module):
    def __init__(self, *blocks: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks, self.norm = nn.ModuleList(blocks), nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=not tied)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def encoder(drop: float, first: bool = False) -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 23, drop, norm_first=first, batch_first=True, activation="gelu")


def loss_of(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def batch(seed: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    draw = np.random.default_rng(seed)
    tokens = torch.from_numpy(draw.integers(0, VOCABULARY, (rows, CONTEXT + 1)))
    return tokens[:, :-1], tokens[:, 1:]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "written out": lambda: Model(Block(), Block()),
    "dropout": lambda: Model(Block(0.3), Block(0.3)),
    "tied": lambda: Model(Block(), tied=True),
    "separate": lambda: Model(Separate()),
    "encoder": lambda: Model(encoder(0.0), encoder(0.0, first=True)),
    "encoder, dropout": lambda: Model(encoder(0.2), encoder(0.2, first=True)),
}


def make(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    return MODELS[name]().to(dtype)


def share(mesh: hvd.Mesh, seed: int) -> tuple[Tensor, Tensor]:
    """This rank's rows of a batch that the data ranks share."""
    x, y = batch(seed, 4 * mesh.dp)
    rows = slice(4 * (place := mesh.coordinates(hvd.rank()).dp), 4 * place + 4)
    return x[rows], y[rows]


def whole_gradients(sharded: hvd.ShardedModel) -> dict[str, Tensor]:
    """The gradients of all ranks, as the whole model's, by way of the weights' own road."""
    kept = {name: p.detach().clone() for name, p in sharded.named_parameters()}
    with torch.no_grad():
        for p in sharded.parameters():
            p.copy_(torch.zeros_like(p) if p.grad is None else p.grad)
        found = sharded.state_dict()
        for name, p in sharded.named_parameters():
            p.copy_(kept[name])
    return found


@pytest.mark.parametrize("mesh", meshes("dp", "tp", split=True), ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_every_gradient_are_those_of_one_process(driver: Any, name: str, mesh: hvd.Mesh) -> None:
    alone, sharded = make(name), hvd.shard_model(make(name), mesh, by="features", loss=loss_of)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(sharded.parameters(), 0.1), model=sharded)
    x, y = batch(5, 4 * mesh.dp)
    rows = x.chunk(mesh.dp), y.chunk(mesh.dp)
    losses = []
    for part_x, part_y in zip(*rows, strict=True):
        torch.manual_seed(11)  # as every data rank does
        loss = loss_of(alone(part_x), part_y)
        (loss / mesh.dp).backward()
        losses.append(loss.item())
    torch.manual_seed(11)
    found = sharded.train_step(*share(mesh, 5))
    assert found.item() == pytest.approx(losses[mesh.coordinates(hvd.rank()).dp], abs=1e-6)
    gradients = whole_gradients(sharded)
    opt.synchronize()
    for parameter, value in alone.named_parameters():
        np.testing.assert_allclose(gradients[parameter], value.grad, atol=1e-6, rtol=1e-5, err_msg=parameter)
    # clipping: as one process does it
    wanted = nn.utils.clip_grad_norm_(alone.parameters(), 0.05)
    assert float(hvd.clip_grad_norm_(sharded, 0.05)) == pytest.approx(float(wanted), rel=1e-5)
    clipped = whole_gradients(sharded)
    for parameter, value in alone.named_parameters():
        np.testing.assert_allclose(clipped[parameter], value.grad, atol=1e-6, err_msg=parameter)
    alone.eval()
    assert sharded.eval_step(x, y).item() == pytest.approx(loss_of(alone(x), y).item(), abs=1e-6)


def test_no_rank_holds_more_than_its_share(driver: Any, size: int) -> None:
    sharded = hvd.shard_model(make("written out"), hvd.Mesh(tp=size), by="features")
    whole, held = sharded.count()
    whole_bytes = sum(p.numel() for p in make("written out").parameters())
    assert whole == whole_bytes
    replicated = sum(p.numel() for n, p in sharded.named_parameters() if sharded.layout[n].split is None)
    assert held <= math.ceil((whole - replicated) / size * 1.25) + replicated  # 29 and 22 do not divide evenly
    assert "blocks.0.qkv" in sharded.describe()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_whole_state_moves_to_any_mesh_to_the_bit(driver: Any, dtype: torch.dtype) -> None:
    for name in ("tied", "encoder"):
        plain = make(name, dtype)
        whole = {n: t.clone() for n, t in plain.state_dict().items()}
        state = whole
        for mesh in meshes("dp", "tp"):
            other = make(name, dtype)
            with torch.no_grad():
                for p in other.parameters():
                    p.add_(1)
            sharded = hvd.shard_model(other, mesh, by="features")
            sharded.load_state_dict(state)
            state = sharded.state_dict()
            assert list(state) == list(whole)
            for n, t in whole.items():
                assert state[n].dtype == dtype
                assert torch.equal(state[n], t), (n, mesh)
            on_root = sharded.state_dict(root=hvd.size() - 1)
            assert list(on_root) == (list(whole) if hvd.rank() == hvd.size() - 1 else [])
        make(name, dtype).load_state_dict(state)  # and into one process
        with pytest.raises(hvd.StateError, match="1 are missing"):
            sharded.load_state_dict({n: t for n, t in state.items() if n != "norm.bias"})
        with pytest.raises(hvd.StateError, match=r"norm\.bias has shape"):
            sharded.load_state_dict({**state, "norm.bias": torch.zeros(3)})


@pytest.mark.parametrize("mesh", meshes("dp", "tp", split=True)[-1:], ids=str)
def test_a_hundred_steps_track_one_process(driver: Any, mesh: hvd.Mesh) -> None:
    alone, sharded = make("tied"), hvd.shard_model(make("tied"), mesh, by="features", loss=loss_of)
    optimizers = [torch.optim.AdamW(m.parameters(), 3e-3, eps=1e-6) for m in (alone, sharded)]
    opt = hvd.DistributedOptimizer(optimizers[1], model=sharded)
    losses = []
    for step in range(100):
        optimizers[0].zero_grad()
        x, y = batch(step, 4 * mesh.dp)
        wanted = loss_of(alone(x), y)
        wanted.backward()
        nn.utils.clip_grad_norm_(alone.parameters(), 1.0)
        optimizers[0].step()
        opt.zero_grad()
        loss = sharded.train_step(*share(mesh, step))
        hvd.clip_grad_norm_(sharded, 1.0)
        opt.step()
        losses.append((loss.item(), wanted.item()))
    found, expected = np.array(losses).T
    everyone = driver.everyones(found).mean(0)  # over tensor ranks, too: theirs are the same
    np.testing.assert_allclose(everyone, expected, rtol=1e-4)
    moments = sharded.optimizer_state_dict(opt)
    for number, held in optimizers[0].state_dict()["state"].items():
        for key, value in held.items():
            np.testing.assert_allclose(moments["state"][number][key], value, atol=1e-4, err_msg=f"{number} {key}")
    twin = hvd.shard_model(make("tied"), hvd.Mesh(tp=hvd.size()), by="features")  # another mesh, and one process
    for resumed in (torch.optim.AdamW(twin.parameters()), torch.optim.AdamW(make("tied").parameters())):
        if resumed.param_groups[0]["params"][0].shape[0] < VOCABULARY:
            twin.load_optimizer_state_dict(resumed, moments)
            again = twin.optimizer_state_dict(resumed)
        else:
            resumed.load_state_dict(moments)
            again = resumed.state_dict()
        for number, held in moments["state"].items():
            assert all(torch.equal(again["state"][number][key], value) for key, value in held.items())
    state = sharded.state_dict()
    for name, tensor in alone.state_dict().items():
        np.testing.assert_allclose(state[name], tensor, atol=1e-3, err_msg=name)
    for name, p in sharded.named_parameters():  # copies on the tensor ranks have not drifted apart by a bit
        if sharded.layout[name].split is None:
            copies = hvd.allgather(p.detach().reshape(1, -1), name=name)
            assert (copies == copies[0]).all(), name


@pytest.mark.parametrize("plan", ["LocalSGD(3)", "DiLoCo(3, warmup=2)"])
@pytest.mark.parametrize("mesh", meshes("dp", "tp")[-2:], ids=str)
def test_rounds_meet_along_the_data_axis(driver: Any, mesh: hvd.Mesh, plan: str) -> None:
    sharded = hvd.shard_model(make("written out"), mesh, by="features", loss=loss_of)
    sync = hvd.LocalSGD(3) if plan.startswith("Local") else hvd.DiLoCo(3, warmup=2)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(sharded.parameters(), 0.1), model=sharded, sync=sync)
    plain = [make("written out") for _ in range(mesh.dp)]  # the same, by hand: each copy on its own data
    if plan.startswith("Local"):
        for place, model in enumerate(plain):
            inner = torch.optim.SGD(model.parameters(), 0.1)
            for step in range(3):
                x, y = batch(step, 4 * mesh.dp)
                inner.zero_grad()
                loss_of(model(x[4 * place : 4 * place + 4]), y[4 * place : 4 * place + 4]).backward()
                inner.step()
    for step in range(3):
        opt.zero_grad()
        sharded.train_step(*share(mesh, step))
        opt.step()
    opt.sync.flush()
    state = sharded.state_dict()
    if plan.startswith("Local"):
        for name in state:
            mean = torch.stack([model.state_dict()[name] for model in plain]).mean(0)
            np.testing.assert_allclose(state[name], mean, atol=1e-5, err_msg=name)
    flat = torch.cat([t.flatten() for t in state.values()]).reshape(1, -1)
    everyone = hvd.allgather(flat, name="everyone")
    assert (everyone == everyone[0]).all()


def test_a_scaler_skips_the_same_steps_on_all_ranks(driver: Any, size: int, rank: int) -> None:
    sharded = hvd.shard_model(make("written out"), hvd.Mesh(tp=size), by="features", loss=loss_of)
    opt = hvd.DistributedOptimizer(torch.optim.SGD(sharded.parameters(), 0.1), model=sharded)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for bad in (True, False):
        before = sharded.module.blocks[0].qkv.weight.detach().clone()
        opt.zero_grad()
        scaler.scale(loss_of(sharded(batch(0)[0]), batch(0)[1])).backward()
        if bad and rank == size - 1:
            sharded.module.blocks[0].qkv.weight.grad[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        assert torch.equal(before, sharded.module.blocks[0].qkv.weight) == bad
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_over_a_split_vocabulary(driver: Any, size: int, reduction: str) -> None:
    mesh = hvd.Mesh(tp=size)
    torch.manual_seed(1)
    whole = (10 * torch.randn(3, 5, VOCABULARY)).requires_grad_()
    targets = torch.randint(0, VOCABULARY, (3, 5))
    targets[0, :2] = -100
    wanted = F.cross_entropy(whole.flatten(0, 1), targets.flatten(), reduction=reduction)
    weights = torch.arange(1.0, 1 + wanted.numel()).view(wanted.shape)
    (wanted * weights).sum().backward()
    edges = np.cumsum([0, *(VOCABULARY // size + (r < VOCABULARY % size) for r in range(size))])
    own = slice(edges[hvd.rank()], edges[hvd.rank() + 1])
    part = whole.detach()[..., own].clone().requires_grad_()
    loss = hvd.parallel_cross_entropy(part, targets, VOCABULARY, mesh, reduction=reduction)
    np.testing.assert_allclose(loss.detach().flatten(), wanted.detach().flatten(), rtol=1e-5, atol=1e-6)
    (loss * weights.view(loss.shape)).sum().backward()
    np.testing.assert_allclose(part.grad, whole.grad[..., own], rtol=1e-5, atol=1e-6)
    with pytest.raises(hvd.PlanError, match="logits are this rank's part of 29 classes"):
        hvd.parallel_cross_entropy(part[..., :3], targets, VOCABULARY, mesh)
    with pytest.raises(hvd.PlanError, match="targets are classes 0 to 28; 29"):
        hvd.parallel_cross_entropy(part, torch.full_like(targets, 29), VOCABULARY, mesh)


def test_layers_made_directly(driver: Any, size: int) -> None:
    mesh = hvd.Mesh(tp=size)
    torch.manual_seed(2)
    plain = [nn.Linear(6, 9), nn.Linear(9, 5), nn.Embedding(11, 6, padding_idx=10)]
    torch.manual_seed(2 + hvd.rank())  # only the first rank draws as the plain layers do
    column = hvd.ColumnParallelLinear(6, 9, mesh=mesh, whole_output=False)
    row = hvd.RowParallelLinear(9, 5, mesh=mesh)
    table = hvd.VocabParallelEmbedding(11, 6, padding_idx=10, mesh=mesh)
    ids = torch.tensor([[0, 3, 10], [7, 9, 1]])
    wanted = plain[1](torch.tanh(plain[0](plain[2](ids))))
    found = row(torch.tanh(column(table(ids))))
    np.testing.assert_allclose(found.detach(), wanted.detach(), atol=1e-6)
    whole = hvd.RowParallelLinear(9, 5, mesh=mesh)  # takes whole activations, too
    x = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).requires_grad_()
    whole(x).sum().backward()
    assert x.grad is not None
    np.testing.assert_allclose(x.grad, whole_weight(whole, size).sum(0).expand(2, -1), atol=1e-6)
    if size > 1:
        with pytest.raises(hvd.PlanError, match="takes all 9 features or this rank's"):
            whole(x[:, :1])
        with pytest.raises(IndexError, match=r"ids lie in 0\.\.10; 11"):
            table(torch.tensor([11]))


def whole_weight(row: nn.Module, size: int) -> Tensor:
    parts = hvd.allgather(row.weight.detach().t().contiguous(), name="row")
    return parts.t()


def test_models_nobody_has_whole(driver: Any, size: int) -> None:
    """On the meta device: every module's weights are drawn in turn, as one process draws them."""
    for name in ("tied", "encoder"):
        torch.manual_seed(3)
        plain = MODELS[name]()
        torch.manual_seed(9)
        seen: set[int] = set()
        for module in plain.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            own = {id(p) for p in module.parameters(recurse=False)}
            if own and reset and not own <= seen:
                if isinstance(module, nn.MultiheadAttention):
                    module.out_proj.reset_parameters()
                    seen |= {id(p) for p in module.out_proj.parameters()}
                reset()
            seen |= own
        with torch.device("meta"):
            model = MODELS[name]()
        torch.manual_seed(9)
        sharded = hvd.shard_model(model, hvd.Mesh(tp=size), by="features", loss=loss_of)
        state = sharded.state_dict()
        for n, tensor in plain.state_dict().items():
            assert torch.equal(state[n], tensor), n
        assert sharded.eval_step(*batch(0)).item() == pytest.approx(
            loss_of(plain.eval()(batch(0)[0]), batch(0)[1]).item(), abs=1e-6
        )
    with torch.device("meta"):
        odd = nn.Sequential(nn.Linear(4, 4), Odd())
    with pytest.raises(hvd.PlanError, match=r"1 \(Odd\) has scale on the meta device and no reset_parameters"):
        hvd.shard_model(odd, hvd.Mesh(tp=size), by="features", rules={"0": "column"})


class Scaled(nn.Module):
    """No parameters of its own, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.empty(()))
        self.inner = nn.Sequential(nn.Linear(WIDTH, 22), nn.ReLU(), nn.Linear(22, WIDTH))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.scale.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.inner(x)


def test_ties_and_buffers_nobody_has_whole(driver: Any, size: int) -> None:
    with torch.device("meta"):
        model = Model(Scaled())
        model.head.weight = model.tokens.weight  # and a bias of its own
    rules = {"blocks.0.inner.0": "column", "blocks.0.inner.2": "row", "tokens": "vocab", "head": "column"}
    sharded = hvd.shard_model(model, hvd.Mesh(tp=size), by="features", rules=rules, loss=loss_of)
    assert model.head.weight is model.tokens.weight
    assert model.head.weight.shape[0] == math.ceil((VOCABULARY - hvd.rank()) / size)
    plain = Model(Scaled())
    plain.head.weight = plain.tokens.weight
    plain.load_state_dict(sharded.state_dict())
    assert plain.blocks[0].scale == 0.5
    assert sharded.eval_step(*batch(0)).item() == pytest.approx(loss_of(plain(batch(0)[0]), batch(0)[1]).item())
    frozen = model.norm.eval()
    sharded.eval_step(*batch(0))
    assert model.training
    assert not frozen.training  # each layer is in the mode it was in


class LAMB(torch.optim.SGD):
    """By this name, whatever library it is from."""


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


def test_bfloat16_stays_near(driver: Any, size: int) -> None:
    plain = make("encoder", torch.bfloat16)
    sharded = hvd.shard_model(make("encoder", torch.bfloat16), hvd.Mesh(tp=size), by="features", loss=loss_of)
    x, y = batch(0)
    loss_of(plain(x), y).backward()
    sharded.train_step(x, y)
    gradients = whole_gradients(sharded)
    for name, p in plain.named_parameters():
        assert gradients[name].dtype == torch.bfloat16
        scale = float(p.grad.abs().max())
        np.testing.assert_allclose(gradients[name].float(), p.grad.float(), atol=0.05 * scale + 1e-3, err_msg=name)


def test_auto_knows_the_vocabulary_from_all_else_of_its_size(driver: Any, size: int) -> None:
    model = Model(Block(), Block())
    model.places = nn.Embedding(WIDTH, WIDTH)  # as many places as features; and as many as the vocabulary:
    model.more = nn.Embedding(VOCABULARY, WIDTH)
    layout = hvd.shard_model(model, hvd.Mesh(tp=size), by="features").layout
    split = {name for name in layout.names if layout[name].split is not None}
    assert {"tokens.weight", "head.weight", "blocks.1.out.weight", "blocks.1.mlp.3.weight"} <= split
    assert not split & {"places.weight", "more.weight", "blocks.1.out.bias", "blocks.1.mlp.3.bias"}


class OneMatrix(nn.Module):
    """Queries, keys and values of each head side by side, as in GPT-NeoX."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.num_attention_heads = name, HEADS
        self.add_module(name, nn.Linear(WIDTH, 3 * WIDTH))
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.get_submodule(self.name)(x).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(*heads.chunk(3, dim=-1))
        return x + self.dense(y.transpose(1, 2).flatten(-2))


def test_how_queries_keys_and_values_lie_is_told_by_the_name(driver: Any, size: int) -> None:
    for name, split in (("query_key_value", True), ("mixed", False)):
        torch.manual_seed(3)
        plain = Model(OneMatrix(name))
        sharded = hvd.shard_model(copy.deepcopy(plain), hvd.Mesh(tp=size), by="features")
        assert (sharded.layout[f"blocks.0.{name}.weight"].split is not None) == split
        np.testing.assert_allclose(sharded(batch(0)[0]).detach(), plain(batch(0)[0]).detach(), atol=1e-5)


def test_rules_by_hand_do_what_auto_does(driver: Any, size: int) -> None:
    rules = {
        "blocks.*.qkv": "heads",
        "blocks.*.out": "row",
        "blocks.*.mlp.0": "column",
        "blocks.*.mlp.3": "row",
        "tokens": "vocab",
        "head": "column",
    }
    mesh = hvd.Mesh(tp=size)
    auto = hvd.shard_model(make("written out"), mesh, by="features", rules="auto")
    by_hand = hvd.shard_model(make("written out"), mesh, by="features", rules=rules)
    assert by_hand.layout == auto.layout
    alone = {"blocks.0.mlp.0": "column", "blocks.1.out": "row"}  # halves of pairs: the rest is made whole
    sharded = hvd.shard_model(make("written out"), mesh, by="features", rules=alone)
    plain = make("written out")
    np.testing.assert_allclose(sharded(batch(0)[0]).detach(), plain(batch(0)[0]).detach(), atol=1e-5)
    with_loss = hvd.shard_model(make("written out"), mesh, by="features", rules={**rules, "head": "vocab"})
    x, y = batch(0)
    loss = hvd.parallel_cross_entropy(with_loss(x), y, VOCABULARY, mesh)
    assert loss.item() == pytest.approx(loss_of(plain(x), y).item(), abs=1e-6)


REFUSED = [
    ({"by": "rows"}, "it is 'rows'"),
    ({"mesh": "tp=2"}, "mesh is a Mesh, such as"),
    ({"mesh": hvd.Mesh(tp=64)}, r"dp \* pp \* tp must be the number of ranks: 1 \* 1 \* 64 = 64"),
    (
        {"rules": {"nowhere.*": "column"}},
        r"'nowhere\.\*' matches no layer that can be split\. Those are: tokens, places",
    ),
    ({"rules": {"head": "columns"}}, "rules map patterns .* they hold 'head': 'columns'"),
    ({"rules": {}}, 'rules is "auto", or a dictionary'),
    ({"rules": {"tokens": "row"}}, "tokens is an embedding, which is split by its rows. Say 'vocab'"),
    ({"rules": {"head": "heads"}}, "head is to be split by heads, and its module says nowhere how many"),
    ({"rules": {"blocks.*.qkv": "column", "blocks.*.out": "row"}}, "features of 4 attention heads .Block.heads."),
    ({"model": lambda: nn.Sequential(nn.Conv2d(1, 1, 1))}, 'rules="auto" found no transformer block.*none'),
    ({"model": lambda: "model"}, "model is an nn.Module; it is a str"),
]


@pytest.mark.parametrize(("change", "rule"), REFUSED, ids=[rule[:20] for _, rule in REFUSED])
def test_what_cannot_be_is_refused(driver: Any, size: int, change: dict[str, Any], rule: str) -> None:
    arguments = {"model": lambda: make("written out"), "mesh": hvd.Mesh(tp=size), "by": "features", **change}
    with pytest.raises(hvd.PlanError, match=rule):
        hvd.shard_model(arguments.pop("model")(), **arguments)


def test_more_is_refused_where_there_are_ranks(driver: Any, size: int, rank: int) -> None:
    mesh = hvd.Mesh(tp=size)
    if size == 1:
        return
    with pytest.raises(hvd.PlanError, match=r"0\.weight, shape \[1, 8\]: an axis of 1 cannot be divided over tp="):
        hvd.shard_model(nn.Sequential(nn.Linear(8, 1)), mesh, by="features", rules={"0": "column"})
    with pytest.raises(hvd.PlanError, match=r"Tied parameters are one tensor.*: tokens\.weight Split"):
        hvd.shard_model(make("tied"), mesh, by="features", rules={"tokens": "vocab"})
    with pytest.raises(hvd.PlanError, match='"features" makes no stages, and the mesh has pp='):
        hvd.shard_model(make("tied"), hvd.Mesh(pp=size), by="features")
    with pytest.raises(hvd.DesyncError, match="Ranks disagree about the model to be sharded"):
        hvd.shard_model(nn.Sequential(nn.Linear(4, 8 + rank)), mesh, by="features", rules={"0": "column"})
    sharded = hvd.shard_model(make("written out"), mesh, by="features", loss=loss_of)
    with pytest.raises(hvd.DesyncError, match=r"given another batch: ranks that share a model's features"):
        sharded.train_step(*batch(rank))
    if rank == size - 1:
        torch.rand(1)
    with pytest.raises(hvd.DesyncError, match=rf"\[{size - 1}\] have drawn other random numbers"):
        sharded.train_step(*batch(0))
    torch.manual_seed(0)
    with pytest.raises(hvd.PlanError, match="without a loss"):
        hvd.shard_model(make("written out"), mesh, by="features").train_step(*batch(0))
    with pytest.raises(hvd.PlanError, match="Leave process_set out"):
        hvd.DistributedOptimizer(
            torch.optim.SGD(sharded.parameters(), 0.1), model=sharded, process_set=driver.even_ranks
        )
    with pytest.raises(hvd.PlanError, match="LBFGS looks at all parameters at once"):
        hvd.DistributedOptimizer(torch.optim.LBFGS(sharded.parameters()), model=sharded)
    with pytest.raises(hvd.PlanError, match="LAMB looks at whole parameters"):
        hvd.DistributedOptimizer(LAMB(sharded.parameters()), model=sharded)
    model = make("written out")
    early = torch.optim.Adam(model.parameters())
    loss_of(model(batch(0)[0]), batch(0)[1]).backward()
    early.step()
    sharded = hvd.shard_model(model, mesh, by="features")
    with pytest.raises(hvd.PlanError, match="Make it after shard_model"):
        hvd.DistributedOptimizer(early, model=sharded)
