"""shard_dataset on real ranks: every sample once over all ranks, and a state that counts what training got."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import hvdscale.torch as hvd
from tests.contract.data import all_numbers, everyones
from tests.contract.driver import ContractDriver

N = 203
POLICIES = ("ordered", "random", "hash")
WORKERS = (0, 2)
CUT = np.minimum(np.arange(N) ** 2 % 4001 + 1, 2000)  # lengths, in tokens


class Squares(Dataset[tuple[int, float]]):
    def __len__(self) -> int:
        return N

    def __getitem__(self, sample: int) -> tuple[int, float]:
        return sample, float(sample) ** 2


def records(start: int) -> Iterator[int]:
    return iter(range(start, N))


def keyed(record: int) -> str:
    return f"key {record % 60}"


def stream(policy: str, shards: int) -> hvd.ShardStream:
    own: dict[str, Any] = {"ordered": {}, "random": {"window": 40}, "hash": {"key": keyed}}[policy]
    return hvd.ShardStream(shards, policy, seed=3, **own)


def numbers(batches: Any) -> list[int]:
    return [int(sample) for batch in batches for sample in batch]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("policy", POLICIES)
class TestPlans:
    def test_every_epoch_holds_every_sample_once(
        self, driver: ContractDriver, size: int, policy: str, workers: int
    ) -> None:
        loader = hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, size, policy, seed=1), 8, workers=workers)
        for epoch in range(3):
            assert loader.epoch == epoch
            assert all_numbers(driver, numbers(loader)) == list(range(N))

    def test_a_rank_reads_its_shard_in_the_plans_order(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int
    ) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        loader = hvd.shard_dataset(np.arange(N), plan, 8, workers=workers)
        for epoch in range(2):
            assert len(loader) == -(-plan.size(rank, epoch) // 8)
            assert numbers(loader) == plan.indices(rank, epoch).tolist()

    def test_the_state_counts_what_training_got(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int
    ) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        loader, reader = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers), plan.reader(rank, 4)
        for data in itertools.islice(loader, 5):
            batch = next(reader)
            assert data.tolist() == batch.indices.tolist()
            assert loader.state_dict() == reader.state_dict()
            assert (loader.batch.epoch, loader.batch.step, loader.batch.count) == (batch.epoch, batch.step, batch.count)

    def test_an_iteration_left_early_is_gone_on_with(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int
    ) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        loader = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers)
        first = numbers(itertools.islice(loader, 3))
        assert first + numbers(loader) == plan.indices(rank).tolist()

    @pytest.mark.parametrize("other", [-1, 3])
    def test_exactly_once_over_a_stop_of_ranks_that_got_differently_far(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int, other: int
    ) -> None:
        plan = hvd.ShardPlan(N, size, policy, seed=1)
        loader = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers)
        read = numbers(itertools.islice(loader, 2 + 3 * rank))
        states = everyones(driver, loader.state_dict())
        shards = max(1, size + other)
        rest = hvd.ShardPlan.resume(states, shards)
        for shard in range(rank, shards, size):
            read += numbers(hvd.shard_dataset(np.arange(N), rest, 4, shard=shard, workers=workers))
        assert all_numbers(driver, read) == list(range(N))


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("policy", POLICIES)
class TestStreams:
    def test_every_record_once_in_every_pass(
        self, driver: ContractDriver, size: int, policy: str, workers: int
    ) -> None:
        loader = hvd.shard_dataset(records, stream(policy, size), 8, workers=workers)
        for epoch in range(2):
            assert loader.epoch == epoch
            assert all_numbers(driver, numbers(loader)) == list(range(N))

    def test_workers_change_nothing(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int
    ) -> None:
        reader = stream(policy, size).reader(records, rank, 8)
        loader = hvd.shard_dataset(records, stream(policy, size), 8, workers=workers)
        for data in loader:
            assert data.tolist() == next(reader)
            assert loader.state_dict() == reader.state_dict()
        assert next(reader, None) is None

    def test_a_pass_left_early_is_gone_on_with(
        self, driver: ContractDriver, size: int, policy: str, workers: int
    ) -> None:
        whole = numbers(hvd.shard_dataset(records, stream(policy, size), 4))
        loader = hvd.shard_dataset(records, stream(policy, size), 4, workers=workers)
        assert numbers(itertools.islice(loader, 3)) + numbers(loader) == whole

    def test_exactly_once_over_a_stop_of_ranks_that_got_differently_far(
        self, driver: ContractDriver, rank: int, size: int, policy: str, workers: int
    ) -> None:
        loader = hvd.shard_dataset(records, stream(policy, size), 4, workers=workers)
        read = numbers(itertools.islice(loader, 2 + 3 * rank))
        rest = stream(policy, size).resume(everyones(driver, loader.state_dict()), size + 1)
        for shard in range(rank, size + 1, size):
            read += numbers(hvd.shard_dataset(records, rest, 4, shard=shard, workers=workers))
        assert all_numbers(driver, read) == list(range(N))


@pytest.mark.parametrize("workers", WORKERS)
class TestBalanced:
    def test_every_sample_once_and_ranks_finish_together(self, driver: ContractDriver, size: int, workers: int) -> None:
        plan = hvd.BalancedPlan(hvd.ShardPlan(N, size, seed=1), CUT, quadratic=0.001)
        loader = hvd.shard_dataset(np.arange(N), plan, 16, workers=workers)
        batches = [batch.tolist() for batch in loader]
        everyone = everyones(driver, batches)
        assert sorted(itertools.chain(*itertools.chain(*everyone))) == list(range(N))
        for step in range(N // (16 * size)):
            costs = [sum(CUT[i] + 0.001 * CUT[i] ** 2 for i in theirs[step]) for theirs in everyone]
            assert max(costs) <= 1.05 * np.mean(costs)

    def test_exactly_once_over_a_stop(self, driver: ContractDriver, rank: int, size: int, workers: int) -> None:
        plan = hvd.BalancedPlan(hvd.ShardPlan(N, size, seed=1), CUT)
        loader = hvd.shard_dataset(np.arange(N), plan, 4, workers=workers)
        read = numbers(itertools.islice(loader, 7))
        rest = plan.resume(everyones(driver, loader.state_dict()), size + 1)
        for shard in range(rank, size + 1, size):
            read += numbers(hvd.shard_dataset(np.arange(N), rest, 4, shard=shard, workers=workers))
        assert all_numbers(driver, read) == list(range(N))


def doubled(batch: torch.Tensor) -> torch.Tensor:
    return batch * 2


# What data may be, and what a batch of it holds: (data, the sample numbers in a batch, a check of the rest).
DATA: dict[str, tuple[Any, Callable[[Any], torch.Tensor], Callable[[Any], bool]]] = {
    "array": (np.arange(N, dtype=np.int32), lambda b: b, lambda b: b.dtype == torch.int32),
    "matrix": (np.arange(2 * N).reshape(N, 2), lambda b: b[:, 0] // 2, lambda b: b.shape[1] == 2),
    "tensor": (torch.arange(N), lambda b: b, lambda b: b.dtype == torch.int64),
    "tuple": ((np.arange(N), torch.arange(N) * 3), lambda b: b[0], lambda b: torch.equal(b[1], b[0] * 3)),
    "dictionary": ({"x": np.arange(N), "y": -np.arange(N)}, lambda b: b["x"], lambda b: torch.equal(b["y"], -b["x"])),
    "data set": (Squares(), lambda b: b[0], lambda b: torch.equal(b[1], b[0].double() ** 2)),
    "list": (list(range(N)), lambda b: b, lambda b: b.dtype == torch.int64),
}


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("kind", DATA)
def test_what_data_may_be(rank: int, size: int, kind: str, workers: int) -> None:
    data, samples_of, rest_is_right = DATA[kind]
    plan = hvd.ShardPlan(N, size, seed=4)
    batches = list(hvd.shard_dataset(data, plan, 16, workers=workers))
    assert torch.cat([samples_of(batch) for batch in batches]).tolist() == plan.indices(rank).tolist()
    assert all(rest_is_right(batch) for batch in batches)


def test_memory_maps_are_read_in_place(rank: int, size: int, tmp_path: Any) -> None:
    np.arange(N * 3, dtype=np.uint8).reshape(N, 3).tofile(tmp_path / "data")
    mapped = np.memmap(tmp_path / "data", np.uint8, "r", shape=(N, 3))
    plan = hvd.ShardPlan(N, size, "ordered")
    read = torch.cat(list(hvd.shard_dataset(mapped, plan, 16, workers=2))).numpy()
    assert np.array_equal(read, mapped[plan.indices(rank)])


def test_collate_makes_the_batches(size: int) -> None:
    plan = hvd.ShardPlan(N, size, "ordered")
    plain, twice = (list(hvd.shard_dataset(np.arange(N), plan, 16, collate=c)) for c in (None, doubled))
    assert all(torch.equal(two, one * 2) for one, two in zip(plain, twice, strict=True))
    lists = hvd.shard_dataset(Squares(), plan, 16, collate=len, workers=2)
    assert list(lists) == [len(batch) for batch in plain]


def test_workers_stay_over_epochs(size: int) -> None:
    loader = hvd.shard_dataset(Squares(), hvd.ShardPlan(N, size), 16, workers=2)
    epochs = [[frozenset(batch[0].tolist()) for batch in loader] for _ in range(2)]
    assert loader.persistent_workers
    assert epochs[0] != epochs[1]
    assert not hvd.shard_dataset(Squares(), hvd.ShardPlan(N, size), 16).persistent_workers


def test_pinned_memory_and_workers_that_stay(rank: int, size: int) -> None:
    """Also where a first iteration is left in its middle. Without a GPU PyTorch pins nothing, and says so."""
    plan = hvd.ShardPlan(N, size, seed=2)
    loader = hvd.shard_dataset(np.arange(N), plan, 8, workers=2, prefetch=3, pin_memory=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = numbers(itertools.islice(loader, 4)) + numbers(loader) + numbers(loader)
    assert read == [*plan.indices(rank, 0), *plan.indices(rank, 1)]
    assert loader.epoch == 2


@pytest.mark.parametrize("workers", WORKERS)
def test_an_iterator_that_was_overtaken_is_refused(size: int, workers: int) -> None:
    plan = hvd.ShardPlan(N, size)
    for loader in (
        hvd.shard_dataset(np.arange(N), plan, 4, workers=workers),
        hvd.shard_dataset(records, stream("ordered", size), 4, workers=workers),
    ):
        old, new = iter(loader), iter(loader)
        next(old)
        next(new)
        with pytest.raises(hvd.PlanError, match="has been iterated again since"):
            next(old)
    one, other = (hvd.shard_dataset(np.arange(N), plan, 4, workers=workers) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)), "two loaders do not meet"


class FailsOnce(Squares):
    """Breaks off at one sample until it is mended."""

    broken_at: int | None = None

    def __getitem__(self, sample: int) -> tuple[int, float]:
        if sample == self.broken_at:
            raise OSError(f"sample {sample} cannot be read")
        return super().__getitem__(sample)


@pytest.mark.parametrize("workers", WORKERS)
def test_data_that_cannot_be_read_is_read_again_once_it_can(rank: int, size: int, workers: int) -> None:
    plan, data, read = hvd.ShardPlan(N, size, seed=2), FailsOnce(), list[int]()
    data.broken_at = int(plan.indices(rank)[22])
    loader = hvd.shard_dataset(data, plan, 4, workers=workers, persistent_workers=False)
    batches = iter(loader)
    read += numbers(batch[0] for batch in itertools.islice(batches, 5))
    with pytest.raises(OSError, match="cannot be read"):
        next(batches)
    assert loader.state_dict()["step"] == 5
    data.broken_at = None
    assert read + numbers(batch[0] for batch in loader) == plan.indices(rank).tolist()


def test_padding_is_marked(driver: ContractDriver, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=1, tail="pad")
    loader = hvd.shard_dataset(np.arange(N), plan, 16)
    valid, sizes = [], []
    for data in loader:
        valid += data[loader.batch.valid].tolist()
        sizes.append(len(data))
    assert set(sizes) == {16}
    assert all_numbers(driver, valid) == list(range(N))


def test_workers_that_do_not_fork(rank: int, size: int) -> None:
    plan = hvd.ShardPlan(N, size, seed=2)
    loader = hvd.shard_dataset(np.arange(N), plan, 32, workers=1, multiprocessing_context="forkserver")
    assert numbers(loader) == plan.indices(rank).tolist()


class TestPlainLoaders:
    """The sampler and the data set in a ``DataLoader`` of one's own."""

    @pytest.mark.parametrize("workers", WORKERS)
    def test_a_sampler(self, rank: int, size: int, workers: int) -> None:
        plan = hvd.ShardPlan(N, size, seed=2)
        sampler = hvd.ShardedBatchSampler(plan, 8)
        loader = DataLoader(Squares(), batch_sampler=sampler, num_workers=workers)
        for epoch in range(2):
            assert len(loader) == -(-plan.size(rank, epoch) // 8)
            assert numbers(batch[0] for batch in loader) == plan.indices(rank, epoch).tolist()
        assert sampler.state_dict()["epoch"] == 2

    @pytest.mark.parametrize("workers", WORKERS)
    def test_an_iterable(self, driver: ContractDriver, size: int, workers: int) -> None:
        batches = hvd.ShardedIterable(records, stream("random", size), 8)
        assert all_numbers(driver, numbers(DataLoader(batches, batch_size=None, num_workers=workers))) == list(range(N))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda k: hvd.shard_dataset(np.arange(N - 1), hvd.ShardPlan(N, k), 8), "over 203 samples; data holds 202"),
        (lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k + 1), 8), "shards and the job"),
        (lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, shard=k), "shard must be an integer in 0"),
        (
            lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 0),
            "batch_size must be an integer",
        ),
        (lambda k: hvd.shard_dataset(iter([1]), hvd.ShardPlan(1, k), 8), "it is a list_iterator. For a stream"),
        (lambda k: hvd.shard_dataset((np.arange(3), np.arange(4)), hvd.ShardPlan(3, k), 8), r"have \[3, 4\] rows"),
        (lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, shuffle=True), "plan decides on shuffle"),
        (lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, num_workers=2), "num_workers is .* workers"),
        (lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, collate_fn=len), "collate_fn is .* collate"),
        (
            lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, wokers=2),
            "no option wokers. There are data",
        ),
        (
            lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, seed=2),
            "no option seed. Give it to the plan",
        ),
        (
            lambda k: hvd.shard_dataset(records, stream("ordered", k), 8, tail="pad"),
            "no option tail. Give it to the plan",
        ),
        (lambda k: hvd.shard_dataset(np.full(3, "a"), hvd.ShardPlan(3, k), 8), "hold numbers; this array has <U1"),
        (lambda k: hvd.shard_dataset({"x": np.array([None])}, hvd.ShardPlan(1, k), 8), "this array has object"),
        (lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, in_order=False), "leave in_order=False out"),
        (
            lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, prefetch=4),
            "prefetch is 4. Give workers",
        ),
        (
            lambda k: hvd.shard_dataset(np.arange(N), hvd.ShardPlan(N, k), 8, persistent_workers=True),
            "Workers persist, and there are none",
        ),
        (lambda k: hvd.ShardedBatchSampler(k, 8), "plan is a ShardPlan or BalancedPlan"),
        (lambda k: hvd.ShardedIterable(records, k, 8), "stream is a ShardStream"),
        (lambda k: hvd.shard_dataset([1, 2], stream("ordered", k), 8), r"source is a function .* it is \[1, 2\]"),
        (lambda k: hvd.shard_dataset(records, stream("ordered", k + 2), 8), "shards and the job"),
        (lambda k: hvd.shard_dataset(records, stream("ordered", k), 8, epoch=1), "A stream has its epoch in itself"),
        (
            lambda k: hvd.shard_dataset(records, stream("ordered", k), 8, workers=1, persistent_workers=True),
            "Workers of a stream start anew in each pass",
        ),
    ],
)
def test_bad_arguments(size: int, call: Callable[[int], object], message: str) -> None:
    with pytest.raises(hvd.PlanError, match=message):
        call(size)
