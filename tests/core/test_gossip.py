"""Promises of gossip: who hears whom, that the mean of all is kept, and that a flush finds it exactly."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import DesyncError, PlanError
from hvdscale.runtime.transport import Transport, run_loopback
from hvdscale.sync import Gossip, LocalSGD, drift_target
from hvdscale.sync.peers import TOPOLOGIES
from hvdscale.sync.push_sum import flows
from tests.core.quadratic import start
from tests.core.trainer import Trainer, on_ranks, train

PEERS = sorted(TOPOLOGIES)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("peers", PEERS)
def test_every_rank_sends_and_receives_once_along_each_way(peers: str, size: int) -> None:
    for number in range(6):
        for way in TOPOLOGIES[peers](number, size, 0):
            assert sorted(way) == list(range(size))


def test_a_ring_hears_both_sides_and_pairs_each_other() -> None:
    assert [list(way) for way in TOPOLOGIES["ring"](5, 4, 0)] == [[1, 2, 3, 0], [3, 0, 1, 2]]
    assert [list(way) for way in TOPOLOGIES["ring"](5, 2, 0)] == [[1, 0]]
    for number in range(20):
        (way,) = TOPOLOGIES["pairs"](number, 7, 3)
        assert (way[way] == np.arange(7)).all()
        assert (way == np.arange(7)).sum() == 1
    partners = {int(TOPOLOGIES["pairs"](number, 4, 3)[0][0]) for number in range(20)}
    assert partners == {1, 2, 3}


def test_exponential_peers_have_all_heard_of_each_other_after_one_turn() -> None:
    heard = np.eye(8)
    for number in range(3):
        (way,) = TOPOLOGIES["exponential"](number, 8, 0)
        heard = (heard + heard[np.argsort(way)]) / 2
    np.testing.assert_allclose(heard, np.full((8, 8), 1 / 8))


@pytest.mark.parametrize("mixing", [1.0, 0.3])
@pytest.mark.parametrize("peers", PEERS)
def test_mass_is_neither_made_nor_lost(peers: str, mixing: float) -> None:
    rng = np.random.default_rng(0)
    for number in range(20):
        mass, trains = rng.uniform(0.1, 2, 6), rng.uniform(size=6) < 0.7
        plan = flows(TOPOLOGIES[peers](number, 6, 0), mass, trains, mixing)
        assert plan.kept.sum() + sum(sent.sum() for sent in plan.sent) == pytest.approx(mass.sum())
        assert (plan.kept >= 0).all()
        for way, sent in zip(plan.permutations, plan.sent, strict=True):
            assert not sent[~trains[way]].any(), "nothing goes to a rank that has finished"
    everyone = flows(TOPOLOGIES[peers](0, 6, 0), np.ones(6), np.ones(6, bool), mixing)
    np.testing.assert_allclose(everyone.masses(), np.ones(6))


@pytest.mark.parametrize("peers", PEERS)
def test_ranks_that_stop_learning_come_to_the_mean_of_all(peers: str) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
        trainer = Trainer(Gossip(1, peers=peers), transport)
        trainer.train(1)
        before = trainer.flat()
        for _ in range(40):
            trainer.rounds.after_step()
        return before, trainer.flat(), trainer.flat(), trainer.rounds.metrics.drift

    results = on_ranks(5, body)
    mean = np.mean([before for before, *_ in results], axis=0)
    for _, after, _, drift in results:
        np.testing.assert_allclose(after, mean, atol=1e-5)
        assert drift < 1e-4
    assert len({drift for *_, drift in results}) == 1, "all ranks say the same"


def test_a_pair_at_every_step_is_gradient_averaging() -> None:
    for peers in PEERS:
        np.testing.assert_allclose(train(Gossip(1, peers=peers), 2), train(LocalSGD(100, warmup=23), 2), atol=1e-6)


@pytest.mark.parametrize("peers", PEERS)
def test_outer_weights_are_the_mean_now_and_ranks_keep_their_own(peers: str) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        trainer = Trainer(Gossip(3, peers=peers, overlap=1), transport)
        trainer.train(10)
        before = trainer.flat()
        shared = np.concatenate([w.ravel() for w in trainer.rounds.outer_weights()])
        return before, trainer.flat(), shared

    results = on_ranks(4, body)
    mean = np.mean([before for before, *_ in results], axis=0)
    for before, after, shared in results:
        np.testing.assert_array_equal(before, after)
        np.testing.assert_allclose(shared, mean, atol=1e-6)
        np.testing.assert_array_equal(shared, results[0][2])


@pytest.mark.parametrize("overlap", [0, 2])
@pytest.mark.parametrize("peers", PEERS)
def test_ranks_that_finish_early_hand_their_mass_on(peers: str, overlap: int) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, int]:
        trainer = Trainer(Gossip(3, peers=peers, overlap=overlap), transport)
        trainer.train((4, 10, 17, 17)[transport.rank])
        trainer.rounds.flush()
        together = trainer.flat()
        trainer.train(2)
        assert trainer.rounds._parts[0].mass == 1.0  # type: ignore[attr-defined]
        return together, trainer.rounds.step

    results = on_ranks(4, body)
    assert [step for _, step in results] == [19] * 4
    assert all(np.array_equal(results[0][0], weights) for weights, _ in results)


def test_a_rank_that_made_no_step_does_not_hold_the_others_back() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray]:
        trainer = Trainer(Gossip(100), transport)
        trainer.rounds.before_step()
        trainer.train(5 * transport.rank)
        own = trainer.flat()
        trainer.rounds.flush()
        return own, trainer.flat()

    (_, first), (own, second) = on_ranks(2, body)
    np.testing.assert_array_equal(first, own)
    np.testing.assert_array_equal(second, own)


def test_a_rank_with_nan_loses_its_mass_and_recovers() -> None:
    def body(transport: Transport) -> tuple[np.ndarray, int]:
        trainer = Trainer(Gossip(2), transport)
        trainer.train(3)
        if transport.rank == 1:
            trainer.arrays["b"][0] = np.nan
        trainer.train(3)
        trainer.rounds.flush()
        return trainer.flat(), trainer.rounds.metrics.not_finite

    results = on_ranks(4, body)
    for weights, not_finite in results:
        assert np.isfinite(weights).all()
        np.testing.assert_array_equal(weights, results[0][0])
        assert not_finite >= 1


@pytest.mark.parametrize(("peers", "messages"), [("ring", 2), ("pairs", 1), ("exponential", 1)])
def test_bytes_do_not_grow_with_the_ranks(peers: str, messages: int) -> None:
    def body(transport: Transport) -> int:
        trainer = Trainer(Gossip(2, peers=peers), transport)
        trainer.train(8)
        return trainer.rounds.bytes_sent - 5 * (transport.size - 1) * 72  # headers, one before the first round

    assert on_ranks(4, body) == on_ranks(6, body)[:4] == [4 * messages * 49 * 4] * 4


def test_a_drift_target_says_the_same_on_every_rank() -> None:
    def body(transport: Transport) -> tuple[int, float]:
        trainer = Trainer(Gossip(drift_target(0.01, first=2), peers="pairs"), transport)
        trainer.train(30)
        return trainer.rounds.metrics.rounds, trainer.rounds.metrics.drift

    results = on_ranks(4, body)
    assert len(set(results)) == 1
    assert 2 <= results[0][0] < 30


@pytest.mark.parametrize("peers", PEERS)
@pytest.mark.parametrize("every", [drift_target(0.05, first=4), 3], ids=["drift", "every"])
def test_resumed_with_weights_on_their_way_it_says_what_it_would_have_said(peers: str, every: Any) -> None:
    plan = Gossip(every, peers=peers, overlap=2, fragments=2)

    def interrupted(transport: Transport, stop: int | None) -> tuple[bytes, dict[str, float]]:
        trainer = Trainer(plan, transport)
        trainer.train(stop or 29)
        if stop:
            saved, resumed = trainer.rounds.state_dict(), Trainer(plan, transport)
            for name, array in trainer.arrays.items():
                resumed.arrays[name][...] = array
            resumed.rounds.load_state_dict(saved)
            trainer = resumed
            trainer.train(29 - stop)
        figures = trainer.rounds.figures()
        return trainer.flat().tobytes(), {name: figures[name] for name in ("rounds", "drift", "distance")}

    whole = on_ranks(3, lambda transport: interrupted(transport, None))
    for stop in (5, 7, 10, 14, 15):
        assert on_ranks(3, lambda transport, stop=stop: interrupted(transport, stop)) == whole


@pytest.mark.parametrize(
    ("plan", "steps", "spoilt"),
    [
        (Gossip(5, fragments=2, peers="exponential", overlap=3), (14, 0, 2), (0, 0)),
        (Gossip(5, fragments=2, peers="ring", merge="mix:0.4", overlap=2), (6, 7, 13), (2, 9)),
        (Gossip(4, fragments=3), (9, 3, 0), (0, 5)),
    ],
    ids=["exponential", "ring", "fragments"],
)
def test_a_flush_mends_a_rank_to_which_the_finished_gave_their_mass(
    plan: Gossip, steps: tuple[int, ...], spoilt: tuple[int, int]
) -> None:
    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(plan, transport)
        trainer.rounds.before_step()
        for step in range(steps[transport.rank]):
            if (transport.rank, step) == spoilt:
                trainer.arrays["b"][0] = np.nan
            trainer.train(1)
        trainer.rounds.flush()
        return trainer.flat()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = on_ranks(3, body)
    for weights in results:
        assert np.isfinite(weights).all()
        np.testing.assert_array_equal(weights, results[0])


def test_all_are_told_where_no_rank_has_finite_weights_any_more() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(Gossip(2), transport)
        trainer.train(1)
        trainer.arrays["b"][0] = np.nan
        trainer.train(5)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        on_ranks(2, body)
    assert len([w for w in caught if "end the job, and go on from its last checkpoint" in str(w.message)]) == 2


def test_a_flush_mends_a_rank_whose_peers_made_no_step() -> None:
    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(Gossip(4), transport)
        trainer.train(2 * (transport.rank == 0))
        if transport.rank == 0:
            trainer.arrays["w"][:] = np.nan
        trainer.rounds.flush()
        return trainer.flat()

    for weights in on_ranks(3, body):
        np.testing.assert_array_equal(weights, start().astype(np.float32))


def test_a_mean_of_nothing_finite_is_refused_and_everyone_is_told_again_after_one_came_back() -> None:
    def body(transport: Transport) -> str:
        trainer = Trainer(Gossip(2), transport)
        trainer.train(1)
        if transport.rank == 1:
            trainer.arrays["b"][0] = np.nan
        trainer.train(3)
        trainer.arrays["b"][0] = np.nan
        trainer.train(4)
        with pytest.raises(PlanError) as refused:
            trainer.rounds.outer_weights()
        return str(refused.value)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        said = on_ranks(2, body)
    assert said == ["No rank's weights are finite: they have no mean. Go on from the job's last checkpoint."] * 2
    assert sum("end the job" in str(w.message) for w in caught) == 2


def test_a_state_of_before_rounds_under_way_were_kept_loads() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(Gossip(2), transport)
        trainer.train(5)
        state = trainer.rounds.state_dict()
        for numbers in state["parts"]:
            del numbers["heard"]
        trainer.rounds.load_state_dict(state)
        trainer.train(3)

    on_ranks(2, body)


def test_a_rank_that_asks_for_the_mean_while_others_train_is_told_so() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(Gossip(2), transport)
        trainer.train(2)
        if transport.rank == 1:
            trainer.rounds.outer_weights()
        trainer.train(2)

    results = run_loopback(3, body)
    assert all(isinstance(result, DesyncError) for result in results), results
    assert "rank 1: round 0 of fragment 0, asking" in str(results[0])


def test_ranks_at_different_rounds_are_told_so() -> None:
    results = run_loopback(3, lambda t: Trainer(Gossip(2 + (t.rank == 2), fragments=2), t).train(3))
    assert all(isinstance(result, DesyncError) for result in results)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"peers": "star"}, "peers is one of 'ring', 'pairs', 'exponential'; it is 'star'"),
        ({"seed": -1}, "seed must be a whole number from 0"),
        ({"wire": "int8"}, "Gossip sends weights"),
        ({"groups": "node"}, "Gossip has peers instead of groups"),
        ({"every": 0}, "every must be a whole number of steps from 1; it is 0"),
    ],
)
def test_a_gossip_that_cannot_be(arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        Gossip(**arguments)
