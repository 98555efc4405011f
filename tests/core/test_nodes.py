"""Promises of rounds inside nodes: who shares one, what they agree on, and what goes between nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdscale.errors import DesyncError, PlanError
from hvdscale.runtime.transport import Transport, run_loopback
from hvdscale.sync import DiLoCo, LocalSGD, Relaxed, constant, drift_target
from hvdscale.sync.nodes import find_nodes
from tests.core.quadratic import start
from tests.core.trainer import HostedChannel, Trainer, on_ranks, train


@pytest.mark.parametrize(
    ("groups", "ranks", "found"),
    [
        ("node", 5, ((0, 1), (2, 3), (4,))),
        (((3, 0), (1, 2)), 4, ((0, 3), (1, 2))),
        (((0, 1, 2),), 3, ((0, 1, 2),)),
    ],
)
def test_nodes_are_the_hosts_or_what_the_plan_says(groups: Any, ranks: int, found: Any) -> None:
    for rank, nodes in enumerate(on_ranks(ranks, lambda transport: find_nodes(groups, HostedChannel(transport)))):
        assert nodes.groups == found
        assert nodes.mine == next(group for group in found if rank in group)
    assert on_ranks(2, lambda transport: find_nodes("world", HostedChannel(transport))) == [None, None]


@pytest.mark.parametrize("groups", [((0, 1),), ((0, 1), (2, 4)), ((0,), (1,), (2,), (3,))])
def test_groups_that_are_not_the_ranks_are_refused_on_every_rank(groups: Any) -> None:
    results = run_loopback(3, lambda transport: Trainer(LocalSGD(2, groups=groups), transport))
    assert all(isinstance(result, PlanError) for result in results)
    assert "the ranks that train are [0, 1, 2]" in str(results[0])
    assert len({str(result) for result in results}) == 1


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"groups": "host"}, 'groups is "world", "node"'),
        ({"groups": ((0, 1), (1, 2))}, "each rank once"),
        ({"groups": ((0, True),)}, "each rank once"),
        ({"groups": ()}, "each rank once"),
        ({"groups": [[0, 1]]}, "a tuple of tuples"),
        ({"groups": "node", "across": 0}, "across must be a whole number from 1; it is 0"),
        ({"groups": "node", "across": 2.0}, "across must be a whole number from 1; it is 2.0"),
        ({"across": 4}, 'groups="world" has none'),
        ({"groups": "node", "across": 2, "overlap": 8}, "overlap < every, but overlap is 8 and every is 8"),
        ({"every": drift_target(0.1, 4), "groups": "node", "overlap": 4}, "overlap is 4 and every is 4"),
    ],
)
def test_a_plan_of_nodes_that_cannot_be(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        LocalSGD(**{"every": 4, **arguments})


IDENTITIES: list[tuple[str, Relaxed, Relaxed]] = [
    ("all in one node", LocalSGD(3, groups=((0, 1, 2, 3),), across=4), LocalSGD(3)),
    ("each a node", DiLoCo(2, groups=((0,), (1,), (2,), (3,)), across=3), DiLoCo(6)),
    ("nodes that meet with all each time", DiLoCo(3, groups="node", across=1), DiLoCo(3)),
    ("with a schedule", LocalSGD(constant(4), groups="node", across=2), LocalSGD(4, groups="node", across=2)),
    ("hosts as groups", LocalSGD(2, groups="node", across=3), LocalSGD(2, groups=((0, 1), (2, 3)), across=3)),
]


@pytest.mark.parametrize(("one", "other"), [row[1:] for row in IDENTITIES], ids=[row[0] for row in IDENTITIES])
def test_identity(one: Relaxed, other: Relaxed) -> None:
    for flush in (True, False):
        np.testing.assert_allclose(
            train(one, ranks=4, momentum=0.9, flush=flush), train(other, ranks=4, momentum=0.9, flush=flush), atol=1e-6
        )


def test_ranks_of_a_node_hold_the_same_after_its_round_and_nodes_differ() -> None:
    weights = train(LocalSGD(5, groups="node", across=8), ranks=4, steps=10, flush=False)
    assert np.array_equal(weights[0], weights[1])
    assert np.array_equal(weights[2], weights[3])
    assert np.abs(weights[0] - weights[2]).max() > 1e-3


def test_one_rank_of_each_node_speaks_between_nodes() -> None:
    def body(transport: Transport) -> int:
        trainer = Trainer(LocalSGD(2, groups="node", across=3, wire="int8"), transport)
        trainer.train(6)
        between = trainer.rounds._roads.between  # type: ignore[union-attr]
        assert trainer.rounds.metrics.node_rounds == 3
        assert trainer.rounds.metrics.rounds == 1
        return 0 if between is None else between.sent_bytes

    first, second, third, fourth = on_ranks(4, body)
    assert second == fourth == 0
    assert first == third == 2 * 260 + 7 * 4  # matrices as int8, each half there and back; the vector of 7 in fp32


@pytest.mark.parametrize("overlap", [0, 3])
def test_ranks_that_finish_early_are_waited_for_in_their_node_and_beyond(overlap: int) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, int]:
        trainer = Trainer(DiLoCo(2, groups="node", across=2, overlap=overlap), transport)
        trainer.train((5, 9, 6, 16)[transport.rank])
        trainer.rounds.flush()
        together = trainer.flat()
        trainer.train(3)
        return together, trainer.rounds.step

    results = on_ranks(4, body)
    assert [step for _, step in results] == [19] * 4
    assert all(np.array_equal(results[0][0], weights) for weights, _ in results)


def test_samples_weigh_inside_a_node_and_between_nodes() -> None:
    """Ranks move by 0, 1, 2, 3 over 1, 3, 2, 2 samples: the mean is (0 + 3 + 4 + 6) / 8, as without nodes."""

    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(LocalSGD(1, groups="node", across=1), transport)
        trainer.rounds.before_step()
        for array in trainer.arrays.values():
            array += transport.rank
        trainer.rounds.tell(loss=0.0, samples=(1, 3, 2, 2)[transport.rank])
        trainer.rounds.after_step()
        return trainer.flat()

    for weights in on_ranks(4, body):
        np.testing.assert_allclose(weights, start() + 13 / 8, rtol=1e-6)


def test_a_whole_node_with_nan_takes_what_the_others_agree_on() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, int]:
        trainer = Trainer(LocalSGD(2, groups="node", across=2), transport)
        trainer.train(1)
        if transport.rank < 2:
            trainer.arrays["w"][:] = np.nan
        trainer.train(3)
        return trainer.flat(), trainer.rounds.metrics.not_finite

    results = on_ranks(4, body)
    assert all(np.isfinite(weights).all() for weights, _ in results)
    assert all(np.array_equal(results[0][0], weights) for weights, _ in results)
    assert all(not_finite >= 2 for _, not_finite in results)


def test_ranks_of_a_node_at_different_rounds_are_told_so() -> None:
    def body(transport: Transport) -> None:
        Trainer(LocalSGD(2 + transport.rank % 2, fragments=2, groups="node"), transport).train(3)

    for result in run_loopback(4, body):
        assert isinstance(result, DesyncError)
    assert "rank 2: round 0 of fragment 0, training, after 1 steps\n  rank 3" in str(result)


def test_a_drift_target_listens_to_rounds_of_all_ranks() -> None:
    """Periods inside a node stay until all ranks have met; then every rank goes on with the same new one."""

    def body(transport: Transport) -> list[int]:
        trainer = Trainer(LocalSGD(drift_target(1e-9, first=4), groups="node", across=2), transport)
        rounds = []
        for _ in range(16):
            before = trainer.rounds.metrics.node_rounds
            trainer.train(1)
            if trainer.rounds.metrics.node_rounds > before:
                rounds.append(trainer.rounds.step)
        return rounds

    assert on_ranks(4, body) == [[4, 8, 10, 12, 13, 14, 15, 16]] * 4
