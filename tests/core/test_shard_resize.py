"""Resizing moves what must move, stays even, and can be replayed from the steps alone."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdscale.data import ShardPlan
from hvdscale.data.keys import HashedKeys
from hvdscale.data.units import owner_table
from hvdscale.errors import StateError

UNITS = 1 << 16
GOLDEN = [
    0,
    2,
    4,
    3,
    1,
    2,
    1,
    1,
    3,
    0,
    4,
    3,
    0,
    2,
    3,
    4,
    3,
    1,
    3,
    4,
    2,
    4,
    3,
    3,
]  # even shards of the first keys, frozen as the format is
POLICIES = ("ordered", "random", "hash")
MILLION = 10**6


def units_lacking(before: ShardPlan, after: ShardPlan) -> int:
    """Units of the hash that shards of ``after`` hold more than in ``before``: nothing less can move."""
    have, want = (np.bincount(owner_table(plan.shares), minlength=64) for plan in (before, after))
    return int(np.maximum(want - have, 0).sum())


def moved(before: ShardPlan, after: ShardPlan, epoch: int = 0) -> float:
    """The share of samples whose owner changes, counted one by one."""
    samples = np.arange(before.n)
    return float((before.owner(samples, epoch) != after.owner(samples, epoch)).mean())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_pair_up_to_64_moves_the_least_and_stays_even(policy: str) -> None:
    every, some = range(1, 65), (1, 2, 3, 16, 31, 32, 33, 63, 64)
    for old in every:
        plan = ShardPlan(MILLION, old, policy)
        for new in every if policy == "hash" else some:  # all are cut alike; units are the coarsest
            after, move = plan.resize(new)
            assert move.ideal == pytest.approx(abs(new - old) / max(old, new))
            assert move.fraction <= 1.1 * move.ideal + 1e-12
            if policy == "hash":
                assert move.fraction * UNITS == units_lacking(plan, after), "not one unit more than must"
            else:
                assert after.sizes().max() <= 1.01 * after.sizes().mean()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("old", "new"), [(64, 65), (4, 3), (3, 4), (1, 8), (8, 1), (5, 5)])
def test_the_move_is_what_owners_say(policy: str, old: int, new: int) -> None:
    keys = [f"key {i}" for i in range(20_000)] if policy == "hash" else None
    plan = ShardPlan(20_000, old, policy, seed=2, keys=keys)
    after, move = plan.resize(new)
    assert moved(plan, after) == pytest.approx(move.fraction, abs=1e-12)
    assert move.fraction == pytest.approx(move.ideal, rel=0.1)
    assert sorted(np.concatenate([after.indices(s) for s in range(new)])) == list(range(20_000))


@pytest.mark.parametrize("policy", ["ordered", "random"])
def test_chains_stay_even_at_a_million_samples(policy: str) -> None:
    draw = np.random.default_rng(1)
    plan = ShardPlan(MILLION, 8, policy)
    for new in draw.integers(1, 65, 40).tolist():
        plan, move = plan.resize(new)
        assert move.fraction <= 1.1 * move.ideal + 1e-5
        assert plan.sizes().max() - plan.sizes().min() <= 1
        assert plan.report().skew <= 1.01
    replayed = ShardPlan(MILLION, plan.shards, policy, resized_from=plan.resized_from)  # as resume makes it
    assert replayed == plan
    assert all(np.array_equal(replayed.indices(s), plan.indices(s)) for s in (0, plan.shards - 1))


def test_chains_of_hash_shards_stay_within_three_percent() -> None:
    plan = ShardPlan(MILLION, 8, "hash", keys=np.arange(MILLION))
    for new in [*np.random.default_rng(2).integers(1, 65, 12).tolist(), 64]:
        plan, move = plan.resize(new)
        assert move.fraction <= 1.1 * move.ideal + 1e-3
        assert np.abs(plan.sizes() / plan.sizes().mean() - 1).max() < 0.03


class TestEven:
    """Policy "hash" with ``even=True``."""

    @pytest.mark.parametrize("samples_per_key", [1, 10])
    def test_a_million_samples_move_the_least_and_stay_even(self, samples_per_key: int) -> None:
        keys = HashedKeys.of(np.arange(MILLION) // samples_per_key, 0)
        plan = ShardPlan(MILLION, 64, "hash", keys=keys, even=True)
        for new in [65, 64, 63, 2, 3, 1, 64, *np.random.default_rng(3).integers(1, 65, 20).tolist(), 65]:
            assert plan.report().skew <= 1.01
            plan, move = plan.resize(new)
            assert move.fraction <= 1.1 * move.ideal + 1e-12
        again = ShardPlan(MILLION, plan.shards, "hash", keys=keys, even=True, resized_from=plan.resized_from)
        assert plan == again
        assert np.array_equal(plan.owner(np.arange(0, MILLION, 99)), again.owner(np.arange(0, MILLION, 99)))

    @settings(max_examples=60, deadline=None)
    @given(
        keys=st.lists(st.integers(0, 60), max_size=200),
        chain=st.lists(st.lists(st.floats(0.1, 10), min_size=1, max_size=9), min_size=1, max_size=5),
        weighted=st.booleans(),
    )
    def test_any_chain_is_a_partition_by_key(self, keys: list[int], chain: list[list[float]], weighted: bool) -> None:
        most = max(np.bincount(keys).tolist(), default=0)
        plan = ShardPlan(len(keys), 3, "hash", keys=keys, even=True)
        for weights in chain:
            plan, _ = plan.resize(len(weights), weights if weighted else None)
            assert (plan.sizes() <= plan.report().goals + most).all(), "no key could have gone to an emptier shard"
        assert sorted(np.concatenate([plan.indices(shard) for shard in range(plan.shards)])) == list(range(len(keys)))
        assert np.array_equal(plan.owner(np.arange(len(keys))), plan.owner_of_keys(keys)), "equal keys share a shard"

    def test_a_key_that_is_most_of_the_data_keeps_its_shard_to_itself(self) -> None:
        keys = ["every day"] * 700 + [f"day {i}" for i in range(300)]
        for plan in (
            ShardPlan(1000, 4, "hash", keys=keys, even=True),
            ShardPlan(1000, 9, "hash", keys=keys, even=True),
        ):
            assert np.sort(plan.sizes())[-1] == 700
            assert np.sort(plan.sizes())[-2] <= 1000 / plan.shards

    def test_keys_with_no_sample_yet_go_where_the_hash_alone_puts_them(self) -> None:
        plan, plain = (ShardPlan(1, 7, "hash", keys=["a"], even=even) for even in (True, False))
        others = [f"key {i}" for i in range(500)]
        assert np.array_equal(plan.owner_of_keys(others), plain.owner_of_keys(others))

    def test_a_run_goes_on_over_other_shards(self) -> None:
        keys = [f"document {i // 3}" for i in range(300)]
        plan, _ = ShardPlan(300, 4, "hash", keys=keys, even=True).resize(3)
        readers = [plan.reader(shard, 10) for shard in range(3)]
        read = [i for shard, reader in enumerate(readers) for _ in range(2 + shard) for i in next(reader).indices]
        rest = ShardPlan.resume(json.loads(json.dumps([r.state_dict() for r in readers])), 5, keys=keys)
        assert rest.even
        assert sorted([*read, *(i for shard in range(5) for i in rest.indices(shard))]) == list(range(300))
        assert rest.report(epoch=1).skew <= 1.02
        plain = ShardPlan(300, 3, "hash", keys=keys, resized_from=plan.resized_from)
        with pytest.raises(StateError, match="even"):
            plain.reader(0, 10).load_state_dict(readers[0].state_dict())
        states = [reader.state_dict() for reader in readers]
        for state in states:
            state["plan"]["even"] = "even-v2"
        with pytest.raises(StateError, match="are made as 'even-v1' here; this state's as 'even-v2'"):
            ShardPlan.resume(states, 5, keys=keys)

    def test_the_table_does_not_change(self) -> None:
        plan = ShardPlan(5000, 8, "hash", keys=np.arange(5000) % 1000, seed=2, even=True).resize(5, [1, 2, 3, 4, 5])[0]
        assert plan.sizes().tolist() == [335, 665, 1000, 1335, 1665]
        assert plan.owner_of_keys(np.arange(24)).tolist() == GOLDEN


def test_sizes_by_key_are_within_three_percent_of_the_mean() -> None:
    for keys in (np.arange(MILLION), None):
        sizes = ShardPlan(MILLION, 64, "hash", seed=5, keys=keys).sizes()
        assert np.abs(sizes / sizes.mean() - 1).max() < 0.03


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 300),
    policy=st.sampled_from(POLICIES),
    chain=st.lists(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), min_size=1, max_size=6),
    weighted=st.booleans(),
)
def test_any_chain_is_a_partition_and_agrees_with_its_owners(
    n: int, policy: str, chain: list[list[float]], weighted: bool
) -> None:
    plan = ShardPlan(n, 3, policy, seed=1)
    for weights in chain:
        plan, move = plan.resize(len(weights), weights if weighted else None)
        assert 0 <= move.fraction <= 1
    shards = [plan.indices(shard, epoch=1) for shard in range(plan.shards)]
    assert sorted(np.concatenate(shards)) == list(range(n))
    for shard, samples in enumerate(shards):
        assert (plan.owner(samples, epoch=1) == shard).all()
        assert len(samples) == plan.size(shard, epoch=1)


def test_weights_can_change_alone() -> None:
    plan, move = ShardPlan(1200, 3, "ordered").resize(3, [1, 1, 2])
    assert plan.sizes().tolist() == [300, 300, 600]
    assert (move.fraction, move.ideal) == (pytest.approx(1 / 6), pytest.approx(1 / 6))


def test_ordered_shards_give_up_their_ends() -> None:
    plan, _ = ShardPlan(12, 2, "ordered").resize(3)
    assert [plan.indices(s).tolist() for s in range(3)] == [[0, 1, 2, 3], [6, 7, 8, 9], [4, 5, 10, 11]]


def test_a_resized_plan_remembers_the_steps_it_came_by() -> None:
    one, _ = ShardPlan(50, 2, "hash").resize(3)
    other, _ = ShardPlan(50, 4, "hash").resize(3)
    assert one != other
    assert one == ShardPlan(50, 3, "hash", resized_from=((2, None),))


class TestReport:
    def test_counts_and_prints(self) -> None:
        report = ShardPlan(10, 3, "ordered").report()
        assert (report.n, report.mean, report.empty) == (10, pytest.approx(10 / 3), 0)
        assert report.skew == pytest.approx(1.2)
        lines = str(report).splitlines()
        assert lines[0].startswith("10 samples over 3 shards (ordered): 3 to 4 each, mean 3.3")
        assert lines[1].split() == ["0", "4", "#" * 40]

    def test_weights_are_the_measure(self) -> None:
        assert ShardPlan(400, 2, weights=[1, 3]).report().skew == 1.0

    def test_empty_shards_are_named_and_many_are_cut_short(self) -> None:
        assert "7 shards hold no sample" in str(ShardPlan(3, 10).report())
        assert "84 more shards" in str(ShardPlan(1000, 100).report())
        assert ShardPlan(0, 4).report().skew == 1.0


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("policy", ["ordered", "random", "hash"])
@pytest.mark.parametrize(("large", "small"), [(1.7e308, 1e308), (1e-300, 5e-324), (1.7e308, 5e-324)])
def test_weights_may_be_as_large_and_small_as_floats_go(policy: str, large: float, small: float) -> None:
    plan = ShardPlan(1000, 3, policy, weights=[large, small, large])
    after, move = plan.resize(2, [small, large])
    part = max(small / large, 1e-300)
    scaled, same = ShardPlan(1000, 3, policy, weights=[1.0, part, 1.0]).resize(2, [part, 1.0])
    assert after.sizes().tolist() == scaled.sizes().tolist()
    assert (move.ideal, move.fraction) == (pytest.approx(same.ideal), same.fraction)
    assert "shards" in str(after.report()) + str(move)
