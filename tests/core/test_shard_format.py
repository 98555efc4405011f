"""The format shard-v1 is frozen: decisions equal their golden vectors, and a build that decides otherwise says so."""

import json
from pathlib import Path

import pytest

from hvdscale.data import ShardPlan
from hvdscale.data.format import FORMAT, fingerprint, vectors
from hvdscale.errors import StateError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / f"{FORMAT}.json").read_text())


def test_there_is_a_golden_vector_for_every_decision() -> None:
    assert vectors().keys() == GOLDEN["vectors"].keys()
    assert fingerprint() == GOLDEN["fingerprint"]


@pytest.mark.parametrize("name", GOLDEN["vectors"])
def test_decisions_are_those_of_the_format(name: str) -> None:
    assert vectors()[name] == GOLDEN["vectors"][name]


@pytest.mark.parametrize("case", GOLDEN["plans"], ids=lambda case: case["plan"]["policy"])
def test_plans_are_those_of_the_format(case: dict) -> None:
    plan, _ = ShardPlan(**case["plan"]).resize(*case["resize"])
    assert [plan.indices(shard, epoch=3).tolist() for shard in range(plan.shards)] == case["indices"]


def test_a_state_that_was_saved_long_ago_still_means_the_same() -> None:
    case = GOLDEN["resumed"]
    plan = ShardPlan.resume(case["states"], case["shards"])
    assert plan.first_epoch == case["epoch"]
    assert [plan.indices(shard, case["epoch"]).tolist() for shard in range(plan.shards)] == case["indices"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": "shard-v2"}, "'shard-v1'; this one is 'shard-v2'"), ({"fingerprint": "0"}, "its fingerprint is '0'")],
)
def test_a_state_of_another_format_is_refused(change: dict, message: str) -> None:
    states = [{**state, **change} for state in GOLDEN["resumed"]["states"]]
    with pytest.raises(StateError, match=message):
        ShardPlan.resume(states, 2)
