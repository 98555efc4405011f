"""Readers: batches under each tail, delivery apart from fetching, and what ends them."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import pytest

from hvdscale.data import Batch, Reader, ShardPlan, add_sums

POLICIES = ("ordered", "random", "hash")
TAILS = ("exact", "pad", "drop")


def epoch_of(reader: Reader) -> list[Batch]:
    return list(reader.ahead(epochs=1))


def samples(batches: list[Batch]) -> list[int]:
    return [int(i) for batch in batches for i in batch.indices[: batch.count]]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("n", "shards", "batch_size"), [(100, 3, 8), (96, 4, 8), (17, 3, 2), (70_001, 2, 33), (9, 1, 9)]
)
class TestTails:
    def test_exact_reads_the_shard_in_order(self, policy: str, n: int, shards: int, batch_size: int) -> None:
        plan = ShardPlan(n, shards, policy, seed=3)
        for shard in range(shards):
            reader = plan.reader(shard, batch_size, epoch=2)
            batches = epoch_of(reader)
            assert samples(batches) == plan.indices(shard, epoch=2).tolist()
            assert all(len(b) == b.count == batch_size for b in batches[:-1])
            assert len(batches) == reader.steps()
            assert [b.last for b in batches] == [False] * (len(batches) - 1) + [True]

    def test_pad_fills_batches_and_marks_what_fills(self, policy: str, n: int, shards: int, batch_size: int) -> None:
        plan = ShardPlan(n, shards, policy, seed=3, tail="pad")
        lists = [epoch_of(plan.reader(shard, batch_size)) for shard in range(shards)]
        assert len({len(batches) for batches in lists}) == 1
        for shard, batches in enumerate(lists):
            assert all(len(b) == len(b.valid) == batch_size for b in batches)
            read = np.concatenate([b.indices[b.valid] for b in batches])
            assert read.tolist() == plan.indices(shard).tolist()
            assert all(((b.indices >= 0) & (b.indices < n)).all() for b in batches)

    def test_drop_fills_every_batch_and_says_what_it_left_out(
        self, policy: str, n: int, shards: int, batch_size: int
    ) -> None:
        plan = ShardPlan(n, shards, policy, seed=3, tail="drop")
        readers = [plan.reader(shard, batch_size) for shard in range(shards)]
        lists = [epoch_of(reader) for reader in readers]
        assert len({len(batches) for batches in lists}) == 1
        assert all(b.count == batch_size for batches in lists for b in batches)
        read = [i for batches in lists for i in samples(batches)]
        assert sorted(read + [int(i) for r in readers for i in r.dropped()]) == list(range(n))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tail", TAILS)
def test_epochs_follow_each_other_and_each_is_certified(policy: str, tail: str) -> None:
    plan = ShardPlan(101, 3, policy, seed=3, tail=tail)
    readers = [plan.reader(shard, 4) for shard in range(3)]
    for reader in readers:
        for epoch in range(3):
            got = list(itertools.islice(reader, reader.steps(epoch)))
            assert {b.epoch for b in got} == {epoch}
            assert [b.step for b in got] == list(range(len(got)))
            assert reader.epoch == epoch + 1
    for epoch in range(3):
        assert add_sums(reader.certificate(epoch) for reader in readers) == plan.certificate()


def test_a_sample_that_is_lost_repeated_or_replaced_breaks_the_certificate() -> None:
    plan = ShardPlan(1000, 2, seed=1)

    def sums(tamper: object = None) -> int:
        readers = [plan.reader(shard, 10) for shard in range(2)]
        for reader in readers:
            for batch in reader.ahead(epochs=1):
                indices = batch.indices.copy()
                if tamper and (batch.step, reader.shard) == (20, 1):
                    indices = tamper(indices)  # type: ignore[operator]
                reader.deliver(Batch(indices, len(indices), batch.epoch, batch.step, batch.last))
        return add_sums(reader.certificate(0) for reader in readers)

    assert sums() == plan.certificate()
    assert sums(lambda indices: indices[1:]) != plan.certificate()
    assert sums(lambda indices: np.append(indices, indices[0])) != plan.certificate()
    assert sums(lambda indices: np.append(indices[1:], (indices[0] + 1) % 1000)) != plan.certificate()
    swapped = np.array([1, -1] + [0] * 8)  # two wrong samples whose plain sum is right
    assert sums(lambda indices: (indices + swapped) % 1000) != plan.certificate()


def test_what_is_fetched_ahead_is_not_delivered() -> None:
    reader = ShardPlan(100, 2, seed=1).reader(0, 5)
    fetched = list(itertools.islice(reader.ahead(), 7))
    assert (reader.epoch, reader.step) == (0, 0)
    for batch in fetched[:3]:
        reader.deliver(batch)
    assert (reader.epoch, reader.step) == (0, 3)
    assert reader.state_dict()["delivered"] == 15
    assert np.array_equal(next(reader).indices, fetched[3].indices)


def test_a_reader_goes_on_from_its_state() -> None:
    plan = ShardPlan(50, 2, "hash", seed=1, tail="pad")
    reader = plan.reader(1, 4)
    for _ in range(23):
        state = reader.state_dict()
        other = plan.reader(1, 4)
        other.load_state_dict(state)
        one, two = next(reader), next(other)
        assert (one.epoch, one.step, one.count) == (two.epoch, two.step, two.count)
        assert np.array_equal(one.indices, two.indices)
        assert reader.state_dict() == other.state_dict()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("tail", ["exact", "pad"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_samples_than_shards(policy: str, tail: str, n: int) -> None:
    plan = ShardPlan(n, 4, policy, tail=tail)
    seen = defaultdict(list)
    for shard in range(4):
        for batch in itertools.takewhile(lambda b: b.epoch < 2, plan.reader(shard, 2)):
            seen[batch.epoch] += samples([batch])
    assert {epoch: sorted(read) for epoch, read in seen.items()} == ({0: [*range(n)], 1: [*range(n)]} if n else {})
    if tail == "pad" and n:
        assert [plan.reader(shard, 2).steps() for shard in range(4)] == [plan.reader(0, 2).steps()] * 4


@pytest.mark.parametrize("tail", TAILS)
def test_no_samples_is_no_batch(tail: str) -> None:
    assert list(ShardPlan(0, 2, tail=tail).reader(1, 4)) == []
    assert ShardPlan(0, 2).certificate() == 0


def test_a_step_of_all_readers_is_the_same_for_any_number_of_them() -> None:
    def step(shards: int, batch_size: int, number: int) -> set[int]:
        readers = [ShardPlan(240, shards, seed=5).reader(shard, batch_size) for shard in range(shards)]
        return {i for r in readers for i in samples([next(itertools.islice(r.ahead(), number, None))])}

    for number in (0, 3, 11, 25):
        assert step(1, 12, number) == step(2, 6, number) == step(4, 3, number)
