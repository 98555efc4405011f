"""ShardPlan: every epoch an exact partition, the same on every machine; keys decide where hashed samples go."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import ShardPlan

POLICIES = ("ordered", "random", "hash")
POWERS = tuple(sorted({2**j + d for j in range(11, 20) for d in (-1, 0, 1)}))  # 4**j + 1 among them


def everyone(plan: ShardPlan, epoch: int = 0) -> list[np.ndarray]:
    return [plan.indices(shard, epoch) for shard in range(plan.shards)]


def assert_partition(plan: ShardPlan, epoch: int) -> None:
    shards = everyone(plan, epoch)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(plan.n))
    for shard, indices in enumerate(shards):
        assert indices.dtype == np.int64
        assert indices.shape == (plan.size(shard, epoch),)
        assert (plan.owner(indices, epoch) == shard).all()


def assert_once(plan: ShardPlan, epoch: int) -> None:
    """The quick half of ``assert_partition``."""
    seen = np.concatenate(everyone(plan, epoch))
    assert len(seen) == plan.n
    assert (np.bincount(seen, minlength=plan.n) == 1).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_every_epoch_is_an_exact_partition_for_all_numbers_up_to_2000(policy: str) -> None:
    for n in range(2001):
        assert_once(ShardPlan(n, 1 + n * 7919 % 3 * (n % 2), policy, seed=n), epoch=n % 3)  # mostly 1, also 2 and 3


@pytest.mark.parametrize("policy", POLICIES)
def test_every_epoch_is_an_exact_partition_around_powers_of_two(policy: str) -> None:
    for n in POWERS:
        assert_once(ShardPlan(n, 3 + n % 5, policy, seed=3), epoch=5)
    assert_partition(ShardPlan(4**8 + 1, 3, policy, seed=3), epoch=5)


@pytest.mark.parametrize("policy", POLICIES)
def test_more_shards_than_samples_is_a_partition_too(policy: str) -> None:
    for n in range(10):
        for shards in (1, 2, 5, 13):
            assert_partition(ShardPlan(n, shards, policy, seed=1), epoch=0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", [0, 1, 65_534, 65_535, 200_001])
def test_as_many_shards_as_there_may_be_are_a_partition_too(policy: str, n: int) -> None:
    plan = ShardPlan(n, 65_535, policy, seed=1)
    owners = plan.owner(np.arange(n), epoch=1)
    assert np.array_equal(np.bincount(owners, minlength=65_535), plan.sizes(epoch=1))
    for shard in (0, 1, 65_534):
        assert sorted(plan.indices(shard, epoch=1)) == np.flatnonzero(owners == shard).tolist()


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 3000),
    shards=st.integers(1, 40),
    policy=st.sampled_from(POLICIES),
    seed=st.integers(0, 2**80),
    epoch=st.integers(0, 2**40),
)
def test_partition_for_any_numbers(n: int, shards: int, policy: str, seed: int, epoch: int) -> None:
    assert_partition(ShardPlan(n, shards, policy, seed=seed), epoch)


@pytest.mark.parametrize("policy", ["ordered", "random"])
@pytest.mark.parametrize(("n", "shards"), [(10, 3), (2, 5), (0, 4), (1000, 7), (64, 64)])
def test_shards_differ_by_one_sample_at_most(policy: str, n: int, shards: int) -> None:
    sizes = [ShardPlan(n, shards, policy).size(s) for s in range(shards)]
    assert max(sizes) - min(sizes) <= 1


def test_ordered_reads_contiguous_intervals_in_order() -> None:
    got = [list(indices) for indices in everyone(ShardPlan(10, 3, "ordered"))]
    assert got == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert got == [list(indices) for indices in everyone(ShardPlan(10, 3, "ordered", seed=9), epoch=4)]


class TestRandom:
    def test_seed_and_epoch_each_give_their_own_order(self) -> None:
        orders = {
            tuple(ShardPlan(500, 1, "random", seed=seed).indices(0, epoch)) for seed in range(8) for epoch in range(8)
        }
        assert len(orders) == 64

    def test_a_step_of_all_ranks_is_the_same_for_every_number_of_ranks(self) -> None:
        n, together = 240, 12
        alone = ShardPlan(n, 1, "random", seed=5).indices(0, epoch=2).reshape(-1, together)
        for shards in (2, 3, 4, 6):
            per_rank = together // shards
            ranks = [s.reshape(-1, per_rank) for s in everyone(ShardPlan(n, shards, "random", seed=5), epoch=2)]
            steps = np.concatenate(ranks, axis=1)  # [steps, together]
            assert np.array_equal(np.sort(steps, axis=1), np.sort(alone, axis=1))

    def test_neighbours_in_the_source_are_strangers_in_the_order(self) -> None:
        n = 10007
        order = ShardPlan(n, 1, "random", seed=1).indices(0)
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.05
        assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.05
        assert (np.abs(np.diff(order)) == 1).sum() < 12  # two expected

    def test_owners_are_found_at_any_size_without_the_order(self) -> None:
        n = 2**61 + 3
        plan = ShardPlan(n, 3, "random", seed=1)
        samples = np.linspace(0, n - 1, 3000).astype(np.int64).clip(0, n - 1)
        shares = np.bincount(plan.owner(samples), minlength=3) / 3000
        assert (np.abs(shares - 1 / 3) < 0.05).all()


class TestWeights:
    @pytest.mark.parametrize("policy", POLICIES)
    def test_sizes_are_in_proportion(self, policy: str) -> None:
        plan = ShardPlan(60_000, 3, policy, weights=[1, 2, 3])
        assert_partition(plan, epoch=1)
        assert np.allclose(plan.sizes(), [10_000, 20_000, 30_000], rtol=0.05 if policy == "hash" else 1e-4)

    def test_equal_weights_are_no_weights(self) -> None:
        assert ShardPlan(10, 2, weights=(2, 2.0)) == ShardPlan(10, 2)

    @given(
        n=st.integers(0, 500),
        weights=st.lists(st.floats(1e-9, 1e9), min_size=1, max_size=9),
        policy=st.sampled_from(POLICIES),
    )
    @settings(max_examples=60, deadline=None)
    def test_any_weights_give_a_partition(self, n: int, weights: list[float], policy: str) -> None:
        assert_partition(ShardPlan(n, len(weights), policy, weights=weights), epoch=0)


class TestLazily:
    @pytest.mark.parametrize("policy", POLICIES)
    @pytest.mark.parametrize("block", [1, 7, 64, 10**6])
    def test_blocks_are_the_indices(self, policy: str, block: int) -> None:
        plan = ShardPlan(300, 3, policy, seed=4)
        blocks = list(plan.blocks(1, epoch=2, block=block))
        assert max(map(len, blocks)) <= block
        assert np.array_equal(np.concatenate(blocks), plan.indices(1, epoch=2))

    @pytest.mark.parametrize("policy", POLICIES)
    def test_a_billion_samples_cost_no_memory(self, policy: str) -> None:
        tracemalloc.start()
        batch = next(ShardPlan(10**9, 8, policy).reader(3, 256))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert batch.count == 256
        assert peak_bytes < 20e6


class TestHash:
    KEYS = tuple(f"document-{i}" for i in range(3000))

    @pytest.mark.parametrize(
        "keys",
        [KEYS, [k.encode() for k in KEYS], list(range(3000)), np.arange(3000, dtype=np.uint16), np.array(KEYS), None],
        ids=["str", "bytes", "int", "uint16 array", "str array", "none"],
    )
    def test_any_kind_of_key_spreads_evenly(self, keys: object) -> None:
        plan = ShardPlan(3000, 3, "hash", keys=keys)
        assert_partition(plan, epoch=0)
        for shard in range(3):
            assert abs(plan.size(shard) - 1000) < 130  # five standard deviations

    def test_a_key_keeps_its_shard_wherever_it_stands(self) -> None:
        here = ShardPlan(3000, 4, "hash", keys=self.KEYS, seed=2)
        there = ShardPlan(100, 4, "hash", keys=self.KEYS[:100][::-1], seed=2)
        assert np.array_equal(here.owner(np.arange(100)), there.owner(np.arange(100))[::-1])

    def test_equal_keys_share_a_shard_in_every_epoch(self) -> None:
        plan = ShardPlan(3000, 5, "hash", keys=[i // 10 for i in range(3000)])
        owners = plan.owner(np.arange(3000).reshape(300, 10), epoch=3)
        assert (owners == owners[:, :1]).all()
        assert np.array_equal(owners, plan.owner(np.arange(3000).reshape(300, 10), epoch=0))

    def test_keys_may_come_from_a_table_or_a_tensor(self) -> None:
        class Column:
            """As a column of pandas, polars or Arrow, or a tensor: no list, but an array at heart."""

            def __init__(self, values: list) -> None:
                self.values = values

            def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
                return np.array(self.values, object if isinstance(self.values[0], str) else None)

        for keys in (["b", "a", "c"], [5, -1, 7]):
            assert ShardPlan(3, 7, "hash", keys=Column(keys)) == ShardPlan(3, 7, "hash", keys=keys)

    def test_large_unsigned_keys_are_the_same_in_a_list(self) -> None:
        keys = [2**64 - 1, 2**63, 5]
        assert ShardPlan(3, 9, "hash", keys=keys) == ShardPlan(3, 9, "hash", keys=np.array(keys, np.uint64))

    def test_integer_keys_are_values_not_types(self) -> None:
        owners = [
            ShardPlan(50, 7, "hash", keys=keys).owner(np.arange(50))
            for keys in (range(50), np.arange(50, dtype=np.uint8), np.arange(50), None)
        ]
        assert all(np.array_equal(owners[0], other) for other in owners)

    def test_seed_gives_another_assignment(self) -> None:
        a, b = (ShardPlan(3000, 2, "hash", keys=self.KEYS, seed=s).owner(np.arange(3000)) for s in (0, 1))
        assert 0.45 < (a == b).mean() < 0.55


class TestPlan:
    def test_is_frozen_and_compares_by_what_it_decides(self) -> None:
        plan = ShardPlan(3, 2, "hash", keys=["a", "b", "c"])
        assert plan == ShardPlan(3, 2, "hash", keys=("a", "b", "c"))
        assert plan != ShardPlan(3, 2, "hash", keys=["a", "b", "d"])
        assert plan != ShardPlan(3, 2, "hash")
        with pytest.raises(dataclasses.FrozenInstanceError):
            plan.n = 4  # type: ignore[misc]

    def test_owner_keeps_the_shape_and_is_int32(self) -> None:
        owners = ShardPlan(24, 5).owner(np.arange(24).reshape(2, 3, 4))
        assert owners.shape == (2, 3, 4)
        assert owners.dtype == np.int32
        assert ShardPlan(0, 5).owner([]).shape == (0,)
