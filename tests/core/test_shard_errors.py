"""What cannot be is refused where it is made, with the rule and the values."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hvdscale.data import ShardPlan, Table, add_sums, split
from hvdscale.errors import PlanError, StateError


class Endless(Sequence[int]):
    """More keys than any memory holds."""

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: Any) -> Any:
        return index


PLANS: list[tuple[Callable[[], Any], str]] = [
    (lambda: ShardPlan(-1, 2), r"n, the number of samples, must be an integer in 0\..*; it is -1"),
    (lambda: ShardPlan(2**62 + 1, 2), r"n, .* it is 4611686018427387905"),
    (lambda: ShardPlan(2.5, 2), r"it is 2\.5"),
    (lambda: ShardPlan(10, 0), r"shards must be an integer in 1\..*; it is 0"),
    (lambda: ShardPlan(10**6, 65536), r"shards must be an integer in 1\.\.65535; it is 65536"),
    (lambda: ShardPlan(10, True), "it is True"),
    (lambda: ShardPlan(10, 2, "sorted"), "'ordered', 'random', 'hash'; it is 'sorted'"),
    (lambda: ShardPlan(10, 2, tail="cut"), "'exact', 'pad', 'drop'; it is 'cut'"),
    (lambda: ShardPlan(10, 2, seed=-1), "seed must be an integer from 0; it is -1"),
    (lambda: ShardPlan(10**5000, 2), r"n, the number of samples, .*; it has 16,610 bits"),
    (lambda: ShardPlan(10, 2, seed=10**5000), "seed must be an integer from 0; it has 16,610 bits"),
    (lambda: split([1], [1], 10**5000), "salt without its sign must be an integer"),
    (lambda: split([1, 2], [1e308, 1e308]), "sum to 1; these are .*, sum inf"),
    (lambda: ShardPlan(10, 2).owner(range(2**62)), r"Samples .* at most 68,719,476,736; range\(0, 4611.*\) are 4,611"),
    (lambda: split(range(0, -(2**70), -1), (0.5, 0.5)), r"Keys lie in memory together.*Give them in parts"),
    (lambda: ShardPlan(10, 2, weights=[1.0, 0.0]), "that of shard 1 is 0"),
    (lambda: ShardPlan(10, 2, weights=[-3, 1]), "that of shard 0 is -3"),
    (lambda: ShardPlan(10, 2, weights=[float("nan"), 1]), "that of shard 0 is nan"),
    (lambda: ShardPlan(10, 2, weights=[float("inf"), 1]), "that of shard 0 is inf"),
    (lambda: ShardPlan(10, 2, weights=[1, 1, 1]), "there are 2 shards, 3 weights"),
    (lambda: ShardPlan(10, 2, weights=["a", 1]), r"they are \['a', 1\]"),
    (lambda: ShardPlan(10, 2, weights="12"), "they are '12'"),
    (lambda: ShardPlan(10, 2, weights=b"12"), "they are b'12'"),
    (lambda: ShardPlan(10, 2, weights={2.0, 1.0}), r"in the order of shards; they are \{1\.0, 2\.0\}"),
    (lambda: ShardPlan(10, 2, weights=dict.fromkeys([1, 2]).keys()), r"they are dict_keys"),
    (lambda: ShardPlan(10, 2, weights=["1", "2"]), r"they are \['1', '2'\]"),
    (lambda: ShardPlan(10, 2, weights=[True, 2]), r"they are \[True, 2\]"),
    (lambda: split([1], [1], True), "salt is a str or an integer; it is True"),
    (lambda: ShardPlan(10, 2, weights=[10**400, 1]), r"they are \[10000"),
    (lambda: ShardPlan(10, 2, weights=itertools.count(1)), "there are 2 shards, 3 weights"),
    (lambda: ShardPlan(10, 2, resized_from=3), "Shares are pairs of shards and weights; these are 3"),
    (lambda: ShardPlan(10, 2, resized_from=((0, None),)), r"shards must be an integer in 1\.\.65535; it is 0"),
    (lambda: ShardPlan(10, 2, interrupted=(7,)), "An interrupted epoch is a Interruption; it is 7"),
    (lambda: ShardPlan(10, 2, np.array(["hash", "x"])), "'hash'; it is array"),
    (lambda: ShardPlan(2, 2, unique_keys=True), 'unique_keys is for policy "hash" with keys; there are none'),
    (lambda: ShardPlan(2, 2, "hash", keys=[1, 1], unique_keys="no"), "unique_keys is True or False; it is 'no'"),
    (lambda: ShardPlan(2, 2, "hash", keys=[1, 1], even=1), "even is True or False; it is 1"),
    (lambda: ShardPlan(2, 2, "hash", even=True), 'even is for policy "hash" with keys'),
    (lambda: ShardPlan(10, 2, tail="pad").reader(0, 10**15), r"batch_size is 10+, and the largest shard holds 5"),
    (lambda: ShardPlan(10, 2, tail="pad").reader(0, 2**62 + 1), r"batch_size must be an integer in 1\.\.4611"),
    (lambda: ShardPlan(10, 2).reader(0, 4).deliver("one"), "batch is a Batch; it is 'one'"),
    (lambda: ShardPlan(2**62, 2, "hash", keys=range(2**62)), r"Keys lie in memory .* are 4,611,"),
    (lambda: ShardPlan(2**62, 2, "hash", keys=Endless()), "9,223,372,036,854,775,808 bytes for 4,611,"),
    (lambda: ShardPlan(2, 2, "hash", keys=np.ma.array([1, 2], mask=[0, 1])), "Keys must all be there; 1 of"),
    (lambda: add_sums([1, -1]), "Each sum must be an integer from 0; it is -1"),
    (lambda: Table([1, 2], 3), "collate is a function; it is 3"),
    (lambda: ShardPlan(10, 2).resize(0), r"shards must be an integer in 1\.\.65535; it is 0"),
    (lambda: ShardPlan(10, 2).resize(3, [1, 2]), "there are 3 shards, 2 weights"),
    (lambda: ShardPlan(2, 2, keys=["a", "b"]), 'Only policy "hash" uses keys; the policy is "random"'),
    (lambda: ShardPlan(3, 2, "hash", keys=["a"]), "there are 3 samples and 1 keys"),
    (lambda: ShardPlan(2, 2, "hash", keys=["a", b"a"]), "these mix bytes and strings"),
    (lambda: ShardPlan(20_000, 2, "hash", keys=["a"] * 19_999 + [3]), "these mix integers and strings"),
    (lambda: ShardPlan(2, 2, "hash", keys=[1, 2.5]), r"key 1 is 2\.5 \(float\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=[1, float("nan")]), r"key 1 is nan \(float\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=np.array([0.0, np.nan])), "key 0 is .*float64"),
    (lambda: ShardPlan(2, 2, "hash", keys=["a", None]), r"key 1 is None \(NoneType\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=[[1], [2]]), r"key 0 is \[1\] \(list\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=[1, 2**70]), "1180591620717411303424 does not"),
    (lambda: ShardPlan(2, 2, "hash", keys=[1, 10**5000]), "in 64 bits; an integer of 16,610 bits does not"),
    (lambda: ShardPlan(2, 2, "hash", keys=["a", ["x" * 999]]), r"key 1 is \['x{75}\.\.\. \(list\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=[-1, 2**63]), "9223372036854775808 does not, or not beside others"),
    (lambda: ShardPlan(2, 2, "hash", keys="ab"), r"one per sample, .* these are a str. Give list\(keys\)"),
    (lambda: ShardPlan(2, 2, "hash", keys={"a", "b"}), "these are a set"),
    (lambda: ShardPlan(2, 2, "hash", keys=bytearray(b"ab")), "these are a bytearray"),
    (lambda: ShardPlan(2, 2, "hash", keys=dict.fromkeys("ab")), "these are a dict"),
    (lambda: ShardPlan(2, 2, "hash", keys=map(str, range(2))), "these are a map"),
    (lambda: ShardPlan(1, 2, "hash", keys=5), "these are a int"),
    (lambda: ShardPlan(2, 2, "hash", keys=np.array(["a", None], object)), r"key 1 is None \(NoneType\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=np.array(["2020-01-01", "NaT"], "M8[D]")), r"\(datetime64\)"),
    (lambda: ShardPlan(2, 2, "hash", keys=np.zeros((2, 2), int)), r"shape \(2, 2\)"),
    (
        lambda: ShardPlan(4, 2, "hash", keys=["a", "b", "c", "b"], unique_keys=True),
        "1 repeat an earlier one: keys 1 and 3 are both 'b'",
    ),
    (lambda: ShardPlan(10, 2).indices(2), r"shard must be an integer in 0\.\.1; it is 2"),
    (lambda: ShardPlan(10, 2).indices(0, -1), "epoch must be an integer from 0; it is -1"),
    (lambda: ShardPlan(10, 2).owner([3, 10]), r"0\.\.9; these go from 3 to 10"),
    (lambda: ShardPlan(10, 2).owner([0.5]), "these are float64"),
    (lambda: ShardPlan(10, 2).owner([[1], [2, 3]]), r"these lists are of unequal length: \[\[1\], \[2, 3\]\]"),
    (lambda: ShardPlan(10, 2).owner_of_keys(["a"]), 'Only policy "hash" places keys; the policy is "random"'),
    (lambda: ShardPlan(10, 2).reader(0, 0), r"batch_size must be an integer in 1\.\..*; it is 0"),
    (lambda: ShardPlan(10, 2).reader(2, 1), r"shard must be an integer in 0\.\.1; it is 2"),
    (lambda: ShardPlan(10, 3, tail="drop").reader(0, 4), "batch_size is 4, and shard 1 of 3 holds 3 samples"),
]


@pytest.mark.parametrize(("make", "message"), PLANS)
def test_a_plan_that_cannot_be(make: Callable[[], object], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        make()


def states(plan: ShardPlan, batches: int = 2) -> list[dict[str, Any]]:
    readers = [plan.reader(shard, 3) for shard in range(plan.shards)]
    for reader in readers:
        list(itertools.islice(reader, batches))
    return json.loads(json.dumps([reader.state_dict() for reader in readers]))


PLAN = ShardPlan(40, 3, seed=1)


def changed(**fields: object) -> list[dict[str, Any]]:
    first, *others = states(PLAN)
    return [{**first, **fields}, *others]


def without(name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in state.items() if k != name} for state in states(PLAN)]


def of_plan(**fields: object) -> list[dict[str, Any]]:
    return [{**state, "plan": {**state["plan"], **fields}} for state in states(PLAN)]


READ_IN_PART = {"epoch": 0, "certificate": None, "legs": [{"shares": [[3, None]], "delivered": [1, 1, 1]}]}

RESUMES: list[tuple[Callable[[], list[Any]], str]] = [
    (lambda: [], "there are none"),
    (lambda: None, "as a list; this is 'None'"),
    (lambda: states(PLAN)[0], "as a list; this is \"{'format': 'shard-v1'"),
    (lambda: json.dumps(states(PLAN)), "as a list; this is '.{80}'"),
    (lambda: ["a state"], "this is 'a state'"),
    (lambda: states(PLAN)[:2], r"each of the 3 shards; there are 2 states, none of shards \[2\]"),
    (lambda: states(PLAN)[:2] * 2, r"there are 4 states, none of shards \[2\], several of shards \[0, 1\]"),
    (lambda: [*states(PLAN)[:2], states(ShardPlan(40, 3, seed=2))[2]], r"seed differs: .* has 1, state 2's 2"),
    (lambda: [*states(PLAN)[:2], states(ShardPlan(41, 3, seed=1))[2]], r"n differs: .* has 40, state 2's 41"),
    (lambda: [*states(PLAN)[:2], states(ShardPlan(40, 4, seed=1))[2]], r"shares differs: .*3.*4"),
    (lambda: [*states(PLAN)[:2], states(ShardPlan(40, 3, "ordered", seed=1))[2]], "policy differs"),
    (lambda: changed(format="shard-v0"), "'shard-v1'; this one is 'shard-v0'"),
    (lambda: changed(fingerprint="deadbeef"), "its fingerprint is 'deadbeef'"),
    (lambda: without("epoch"), "damaged: 'epoch' is missing"),
    (lambda: changed(step="two"), "step must be an integer from 0; it is 'two'"),
    (lambda: changed(delivered=-3), "delivered must be an integer from 0; it is -3"),
    (lambda: changed(delivered=99), "holds 14 samples in epoch 0, of which 2 batches of 3 are 6, .* says 99 were"),
    (lambda: changed(delivered=3), "shard 0 holds 14 .*, of which 2 batches of 3 are 6, and its state says 3 were"),
    (lambda: changed(step=1), "of which 1 batches of 3 are 3, and its state says 6"),
    (lambda: changed(batch_size=4), "of which 2 batches of 4 are 8, and its state says 6"),
    (lambda: changed(step=0), "of which 0 batches of 3 are 0, and its state says 6"),
    (lambda: changed(step=9, delivered=14), "14 samples in epoch 0, which are 5 batches of 3 under tail 'exact', .* 9"),
    (lambda: changed(batch_size=10**30), "batch_size must be an integer in 1"),
    (lambda: changed(sums={"0": "no number"}), "damaged"),
    (lambda: changed(sums=None), "damaged"),
    (lambda: changed(sums={"-1": "0"}), "epoch of a sum must be an integer from 0; it is -1"),
    (lambda: of_plan(interrupted=[READ_IN_PART] * 2), r"interrupted once, by all its legs; these are \[0, 0\]"),
    (lambda: changed(plan=None), "plan is no table"),
    (lambda: of_plan(policy="shuffled"), "it is 'shuffled'"),
    (lambda: of_plan(shares=[]), "it has no shards"),
    (lambda: of_plan(shares=[[3, [1, 2]]]), "there are 3 shards, 2 weights"),
    (lambda: of_plan(interrupted=[{"epoch": 0}]), "'legs' is missing"),
    (lambda: of_plan(interrupted=[{"epoch": 0, "certificate": None, "legs": []}]), "an interrupted epoch has no legs"),
    (lambda: changed(epoch=10**15), r"lie at most 4096 apart; these go from 0 to 1000000000000000"),
    (lambda: changed(format=np.zeros(2)), "this one is array"),
    (lambda: np.array(states(PLAN)), "as a list; this is"),
    (
        lambda: of_plan(
            interrupted=[{"epoch": 0, "certificate": "0", "legs": [{"shares": [[3, None]], "delivered": [1]}]}]
        ),
        "a leg of 3 shards has 1 counts",
    ),
    (lambda: contradicting("pad", 6), "of which 5 batches of 4 are 17, and its state says 6"),
    (lambda: contradicting("drop", 17), "17 samples .*, which are 4 batches of 4 under tail 'drop', .* says 5 were"),
]


def contradicting(tail: str, delivered: int) -> list[dict[str, Any]]:
    """Two shards of 17 samples; that of the first had delivered so many in five batches of four."""
    readers = [ShardPlan(34, 2, tail=tail).reader(shard, 4) for shard in range(2)]
    return [{**reader.state_dict(), "step": 5, "delivered": delivered} for reader in readers]


@pytest.mark.parametrize(("make", "message"), RESUMES)
def test_states_that_do_not_fit(make: Callable[[], list[Any]], message: str) -> None:
    with pytest.raises(StateError, match=message):
        ShardPlan.resume(make(), 2)


@pytest.mark.parametrize(
    ("saved", "keys", "message"),
    [
        (list("abcdef"), None, "the saved plan had keys. Pass keys="),
        (list("abcdef"), list("abcdeg"), "The keys are not those of the saved plan: digest"),
        (None, list("abcdef"), "the saved plan had no keys. Leave out keys="),
    ],
)
def test_other_keys_than_those_of_the_saved_plan(saved: list[str] | None, keys: list[str] | None, message: str) -> None:
    left = states(ShardPlan(6, 2, "hash", keys=saved))
    with pytest.raises(StateError, match=message):
        ShardPlan.resume(left, 2, keys=keys)


@pytest.mark.parametrize(
    ("plan", "shard", "batch_size", "message"),
    [
        (ShardPlan(40, 3, seed=2), 0, 3, "seed differs: This reader's plan has 2, the state's 1"),
        (ShardPlan(40, 4, seed=1), 0, 3, "shares differs"),
        (PLAN, 1, 3, "its own shard; that is 1, the state's 0"),
        (PLAN, 0, 4, "its own batch_size; that is 4, the state's 3"),
    ],
)
def test_a_reader_loads_only_its_own_state(plan: ShardPlan, shard: int, batch_size: int, message: str) -> None:
    with pytest.raises(StateError, match=message):
        plan.reader(shard, batch_size).load_state_dict(states(PLAN)[0])


def test_a_reader_loads_no_state_that_contradicts_itself() -> None:
    for fields, message in (({"step": 1}, "1 batches of 3 are 3"), ({"step": 9, "delivered": 27}, "are 5 batches of")):
        with pytest.raises(StateError, match=message):
            PLAN.reader(0, 3).load_state_dict(changed(**fields)[0])


def test_a_range_is_as_good_as_its_numbers() -> None:
    for keys in (range(7), range(9, -9, -3), range(2**63 - 2, 2**63 + 2), range(0)):
        plan = ShardPlan(len(keys), 3, "hash", keys=keys)
        same = ShardPlan(len(keys), 3, "hash", keys=list(keys))
        assert [plan.indices(shard).tolist() for shard in range(3)] == [same.indices(i).tolist() for i in range(3)]
        assert plan.owner_of_keys(keys).tolist() == plan.owner_of_keys(list(keys)).tolist()


def test_batches_are_delivered_in_order() -> None:
    reader = PLAN.reader(0, 3)
    first, second = itertools.islice(reader.ahead(), 2)
    with pytest.raises(PlanError, match=r"the next is step 0 of epoch 0; this is step 1 of epoch 0"):
        reader.deliver(second)
    reader.deliver(first)
    with pytest.raises(PlanError, match="the next is step 1"):
        reader.deliver(first)
