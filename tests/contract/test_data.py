"""What every adapter promises of its loaders; ``test_<adapter>_data.py`` holds what is true of one alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hvdscale.data import ShardPlan, add_sums
from hvdscale.errors import PlanError, StateError
from tests.contract.data import all_numbers, batches_of, everyones, one_pass
from tests.contract.driver import ContractDriver
from tests.core.real_text import drawn_lengths

N = 120
NAMES = ("BalancedPlan", "ShardPlan", "ShardStream", "pack", "shard_dataset", "split", "verify_epoch")


@pytest.mark.parametrize("name", NAMES)
def test_names(hvd: Any, name: str) -> None:
    assert name in hvd.__all__
    assert callable(getattr(hvd, name))


def read_epoch(loader: Any) -> list[int]:
    """Reads on to the end of the epoch as a loop or a fit of the framework would; the sample numbers."""
    return [number for _, numbers in one_pass(loader) for number in numbers]


@pytest.mark.parametrize("tail", ["exact", "drop"])
@pytest.mark.parametrize("balanced", [False, True])
def test_an_epoch_read_once_is_verified(
    driver: ContractDriver, hvd: Any, rank: int, size: int, tail: str, balanced: bool
) -> None:
    plan: Any = hvd.ShardPlan(N, size, seed=1, tail=tail)
    if balanced:
        plan = hvd.BalancedPlan(plan, np.arange(N) + 1)
    loader = hvd.shard_dataset(np.arange(N), plan, 8)
    for epoch in range(2):
        mine = read_epoch(loader)
        hvd.verify_epoch(loader)
        hvd.verify_epoch(loader, epoch)
    if tail == "exact":
        assert all_numbers(driver, mine) == list(range(N))


def test_a_pass_ends_with_its_last_batch(hvd: Any, rank: int, size: int) -> None:
    """Whether or not the loop comes back to learn that nothing is left."""
    plan = hvd.ShardPlan(N, size, seed=1)
    loader = hvd.shard_dataset(np.arange(N), plan, 8)
    for epoch in range(3):
        read = [number for _, numbers in one_pass(loader, len(loader)) for number in numbers]
        assert read == plan.indices(rank, epoch).tolist()
        assert loader.epoch == epoch + 1
        hvd.verify_epoch(loader)


def more(state: dict[str, Any]) -> None:
    """As if one more batch had been delivered: its samples get lost."""
    state["step"] += 1
    state["delivered"] += state["batch_size"]


def less(state: dict[str, Any]) -> None:
    """As if the last batch had not been delivered: its samples are read again."""
    state["step"] -= 1
    state["delivered"] -= state["batch_size"]


def as_it_is(state: dict[str, Any]) -> None:
    """The state as it was saved."""


@pytest.mark.parametrize(("spoil", "right"), [(as_it_is, True), (more, False), (less, False)])
def test_a_lost_or_repeated_sample_is_found_on_every_rank(
    driver: ContractDriver, hvd: Any, rank: int, size: int, spoil: Callable[[dict[str, Any]], None], right: bool
) -> None:
    readers = [ShardPlan(N, size, seed=1).reader(shard, 4) for shard in range(size)]
    for reader in readers:
        for _ in itertools.repeat(None, 3):
            next(reader)
    states = [reader.state_dict() for reader in readers]
    spoil(states[0])
    loader = hvd.shard_dataset(np.arange(N), hvd.ShardPlan.resume(states, size), 4)
    read_epoch(loader)
    if right:
        hvd.verify_epoch(loader)
        return
    with pytest.raises(StateError, match=r"Epoch 0 was not read exactly once: the sum .* is 0x[0-9a-f]+, that of 120"):
        hvd.verify_epoch(loader)


@pytest.mark.parametrize("policy", ["ordered", "random", "hash"])
def test_exactly_once_over_epochs_and_stops_with_other_numbers_of_shards(
    driver: ContractDriver, hvd: Any, rank: int, size: int, policy: str
) -> None:
    """Each run is of so many shards and so large batches; some shards get whole epochs ahead of others."""
    plan, mine, end = hvd.ShardPlan(N, size, policy, seed=1), list[tuple[int, int]](), 0
    runs = [(size, 8), (size + 1, 4), (max(1, size - 1), 8), (size + 2, 8)]
    for i, (shards, batch_size) in enumerate(runs):
        loaders = {s: hvd.shard_dataset(np.arange(N), plan, batch_size, shard=s) for s in range(rank, shards, size)}
        if i < len(runs) - 1:
            for shard, loader in loaders.items():
                for epoch, numbers in batches_of(loader, 6 + 15 * (shard % 3)):
                    mine += [(epoch, number) for number in numbers]
            states = everyones(driver, [loader.state_dict() for loader in loaders.values()])
            plan = hvd.ShardPlan.resume(list(itertools.chain(*states)), runs[i + 1][0])
            continue
        end = 1 + max(everyones(driver, max(epoch for epoch, _ in mine)))
        for loader in loaders.values():
            while loader.epoch < end:
                mine += [(epoch, number) for epoch, numbers in one_pass(loader) for number in numbers]
    read = sorted(tuple(each) for theirs in everyones(driver, mine) for each in theirs)
    assert read == [(epoch, number) for epoch in range(end) for number in range(N)]
    assert end > 1, "epochs were crossed"
    for epoch in range(plan.first_epoch, end):
        sums = everyones(driver, [str(loader.feed.reader.certificate(epoch)) for loader in loaders.values()])
        assert add_sums(map(int, itertools.chain(*sums))) == plan.certificate()


def test_ranks_finish_together_on_unlike_documents(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    lengths, quadratic, batch_size = np.minimum(drawn_lengths(), 16384), 1 / 4608, 16  # a width of 768
    plain = hvd.ShardPlan(len(lengths), size, seed=1, tail="drop")
    worst = {}
    for name, plan in (("plain", plain), ("balanced", hvd.BalancedPlan(plain, lengths, quadratic=quadratic))):
        loader, costs = hvd.shard_dataset(np.arange(len(lengths)), plan, batch_size), []
        for _, numbers in one_pass(loader):
            costs.append(float((lengths[numbers] + quadratic * lengths[numbers] ** 2).sum()))
        hvd.verify_epoch(loader)
        steps = np.array(everyones(driver, costs))  # [ranks, steps]
        worst[name] = float((steps.max(0) / steps.mean(0)).max())
    assert worst["balanced"] <= 1.05
    assert worst["plain"] > 1.3 or size == 1


def test_packed_blocks_are_read_whole(driver: ContractDriver, hvd: Any, rank: int, size: int) -> None:
    lengths = drawn_lengths()[:400]
    packing, tokens = hvd.pack(lengths, 8192), np.arange(lengths.sum())
    assert packing.report().waste <= 0.02
    assert len(set(everyones(driver, packing.digest))) == 1
    loader = hvd.shard_dataset(np.arange(len(packing)), hvd.ShardPlan(len(packing), size, seed=1), 4)
    blocks = [packing.read(tokens, numbers, padding=-1) for _, numbers in one_pass(loader)]
    read = np.concatenate([block[block >= 0] for block in blocks])
    counted, total = np.array(everyones(driver, [len(read), int(read.sum())])).sum(0)
    assert (counted, total) == (len(tokens), tokens.sum())
    hvd.verify_epoch(loader)


def test_splits_and_even_shards_are_the_same_on_all_ranks(driver: ContractDriver, hvd: Any, size: int) -> None:
    documents = [f"document {i // 4}" for i in range(N)]
    train, held_out = hvd.split(documents, (0.8, 0.2), salt="a")
    assert len({json.dumps(each) for each in everyones(driver, [train.tolist(), held_out.tolist()])}) == 1
    plan = hvd.ShardPlan(N, size, "hash", keys=documents, even=True)
    loader = hvd.shard_dataset(np.arange(N), plan, 8)
    mine = read_epoch(loader)
    assert len(mine) <= N // size + 4, "a document is not divided"
    hvd.verify_epoch(loader)
    of_ranks = [{documents[number] for number in numbers} for numbers in everyones(driver, [int(n) for n in mine])]
    assert sum(map(len, of_ranks)) == len(set(documents)), "equal keys share a rank"


def test_an_epoch_that_is_not_over_is_not_verified(hvd: Any, rank: int, size: int) -> None:
    loader = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4)
    with pytest.raises(PlanError, match="An epoch is verified when it is over; none is yet"):
        hvd.verify_epoch(loader)
    if size > 1:
        if rank == 0:
            read_epoch(loader)
        with pytest.raises(StateError, match=f"here it is {'none yet' if rank else 0}, on another rank it is not"):
            hvd.verify_epoch(loader)
        with pytest.raises(
            PlanError if rank else StateError, match="it is -2" if rank else f"{size - 1} of {size} ranks"
        ):
            hvd.verify_epoch(loader, -2 if rank else 0)
    with pytest.raises(StateError, match="Epoch 0 was not read exactly once"):
        hvd.verify_epoch(loader, 0)
    with pytest.raises(PlanError, match="this is a list"):
        hvd.verify_epoch([1, 2])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h, k: h.shard_dataset(np.arange(N - 1), h.ShardPlan(N, k), 8), "over 120 samples; data holds 119"),
        (lambda h, k: h.shard_dataset(np.arange(N), h.ShardPlan(N, k + 1), 8), "shards and the job"),
        (lambda h, k: h.shard_dataset(np.arange(N), h.ShardPlan(N, k), 8, shard=k), "shard must be an integer in 0"),
        (lambda h, k: h.shard_dataset(np.arange(N), h.ShardPlan(N, k), 0), "batch_size must be an integer"),
        (lambda h, k: h.shard_dataset(np.arange(N), h.ShardPlan(N, k), 2.5), "batch_size must be an integer"),
        (lambda h, k: h.shard_dataset(iter([1]), h.ShardPlan(1, k), 8), "it is a list_iterator. For a stream"),
        (lambda h, k: h.shard_dataset(np.arange(N), h.ShardPlan(N, k), 8, collate=3), "collate is a function; it is 3"),
        (lambda h, k: h.shard_dataset({"x": [1]}, h.ShardPlan(1, k), 8), "holds arrays alone; 'x' is a list"),
        (lambda h, k: h.shard_dataset((np.arange(1), [1]), h.ShardPlan(1, k), 8), "arrays alone, .* are ndarray, list"),
        (lambda h, k: h.shard_dataset(np.arange(N), k, 8), "plan is a ShardPlan or BalancedPlan"),
        (lambda h, k: h.shard_dataset(np.arange(N), h.ShardPlan(N, k), 8, workers=-1), "workers must be an integer"),
        (lambda h, k: h.shard_dataset((np.arange(3), np.arange(4)), h.ShardPlan(3, k), 8), r"have \[3, 4\] rows"),
    ],
)
def test_bad_arguments(hvd: Any, size: int, call: Callable[[Any, int], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        call(hvd, size)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"seed": 2}, "seed"),
        ({"n": N + 1}, "n"),
        ({"policy": "ordered"}, "policy"),
        ({"shards": 9}, "shares|shards"),
    ],
)
def test_states_of_two_plans_do_not_go_together(hvd: Any, size: int, other: dict[str, Any], message: str) -> None:
    facts: dict[str, Any] = {"n": N, "shards": 2, "policy": "random", "seed": 1}
    one, two = ({**facts}, {**facts, **other})
    states = [hvd.ShardPlan(**one).reader(0, 4).state_dict(), hvd.ShardPlan(**two).reader(1, 4).state_dict()]
    with pytest.raises(StateError, match=message):
        hvd.ShardPlan.resume(states, size)


def test_a_state_of_another_version_and_a_world_that_is_incomplete(driver: ContractDriver, hvd: Any, size: int) -> None:
    states = everyones(driver, hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size), 4).state_dict())
    with pytest.raises(StateError, match="reads states of format"):
        hvd.ShardPlan.resume([{**state, "format": "shard-v9"} for state in states], size)
    with pytest.raises(StateError):
        hvd.ShardPlan.resume(states[1:], size)
