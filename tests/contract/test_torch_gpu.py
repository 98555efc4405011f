"""What is true on a GPU alone: how its tensors travel, mixed precision with a scaler, data in both memories."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hvdscale.torch as hvd
from hvdscale.torch.host import in_reach, travels_by_host
from tests.contract.driver import ContractDriver
from tests.contract.torch_network import assert_same_everywhere, network


def test_the_way_is_a_setting_with_its_reason(size: int) -> None:
    (way,) = [setting for setting in hvd.runtime_settings() if setting.name == "HVDSCALE_GPU"]
    shared = size > torch.cuda.device_count()
    assert way.value == ("direct" if hvd.nccl_built() and not shared else "host")
    assert travels_by_host(torch.ones(1, device="cuda")) == (way.value == "host")
    assert "NCCL" in way.reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool])
def test_what_is_sent_is_what_all_work_before_it_made(dtype: torch.dtype, size: int, rank: int) -> None:
    """On a stream of its own, behind work that is still to be done when the message is asked for."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        a = torch.randn(2048, 2048)
        for _ in range(20):
            a = a @ a / 2048
        late = (a.isfinite() * (rank + 1)).to(dtype)
        total = hvd.allreduce(late, op=hvd.Sum, name=f"late.{dtype}")
        gathered = hvd.allgather(late[:1], name=f"late.all.{dtype}")
        first = hvd.broadcast(late, 0, name=f"late.first.{dtype}")
    torch.cuda.synchronize()
    ranks = range(1, size + 1)
    wanted = torch.tensor(sum(ranks) if dtype != torch.bool else 1).to(dtype)
    assert (total == wanted).all()
    assert total.device == gathered.device == first.device == late.device
    assert gathered[:, 0].tolist() == [torch.tensor(r).to(dtype).item() for r in ranks]
    assert (first == torch.tensor(1).to(dtype)).all()


def test_copies_to_the_host_lie_in_page_locked_memory() -> None:
    tensors = [torch.randn(1000), torch.randn(3, 4), torch.arange(5)]
    sent = in_reach(tensors)
    for tensor, copied in zip(tensors, sent, strict=True):
        if travels_by_host(tensor):
            assert copied.is_pinned()
            assert torch.equal(copied, tensor)
        else:
            assert copied is tensor


@pytest.mark.parametrize("update", ["local", "central", "sharded"])
def test_mixed_precision_with_a_scaler_trains_alike(update: str, driver: ContractDriver, rank: int, size: int) -> None:
    """Every rank takes and leaves out the same steps; what is trained is near what one process in float32 trains."""
    model = network(5)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = hvd.DistributedOptimizer(optimizer, model=model, sync=hvd.EveryStep(update))
    plain = torch.optim.SGD(reference.parameters(), lr=0.05, momentum=0.9)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    data = torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0))
    for step, x in enumerate(data):
        optimizer.zero_grad()
        shares = x.chunk(size)
        with torch.autocast("cuda", torch.float16):
            loss = model(shares[rank]).square().mean()
        if step == 2 and rank == size - 1:
            loss = loss * float("inf")  # on one rank: all leave this step out
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        if step != 2:
            plain.zero_grad()
            reference(x).square().mean().backward()
            plain.step()
    assert_same_everywhere(driver, model.parameters())
    assert scaler.get_scale() == 512.0
    for trained, wanted in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(trained, wanted, atol=5e-3, rtol=5e-2)


def test_batches_are_page_locked_unless_the_data_is_on_the_gpu(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(64, size, "random", seed=1)
    host = np.arange(64, dtype=np.float32).reshape(64, 1)
    batches = list(hvd.shard_dataset(host, plan, batch_size=8))
    assert all(batch.is_pinned() for batch in batches)
    there = {"x": torch.arange(64.0).view(64, 1), "y": torch.arange(64)}
    same = list(hvd.shard_dataset(there, plan, batch_size=8))
    assert all(batch["x"].is_cuda and batch["y"].is_cuda for batch in same)
    assert [b.view(-1).tolist() for b in batches] == [b["x"].view(-1).tolist() for b in same]
    with pytest.raises(hvd.PlanError, match="workers and pin_memory out"):
        hvd.shard_dataset(there, plan, batch_size=8, workers=2)


def test_rounds_go_on_bit_equal_from_a_state_saved_on_the_gpu(driver: ContractDriver, rank: int) -> None:
    def start(seed: int) -> tuple[nn.Module, Any]:
        model = network(seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        plan = hvd.DiLoCo(every=4, wire="int8", fragments=2, overlap=1)
        return model, hvd.DistributedOptimizer(optimizer, model=model, sync=plan)

    def train(model: nn.Module, optimizer: Any, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = torch.randn(6, 3, generator=torch.Generator().manual_seed(100 * rank + step))
            model(x).square().mean().backward()
            optimizer.step()

    model, optimizer = start(1)
    train(model, optimizer, range(6))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()]), optimizer.sync.state_dict()
    train(model, optimizer, range(6, 13))
    again, resumed = start(2)
    again.load_state_dict(saved[0][0])
    resumed.load_state_dict(saved[0][1])
    resumed.sync.load_state_dict(saved[1])
    train(again, resumed, range(6, 13))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    resumed.sync.flush()
    optimizer.sync.flush()
    assert_same_everywhere(driver, again.parameters())
