"""ShardPlan: every epoch an exact partition, the same on every machine; keys decide where hashed samples go."""

import dataclasses
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import ShardPlan, split
from hvdscale.errors import PlanError

POLICIES = ("ordered", "random", "hash")
SIZES = (0, 1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 100, 1000, 4097, 65536, 65537, 262145)


def everyone(plan: ShardPlan, epoch: int = 0) -> list[np.ndarray]:
    return [plan.indices(shard, epoch) for shard in range(plan.shards)]


def assert_partition(plan: ShardPlan, epoch: int) -> None:
    shards = everyone(plan, epoch)
    assert np.array_equal(np.sort(np.concatenate(shards)), np.arange(plan.n))
    for shard, indices in enumerate(shards):
        assert indices.dtype == np.int64
        assert indices.shape == (plan.size(shard, epoch),)
        assert (plan.owner(indices, epoch) == shard).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("n", SIZES)
def test_every_epoch_is_an_exact_partition(policy: str, n: int) -> None:
    for shards in (1, 2, 3, 7):
        for epoch in (0, 1, 5):
            assert_partition(ShardPlan(n, shards, policy, seed=3), epoch)


@settings(max_examples=150, deadline=None)
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

    @pytest.mark.parametrize(("n", "orders"), [(2, 2), (3, 6), (4, 24)])
    def test_every_order_is_about_as_likely(self, n: int, orders: int) -> None:
        draws = 400 * orders
        counts = Counter(tuple(ShardPlan(n, 1, seed=seed).indices(0)) for seed in range(draws))
        assert len(counts) == orders
        expected = draws / orders
        chi_squared = sum((c - expected) ** 2 / expected for c in counts.values())
        assert chi_squared < (orders - 1) + 5 * (2 * (orders - 1)) ** 0.5

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

    def test_another_process_decides_the_same(self) -> None:
        code = (
            "from hvdscale.data import ShardPlan, split\n"
            "keys = [f'k{i}' for i in range(200)]\n"
            "print([ShardPlan(200, 3, 'random', seed=7).indices(1, 4).tolist(),\n"
            "       ShardPlan(200, 3, 'hash', seed=7, keys=keys).indices(1).tolist(),\n"
            "       split(keys, (0.8, 0.2))[1].tolist()])"
        )
        there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        keys = [f"k{i}" for i in range(200)]
        here = [
            ShardPlan(200, 3, "random", seed=7).indices(1, 4).tolist(),
            ShardPlan(200, 3, "hash", seed=7, keys=keys).indices(1).tolist(),
            split(keys, (0.8, 0.2))[1].tolist(),
        ]
        assert there.strip() == str(here)

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: ShardPlan(-1, 2), r"n, the number of samples, must be an integer in 0\..*; it is -1"),
            (lambda: ShardPlan(2.5, 2), r"it is 2\.5"),
            (lambda: ShardPlan(10, 0), r"shards must be an integer in 1\..*; it is 0"),
            (lambda: ShardPlan(10, True), "it is True"),
            (lambda: ShardPlan(10, 2, "sorted"), "'ordered', 'random', 'hash'; it is 'sorted'"),
            (lambda: ShardPlan(10, 2, seed=-1), "seed must be an integer from 0; it is -1"),
            (lambda: ShardPlan(2, 2, keys=["a", "b"]), 'Only policy "hash" uses keys; the policy is "random"'),
            (lambda: ShardPlan(3, 2, "hash", keys=["a"]), "there are 3 samples and 1 keys"),
            (lambda: ShardPlan(2, 2, "hash", keys=["a", b"a"]), "these mix bytes and strings"),
            (lambda: ShardPlan(2, 2, "hash", keys=[1, 2.5]), r"key 1 is 2\.5 \(float\)"),
            (lambda: ShardPlan(2, 2, "hash", keys=[1, 2**70]), "1180591620717411303424 does not"),
            (lambda: ShardPlan(2, 2, "hash", keys=np.zeros((2, 2), int)), r"shape \(2, 2\)"),
            (lambda: ShardPlan(10, 2).indices(2), r"shard must be an integer in 0\.\.1; it is 2"),
            (lambda: ShardPlan(10, 2).indices(0, -1), "epoch must be an integer from 0; it is -1"),
            (lambda: ShardPlan(10, 2).owner([3, 10]), r"0\.\.9; these go from 3 to 10"),
            (lambda: ShardPlan(10, 2).owner([0.5]), "these are float64"),
        ],
    )
    def test_what_cannot_be_is_refused_with_the_values(self, make: object, message: str) -> None:
        with pytest.raises(PlanError, match=message):
            make()  # type: ignore[operator]


class TestSplit:
    KEYS = tuple(f"file-{i}.txt" for i in range(5000))

    def test_parts_are_a_partition_in_proportion(self) -> None:
        parts = split(self.KEYS, (0.8, 0.15, 0.05))
        assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(5000))
        for part, share in zip(parts, (0.8, 0.15, 0.05), strict=True):
            assert abs(len(part) / 5000 - share) < 0.03
            assert (np.diff(part) > 0).all()

    def test_a_key_stays_in_its_part_as_the_data_grows(self) -> None:
        small = {self.KEYS[i] for i in split(self.KEYS[:700], (0.9, 0.1))[1]}
        large = {self.KEYS[i] for i in split(self.KEYS, (0.9, 0.1))[1]}
        assert small == large & set(self.KEYS[:700])

    def test_no_group_is_on_two_sides(self) -> None:
        groups = np.repeat(np.arange(400), 5)
        train, held_out = split(groups, (0.5, 0.5))
        assert not set(groups[train]) & set(groups[held_out])

    def test_another_salt_is_another_split_and_none_follows_the_shards(self) -> None:
        one, two = (set(split(self.KEYS, (0.5, 0.5), salt=s)[1]) for s in ("a", "b"))
        assert 0.45 < len(one & two) / len(one) < 0.55
        owners = ShardPlan(5000, 2, "hash", keys=self.KEYS).owner(sorted(one))
        assert 0.45 < owners.mean() < 0.55

    @pytest.mark.parametrize("whole", [(1.0, 0.0), (1.0,)])
    def test_a_whole_part_takes_everything(self, whole: tuple[float, ...]) -> None:
        assert len(split(self.KEYS, whole)[0]) == 5000

    @pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (1.2, -0.2), (float("nan"), 1.0)])
    def test_fractions_that_are_no_parts_of_one_are_refused(self, fractions: tuple[float, ...]) -> None:
        with pytest.raises(PlanError, match="sum to 1; these are"):
            split(self.KEYS, fractions)
