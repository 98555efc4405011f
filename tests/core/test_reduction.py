"""How gradients become one: arguments checked once, buckets cut the same on every rank."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdscale.errors import PlanError
from hvdscale.sync import EveryStep, Reduction


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"op": "max"}, "op must be Average, Sum or Adasum, got 'max'"),
        ({"passes": 0}, "whole number > 0, got 0"),
        ({"passes": 1.5}, "whole number > 0, got 1.5"),
        ({"predivide": 0.0}, "must be > 0, got 0.0"),
        ({"predivide": -2.0}, "must be > 0, got -2.0"),
        ({"predivide": float("nan")}, "must be > 0, got nan"),
        ({"predivide": 2.0, "op": "sum"}, "with op=sum there is none to split"),
        ({"predivide": 2.0, "op": "adasum"}, "with op=adasum there is none to split"),
        ({"groups": 0}, "number of groups > 0"),
        ({"groups": ((0, 1), (1, 2))}, "one group only"),
        ({"groups": ((0, 0),)}, "one group only"),
    ],
    ids=str,
)
def test_what_cannot_be(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        Reduction(**arguments)


@pytest.mark.parametrize(
    ("groups", "positions", "buckets"),
    [
        (None, [0, 1, 2], [[0], [1], [2]]),
        (1, [0, 1, 2], [[0, 1, 2]]),
        (2, [0, 1, 2, 3], [[0, 1], [2, 3]]),
        (2, [0, 1, 2], [[0], [1, 2]]),
        (9, [0, 1], [[0], [1]]),
        (2, [], []),
        (((0, 2), (1,)), [0, 1, 2, 3], [[0, 2], [1], [3]]),
        (((0, 2), (1,)), [2, 3], [[2], [3]]),
        (((2, 0),), [0, 1, 2], [[2, 0], [1]]),
    ],
)
def test_buckets(groups: Any, positions: list[int], buckets: list[list[int]]) -> None:
    assert [b for b in Reduction(groups=groups).buckets(positions) if b] == buckets


@given(count=st.integers(1, 50), positions=st.sets(st.integers(0, 99)))
def test_a_number_of_groups_cuts_evenly_and_loses_nothing(count: int, positions: set[int]) -> None:
    ordered = sorted(positions)
    buckets = [b for b in Reduction(groups=count).buckets(ordered) if b]
    assert [p for bucket in buckets for p in bucket] == ordered
    assert len(buckets) == min(count, len(ordered))
    sizes = {len(bucket) for bucket in buckets}
    assert not sizes or max(sizes) - min(sizes) <= 1


MIB = 1 << 20


@pytest.mark.parametrize(
    ("sizes", "buckets"),
    [
        ([], []),
        ([0], [[0]]),
        ([8, 8, 8], [[2, 1, 0]]),
        ([MIB] * 8, [[7, 6], [5, 4], [3, 2], [1, 0]]),  # a fourth each
        ([MIB, 4, 4 * MIB, 4, 3 * MIB], [[4], [3], [2], [1, 0]]),  # a large one alone
        ([40 * MIB] + [10 * MIB] * 10, [[10, 9], [8, 7], [6, 5], [4, 3], [2, 1], [0]]),  # none above 25 MiB of several
    ],
)
def test_without_groups_neighbours_travel_together_the_last_first(sizes: list[int], buckets: list[list[int]]) -> None:
    positions = list(range(len(sizes)))
    assert Reduction().buckets(positions, sizes) == buckets
    assert Reduction(op="adasum").buckets(positions, sizes) == [[p] for p in positions]


@pytest.mark.parametrize(("predivide", "scales"), [(1.0, (1.0, 1.0)), (4.0, (0.25, 4.0)), (0.5, (2.0, 0.5))])
def test_what_is_divided_before_the_sum_is_given_back_after(predivide: float, scales: tuple[float, float]) -> None:
    assert Reduction(predivide=predivide).scales() == scales


def test_who_updates() -> None:
    assert EveryStep() == EveryStep(update="local")
    with pytest.raises(PlanError, match='takes "local", "central" or "sharded", got \'nowhere\''):
        EveryStep(update="nowhere")
