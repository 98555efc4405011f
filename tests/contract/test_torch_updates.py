"""Placed updates among the things a torch script does: groups, clipping, scalers, checkpoints, half precision."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hvdscale.torch as hvd
from hvdscale.sync import EveryStep
from tests.contract.driver import ContractDriver
from tests.contract.torch_network import Scaled, assert_same_everywhere, inputs

PLACED = ("central", "sharded")
STEPS = 50


def network(seed: int = 0) -> nn.Sequential:
    """Sizes that no number of ranks divides; a tied weight, and one number by itself."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.Linear(7, 7, bias=False), nn.Linear(7, 1)
    )
    model[3].weight = model[2].weight
    model.register_parameter("scale", nn.Parameter(torch.tensor(1.5)))
    return model


def groups(model: nn.Module) -> list[dict[str, Any]]:
    named = dict(model.named_parameters())
    decayed = [p for n, p in named.items() if p.dim() > 1]
    rest = [p for n, p in named.items() if p.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "lr": 0.02, "weight_decay": 0.0}]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, eps=1e-3, amsgrad=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-3, fused=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),  # has state from the start
}


def loss_of(model: nn.Module, rank: int, step: int) -> Tensor:
    x = inputs(rank, step).to(next(model.parameters()).dtype)
    return (model(x) * model.scale).square().mean()


def train(model: nn.Module, optimizer: Any, rank: int, first: int, last: int, clip: float | None = 0.5) -> list[float]:
    norms = []
    for step in range(first, last):
        optimizer.zero_grad()
        loss_of(model, rank, step).backward()
        if clip:
            norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
    return norms


def distributed(kind: str, update: str, model: nn.Module | None = None, **arguments: Any) -> tuple[nn.Module, Any]:
    model = network() if model is None else model
    return model, hvd.DistributedOptimizer(
        OPTIMIZERS[kind](groups(model)), model=model, sync=EveryStep(update), **arguments
    )


def assert_close(model: nn.Module, other: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_groups_and_clipping_give_the_weights_of_local_updates(driver: ContractDriver, rank: int, kind: str) -> None:
    local, plain = distributed(kind, "local")
    wanted = train(local, plain, rank, 0, STEPS)
    for update in PLACED:
        model, optimizer = distributed(kind, update)
        memory = [p.data_ptr() for p in model.parameters()]
        norms = train(model, optimizer, rank, 0, STEPS)
        assert norms == pytest.approx(wanted, rel=1e-5), "norms of the whole gradient"
        assert_close(model, local)
        assert_same_everywhere(driver, model.parameters())
        assert [p.data_ptr() for p in model.parameters()] == memory


@pytest.mark.parametrize("kind", ["momentum", "AdamW fused"])
def test_a_rank_keeps_its_part_of_the_state(rank: int, size: int, kind: str) -> None:
    def wide() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 501), nn.Tanh(), nn.Linear(501, 101), nn.Linear(101, 1))
        model.register_parameter("scale", nn.Parameter(torch.tensor(1.0)))
        return model

    plain = OPTIMIZERS[kind](groups(wide()))
    for group in plain.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    plain.step()
    whole = sum(v.nbytes for s in plain.state.values() for v in s.values() if isinstance(v, Tensor))
    for update in PLACED:
        model, optimizer = distributed(kind, update, wide())
        train(model, optimizer, rank, 0, 2)
        held = sum(v.nbytes for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor))
        if size > 1:
            assert optimizer.sync.metrics()["state_bytes"] == held
        if update == "sharded":
            assert held <= 1.05 * whole / size
        else:
            assert held == (whole if rank == 0 else 0)


def saved_and_loaded(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.parametrize("update", PLACED)
def test_state_is_that_of_a_plain_optimizer_and_goes_anywhere(rank: int, size: int, update: str) -> None:
    """Saved by N ranks, taken up by a plain one, by other updates, and by fewer ranks: always the same end."""
    local, plain = distributed("AdamW fused", "local")
    train(local, plain, rank, 0, 12)
    model, optimizer = distributed("AdamW fused", update)
    train(model, optimizer, rank, 0, 6)
    state, weights = saved_and_loaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    half, halfway = distributed("AdamW fused", "local")
    train(half, halfway, rank, 0, 6)
    wanted = halfway.state_dict()
    assert state["param_groups"] == wanted["param_groups"]
    for number, entry in wanted["state"].items():
        assert list(state["state"][number]) == list(entry)
        for key, value in entry.items():
            torch.testing.assert_close(state["state"][number][key], value, atol=1e-6, rtol=1e-5)
    train(model, optimizer, rank, 6, 12)
    assert_close(model, local)
    for resumed in ("local", *PLACED):  # killed, and started again
        model, optimizer = distributed("AdamW fused", resumed)
        model.load_state_dict(weights)
        optimizer.load_state_dict(copy.deepcopy(state))  # a plain one goes on in the tensors it is given
        again = optimizer.state_dict()
        assert all(again["state"][n]["step"] == entry["step"] for n, entry in state["state"].items())
        train(model, optimizer, rank, 6, 12)
        assert_close(model, local)


def test_killed_and_resumed_is_bit_equal_also_on_fewer_ranks(driver: ContractDriver, rank: int) -> None:
    """All ranks compute alike, so that the number of ranks changes no gradient."""
    model, optimizer = distributed("momentum", "sharded")
    train(model, optimizer, 0, 0, 3)
    state, weights = saved_and_loaded(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, 0, 3, 6)
    for ranks in (hvd.global_process_set, driver.even_ranks):
        twin, resumed = distributed("momentum", "sharded", process_set=ranks)
        if not ranks.included():
            continue
        twin.load_state_dict(weights)
        resumed.load_state_dict(copy.deepcopy(state))  # a plain one goes on in the tensors it is given
        train(twin, resumed, 0, 3, 6)
        if ranks is hvd.global_process_set:
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        assert_close(twin, model)


@pytest.mark.parametrize("update", PLACED)
def test_after_a_flush_the_first_rank_saves_alone(rank: int, size: int, update: str) -> None:
    model, optimizer = distributed("Adam", update)
    train(model, optimizer, rank, 0, 2)
    everywhere = optimizer.state_dict()
    optimizer.sync.flush()
    if rank == 0:
        alone = optimizer.state_dict()
        for number, entry in everywhere["state"].items():
            assert all(torch.equal(alone["state"][number][key], value) for key, value in entry.items())
    else:
        with pytest.raises(hvd.StateError, match="first rank holds the whole"):
            optimizer.state_dict()
    train(model, optimizer, rank, 2, 3)
    assert optimizer.state_dict()["state"][0]["step"] == 3


@pytest.mark.parametrize("update", PLACED)
def test_state_loaded_on_one_rank_is_broadcast(rank: int, update: str) -> None:
    local, plain = distributed("Adam", "local")
    train(local, plain, rank, 0, 3)
    model, optimizer = distributed("Adam", update)
    train(model, optimizer, rank, 5, 6)
    model.load_state_dict(local.state_dict())
    if rank == 0:
        optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)
    train(local, plain, rank, 3, 6)
    train(model, optimizer, rank, 3, 6)
    assert_close(model, local)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)  # now each rank holds a part: nothing to copy
    train(local, plain, rank, 6, 8)
    train(model, optimizer, rank, 6, 8)
    assert_close(model, local)


@pytest.mark.parametrize("update", PLACED)
def test_bfloat16_parameters_have_float32_masters(driver: ContractDriver, rank: int, size: int, update: str) -> None:
    """Steps too small for bfloat16 add up in the masters, as they would in float32; a checkpoint holds them."""
    if size == 1:
        return  # alone, the optimizer is the user's own

    def run(first: int, last: int, model: nn.Module, optimizer: Any) -> None:
        for _ in range(first, last):
            optimizer.zero_grad()
            (model(torch.ones(4, 3, dtype=torch.bfloat16)) * torch.tensor(1.0 + rank)).sum().backward()
            optimizer.step()

    def fresh() -> tuple[nn.Module, Any]:
        model = nn.Linear(3, 5, dtype=torch.bfloat16)
        nn.init.ones_(model.weight)
        plain = torch.optim.SGD(model.parameters(), lr=2e-5, momentum=0.5)
        return model, hvd.DistributedOptimizer(plain, model=model, sync=EveryStep(update))

    model, optimizer = fresh()
    run(0, 40, model, optimizer)
    mean = 4 * (1 + (size - 1) / 2)
    wanted, velocity = 1.0, 0.0
    for _ in range(40):
        velocity = 0.5 * velocity + mean
        wanted -= 2e-5 * velocity
    state = saved_and_loaded(optimizer.state_dict())
    assert model.weight.dtype == torch.bfloat16
    assert state["state"][0]["momentum_buffer"].dtype == torch.float32
    torch.testing.assert_close(state["state"][0]["master"], torch.full((5, 3), wanted), rtol=1e-6, atol=1e-6)
    assert torch.equal(model.weight, state["state"][0]["master"].bfloat16())
    assert (model.weight < 1).all(), "bfloat16 alone would have stood still"
    twin, resumed = fresh()
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(state)
    run(40, 60, model, optimizer)
    run(40, 60, twin, resumed)
    assert torch.equal(optimizer.state_dict()["state"][0]["master"], resumed.state_dict()["state"][0]["master"])
    assert_same_everywhere(driver, model.parameters())
    nn.init.ones_(model.weight)  # loaded weights count, masters or not
    run(60, 61, model, optimizer)
    assert (model.weight > 0.99).all()


@pytest.mark.parametrize("update", PLACED)
def test_gradients_are_accumulated_over_passes(rank: int, update: str) -> None:
    local, plain = distributed("AdamW fused", "local", backward_passes_per_step=2)
    model, optimizer = distributed("AdamW fused", update, backward_passes_per_step=2)
    for net, opt in ((local, plain), (model, optimizer)):
        for step in range(6):
            loss_of(net, rank, step).backward()
            if step % 2:
                nn.utils.clip_grad_value_(net.parameters(), 0.05)
                opt.step()
                opt.zero_grad()
    assert_close(model, local)


@pytest.mark.parametrize("update", PLACED)
def test_what_a_gradient_says_is_true_of_the_whole_or_refused(rank: int, size: int, update: str) -> None:
    pairs = [distributed("SGD", kind) for kind in ("local", update)]  # optimizers thrown away would reduce nothing
    local, model = (net for net, _ in pairs)
    for net in (local, model):
        loss_of(net, rank, 0).backward()
    if size == 1:
        return
    for p, q in zip(model.parameters(), local.parameters(), strict=True):
        assert p.grad.shape == p.shape
        for order in (1, 2, 3, float("inf"), float("-inf"), 0):
            torch.testing.assert_close(p.grad.norm(order), q.grad.norm(order), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(p.grad.full_tensor(), q.grad)
    weight = model[0].weight
    more = torch.ones(7, 3)
    for wrong in (weight.grad.mean, lambda: weight.grad + 1, lambda: weight.grad.add_(more), weight.grad.numpy):
        with pytest.raises(hvd.PlanError, match=r"full_tensor"):
            wrong()
    assert f"of {weight.numel()}" not in repr(weight.grad)
    assert "0.weight" in repr(weight.grad)
    with pytest.raises(hvd.PlanError, match="zero_grad"):
        loss_of(model, rank, 1).backward()


@pytest.mark.parametrize("update", PLACED)
def test_what_a_script_puts_into_grad_is_what_is_stepped_on(rank: int, update: str) -> None:
    """Nothing, a tensor of its own, or the whole gradient and something more."""
    ends = []
    for kind in ("local", update):
        model, optimizer = distributed("Adam", kind)
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, rank, step).backward()
            first, second, third, *_ = model.parameters()
            first.grad = None
            second.grad = torch.full_like(second, 0.1)
            whole = third.grad.full_tensor() if hasattr(third.grad, "full_tensor") else third.grad
            third.grad = whole + 0.2 * third.detach()
            optimizer.step()
        ends.append([p.detach().clone() for p in model.parameters()])
    for one, other in zip(*ends, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("update", PLACED)
def test_a_scaler_skips_the_same_steps_on_every_rank(rank: int, size: int, update: str) -> None:
    ends = []
    for kind in ("local", update):
        model, optimizer = distributed("momentum", kind)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        for step in range(5):
            optimizer.zero_grad()
            loss = loss_of(model, rank, step)
            scaler.scale(loss * (torch.inf if step == 2 and rank == size - 1 else 1.0)).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        ends.append((model, scaler.get_scale()))
    assert ends[0][1] == ends[1][1]
    assert_close(ends[1][0], ends[0][0])


@pytest.mark.parametrize("update", PLACED)
def test_the_optimizer_stays_the_users_own_with_its_updates_placed(rank: int, size: int, update: str) -> None:
    model = network()
    plain = torch.optim.SGD(groups(model), lr=0.1, momentum=0.9)
    seen: list[tuple[str, int]] = []
    plain.register_step_post_hook(lambda o, *_: seen.append(("before", sum(map(len, _params(o))))))
    scheduler = torch.optim.lr_scheduler.StepLR(plain, 2, 0.5)
    optimizer = hvd.DistributedOptimizer(plain, model=model, sync=EveryStep(update))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("after", sum(map(len, _params(o))))))
    own = _params(optimizer)
    train(model, optimizer, rank, 0, 2, clip=None)
    scheduler.step()
    scheduler.step()

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, rank, 2)
        loss.backward()
        return loss

    loss = optimizer.step(closure)
    assert float(loss) > 0
    with optimizer.skip_synchronize():
        closure()
        optimizer.synchronize()
        optimizer.step()
    assert optimizer is plain
    assert all(a is b for x, y in zip(own, _params(optimizer), strict=True) for a, b in zip(x, y, strict=True))
    count = sum(map(len, own))
    assert seen == [("before", count), ("after", count)] * 4
    assert optimizer.param_groups[0]["lr"] == 0.05
    if size > 1:
        with pytest.raises(hvd.StateError, match=r"optimizer\.state_dict\(\)"):
            copy.deepcopy(optimizer)


def _params(optimizer: Any) -> list[list[Tensor]]:
    return [group["params"] for group in optimizer.param_groups]


@pytest.mark.parametrize("update", PLACED)
def test_parameters_that_come_and_go(driver: ContractDriver, rank: int, update: str) -> None:
    """Frozen, trained, without a gradient on some ranks, and of a group added later."""
    ends = []
    for kind in ("local", update):
        torch.manual_seed(0)
        model, extra = network(), nn.Linear(1, 3)
        model[0].requires_grad_(False)
        optimizer = hvd.DistributedOptimizer(OPTIMIZERS["Adam"](groups(model)), model=model, sync=EveryStep(kind))
        train(model, optimizer, rank, 0, 3)
        model[0].requires_grad_(True)
        train(model, optimizer, rank, 3, 6)
        model[4].requires_grad_(False)
        train(model, optimizer, rank, 6, 8)
        optimizer.add_param_group({"params": list(extra.parameters()), "lr": 0.03})
        for step in range(8, 12):
            optimizer.zero_grad()
            hidden = model(inputs(rank, step))
            (hidden if rank == 0 and step % 2 else extra(hidden)).square().mean().backward()
            optimizer.synchronize()
            optimizer.step()
        state = optimizer.state_dict()
        ends.append((nn.ModuleList([model, extra]), {n: int(e["step"]) for n, e in state["state"].items()}))
    assert_close(ends[1][0], ends[0][0])
    assert ends[0][1] == ends[1][1]
    assert_same_everywhere(driver, ends[1][0].parameters())


@pytest.mark.filterwarnings("ignore:No gradient reached")
@pytest.mark.parametrize("update", PLACED)
def test_odd_layouts_and_dtypes(rank: int, update: str) -> None:
    """Weights that are not contiguous, of float64, empty, and fewer elements than ranks."""
    ends = []
    for kind in ("local", update):
        torch.manual_seed(1)
        model = nn.Module()
        model.picture = nn.Conv2d(2, 3, 2).to(memory_format=torch.channels_last)
        model.exact = nn.Parameter(torch.ones(1, dtype=torch.float64))
        model.nothing = nn.Parameter(torch.ones(0, 3))
        optimizer = hvd.DistributedOptimizer(
            torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3), model=model, sync=EveryStep(kind)
        )
        for step in range(4):
            optimizer.zero_grad()
            x = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(10 * step + rank))
            (model.picture(x).square().mean() * model.exact + model.nothing.sum()).sum().backward()
            optimizer.step()
        assert not model.picture.weight.is_contiguous()
        assert len(optimizer.state_dict()["state"]) >= 3
        ends.append(model)
    assert_close(ends[1], ends[0])


class NormaliseByTensor(torch.optim.Optimizer):
    """Not element-wise, and of no name anyone knows."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad / p.grad.norm())


def test_an_optimizer_of_ones_own_is_tried_and_a_central_one_may_see_whole_tensors(rank: int, size: int) -> None:
    model = network()
    hvd.DistributedOptimizer(Scaled(0.1, 2.0, params=model.parameters()), sync=EveryStep("sharded"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(hvd.PlanError, match="NormaliseByTensor does not: on slices"):
        hvd.DistributedOptimizer(NormaliseByTensor(model.parameters()), sync=EveryStep("sharded"))
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    ends = []
    for kind in ("local", "central"):
        model = network()
        optimizer = hvd.DistributedOptimizer(
            torch.optim.Adafactor(model.parameters()), model=model, sync=EveryStep(kind)
        )
        train(model, optimizer, rank, 0, 3, clip=None)
        state = optimizer.state_dict()["state"]
        ends.append((model, state))
    assert_close(ends[1][0], ends[0][0])
    assert {n: sorted(e) for n, e in ends[0][1].items()} == {n: sorted(e) for n, e in ends[1][1].items()}


@pytest.mark.parametrize("update", PLACED)
@pytest.mark.parametrize("kind", ["LBFGS", "Adafactor", "Muon", "sparse", "SparseAdam"])
def test_optimizers_that_cannot_be_placed_are_named(rank: int, update: str, kind: str) -> None:
    matrix = nn.Linear(3, 3, bias=False)
    words = nn.Embedding(5, 3, sparse=True)
    made: dict[str, tuple[nn.Module, Callable[[], torch.optim.Optimizer], str, tuple[str, ...]]] = {
        "LBFGS": (matrix, lambda: torch.optim.LBFGS(matrix.parameters()), "LBFGS", PLACED),
        "Adafactor": (matrix, lambda: torch.optim.Adafactor(matrix.parameters()), "Adafactor", ("sharded",)),
        "Muon": (matrix, lambda: torch.optim.Muon(matrix.parameters()), "Muon", ("sharded",)),
        "sparse": (words, lambda: torch.optim.SGD(words.parameters(), lr=0.1), "sparse=True", PLACED),
        "SparseAdam": (matrix, lambda: torch.optim.SparseAdam(matrix.parameters()), "SparseAdam", ("sharded",)),
    }
    model, make, named, refused = made[kind]
    if update in refused:
        with pytest.raises(hvd.PlanError, match=named):
            hvd.DistributedOptimizer(make(), model=model, sync=EveryStep(update))


@pytest.mark.parametrize("update", PLACED)
def test_sparse_gradients_are_made_dense_when_told_so(rank: int, size: int, update: str) -> None:
    ends = []
    for kind in ("local", update):
        torch.manual_seed(0)
        words = nn.Embedding(10, 3, sparse=True)
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(words.parameters(), lr=0.1), model=words, sparse_as_dense=True, sync=EveryStep(kind)
        )
        for step in range(2):
            optimizer.zero_grad()
            words(torch.tensor([rank, step])).sum().backward()
            optimizer.step()
        ends.append(words)
    assert_close(ends[1], ends[0])
    unknown = nn.Embedding(10, 3, sparse=True)  # no model given: found out when the gradient comes
    optimizer = hvd.DistributedOptimizer(torch.optim.SGD(unknown.parameters(), lr=0.1), sync=EveryStep(update))
    if size > 1:
        with pytest.raises(hvd.PlanError, match="is sparse"):
            unknown(torch.tensor([rank])).sum().backward()


def test_state_that_only_some_ranks_loaded_is_told(rank: int, size: int) -> None:
    if size == 1:
        return
    model, optimizer = distributed("Adam", "sharded")
    train(model, optimizer, rank, 0, 1)
    state = optimizer.state_dict()
    if rank == 0:
        optimizer.load_state_dict(state)
    with pytest.raises(hvd.StateError, match="Some ranks have loaded"):
        optimizer.state_dict()
