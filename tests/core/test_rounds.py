"""Promises of the rounds, on ranks in one process: every plan follows the float64 oracle, and its identities hold."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import DesyncError, PlanError, StateError
from hvdscale.runtime.transport import SoloTransport, Transport, run_loopback
from hvdscale.sync import DiLoCo, Gossip, LocalSGD, Relaxed, SlowMo
from hvdscale.sync.peers import TOPOLOGIES
from hvdscale.update import DelayedNesterov, Nesterov, SlowMomentum
from tests.core.numpy_store import NumPyTensors
from tests.core.quadratic import FRAGMENTS, Quadratic, start
from tests.core.trainer import LR, Trainer, on_ranks, train
from tests.relaxed_oracle import Momentum, trajectory

NODES = {"nodes": ((0, 1), (2,))}  # of three ranks, two a host


def matrix(peers: str, ranks: int = 3, seed: int = 0) -> Callable[[int], np.ndarray]:
    """What rank i takes of rank j in a round."""

    def of_round(number: int) -> np.ndarray:
        ways = [np.arange(ranks), *TOPOLOGIES[peers](number, ranks, seed)]
        return np.sum([np.eye(ranks)[way].T / len(ways) for way in ways], axis=0)

    return of_round


NESTEROV = ("nesterov", 0.7, 0.9)
PLANS: list[tuple[Relaxed, dict[str, Any]]] = [
    (LocalSGD(1), {"every": 1}),
    (LocalSGD(4), {"every": 4}),
    (LocalSGD(5, warmup=6), {"every": 5, "warmup": 6}),
    (LocalSGD(4, merge="mix:0.3"), {"every": 4, "mixing": 0.3}),
    (LocalSGD(4, fragments=3), {"every": 4, "fragments": 3}),
    (LocalSGD(4, overlap=2), {"every": 4, "overlap": 2}),
    (LocalSGD(6, fragments=2, overlap=2), {"every": 6, "fragments": 2, "overlap": 2}),
    (LocalSGD(6, fragments=2, overlap=2, merge="mix"), {"every": 6, "fragments": 2, "overlap": 2, "mixing": 0.5}),
    (DiLoCo(4), {"every": 4, "outer": NESTEROV}),
    (DiLoCo(4, fragments=2), {"every": 4, "outer": NESTEROV, "fragments": 2}),
    (DiLoCo(5, fragments=3, overlap=3), {"every": 5, "outer": NESTEROV, "fragments": 3, "overlap": 3}),
    (LocalSGD(4, outer=Nesterov(0.5, 0.3)), {"every": 4, "outer": ("nesterov", 0.5, 0.3)}),
    (SlowMo(4, lr=0.8, momentum=0.6), {"every": 4, "outer": ("slow", 0.8, 0.6)}),
    (SlowMo(3, warmup=4), {"every": 3, "outer": ("slow", 1.0, 0.5), "warmup": 4}),
    (LocalSGD(4, state="average"), {"every": 4, "average_moments": True}),
    (LocalSGD(3, groups="node", across=3), {"every": 3, "across": 3, **NODES}),
    (
        DiLoCo(2, groups="node", across=4, overlap=3),
        {"every": 2, "across": 4, "outer": NESTEROV, "overlap": 3, **NODES},
    ),
    (
        LocalSGD(4, groups="node", across=2, fragments=2, merge="mix", warmup=2),
        {"every": 4, "across": 2, "fragments": 2, "mixing": 0.5, "warmup": 2, **NODES},
    ),
    (Gossip(), {"every": 1, "matrix": matrix("ring")}),
    (Gossip(3, peers="pairs"), {"every": 3, "matrix": matrix("pairs")}),
    (Gossip(2, peers="exponential", warmup=4), {"every": 2, "matrix": matrix("exponential"), "warmup": 4}),
    (
        Gossip(3, peers="pairs", fragments=2, overlap=2, merge="mix"),
        {"every": 3, "fragments": 2, "overlap": 2, "mixing": 0.5, "matrix": matrix("pairs")},
    ),
]


@pytest.mark.parametrize("flush", [True, False], ids=["flushed", "as it is"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("plan", "settings"), PLANS, ids=[repr(plan)[:90] for plan, _ in PLANS])
def test_every_plan_follows_the_oracle(plan: Relaxed, settings: dict[str, Any], momentum: float, flush: bool) -> None:
    settings = dict(settings)
    pieces, gradients = FRAGMENTS[settings.pop("fragments", 1)], [Quadratic.of(rank).gradient for rank in range(3)]
    every, inner = settings.pop("every"), lambda: Momentum(LR, momentum)
    expected = trajectory(gradients, start(), pieces, 23, every, inner, flush=flush, **settings)
    np.testing.assert_allclose(train(plan, momentum=momentum, flush=flush), expected, atol=2e-6)


IDENTITIES = [
    ("a round every step is gradient averaging", LocalSGD(1), LocalSGD(100, warmup=23), 0.0),
    ("so it is with averaged momentum", LocalSGD(1, state="average"), LocalSGD(100, warmup=23), 0.9),
    ("DiLoCo with lr 1 and no momentum is local SGD", DiLoCo(4, outer_lr=1, outer_momentum=0), LocalSGD(4), 0.9),
    ("SlowMo without momentum is local SGD", SlowMo(4, momentum=0), LocalSGD(4), 0.9),
    ("mixing all the way is adopting", LocalSGD(4, merge="mix:1"), LocalSGD(4), 0.9),
]


@pytest.mark.parametrize(("one", "other", "momentum"), [row[1:] for row in IDENTITIES], ids=[r[0] for r in IDENTITIES])
def test_identity(one: Relaxed, other: Relaxed, momentum: float) -> None:
    np.testing.assert_allclose(train(one, momentum=momentum), train(other, momentum=momentum), atol=1e-6)


@pytest.mark.parametrize("plan", [plan for plan, _ in PLANS], ids=lambda plan: repr(plan)[:90])
def test_after_a_flush_every_rank_holds_the_same_bits(plan: Relaxed) -> None:
    weights = train(plan, ranks=4, momentum=0.9)
    assert all(np.array_equal(weights[0], theirs) for theirs in weights)


def test_a_second_flush_sends_headers_only() -> None:
    def body(transport: Transport) -> tuple[int, bool, np.ndarray, np.ndarray]:
        trainer = Trainer(DiLoCo(4), transport)
        trainer.train(6)
        trainer.rounds.flush()
        weights, sent = trainer.flat(), trainer.rounds.bytes_sent
        changed = trainer.rounds.flush()
        return trainer.rounds.bytes_sent - sent, changed, weights, trainer.flat()

    for sent, changed, before, after in on_ranks(3, body):
        assert not changed
        assert sent == 2 * 2 * 72  # two headers to two peers
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("steps", [(10, 13, 22), (22, 0, 1)], ids=str)
@pytest.mark.parametrize("overlap", [0, 2])
def test_ranks_that_finish_early_are_waited_for(overlap: int, steps: tuple[int, ...]) -> None:
    """The mean at each round counts those that trained since, by their steps; one may have made none at all."""

    def body(transport: Transport) -> tuple[np.ndarray, int, int]:
        trainer = Trainer(LocalSGD(4, overlap=overlap), transport)
        trainer.train(steps[transport.rank])
        trainer.rounds.flush()
        trainer.train(4)  # and training goes on together
        return trainer.flat(), trainer.rounds.step, trainer.rounds.metrics.rounds

    results = on_ranks(3, body)
    assert [step for _, step, _ in results] == [26, 26, 26]
    assert len({rounds for _, _, rounds in results}) == 1
    if not overlap:
        assert all(np.array_equal(results[0][0], weights) for weights, _, _ in results)


def test_samples_weigh() -> None:
    """A rank that read three times the samples counts three times."""

    def body(transport: Transport) -> tuple[np.ndarray, float]:
        trainer = Trainer(LocalSGD(100), transport)
        trainer.rounds.before_step()
        for array in trainer.arrays.values():
            array += transport.rank
        trainer.rounds.tell(loss=4.0 * transport.rank, samples=16 + 32 * transport.rank)
        trainer.rounds.after_step()
        trainer.rounds.flush()
        return trainer.flat(), trainer.rounds.metrics.loss

    for weights, loss in on_ranks(2, body):
        np.testing.assert_allclose(weights, start() + 0.75, rtol=1e-6)
        assert loss == 3.0


def test_a_step_of_no_samples_does_not_count() -> None:
    """A rank whose batch was empty takes what the others agree on."""

    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(LocalSGD(100), transport)
        trainer.rounds.before_step()
        for array in trainer.arrays.values():
            array += transport.rank
        trainer.rounds.tell(loss=float("nan"), samples=8 * transport.rank)
        trainer.rounds.after_step()
        trainer.rounds.flush()
        return trainer.flat()

    for weights in on_ranks(2, body):
        np.testing.assert_allclose(weights, start() + 1, rtol=1e-6)


@pytest.mark.parametrize("samples", [-1, float("nan"), float("inf")])
def test_samples_that_cannot_be_are_refused(samples: float) -> None:
    with pytest.raises(PlanError, match=rf"0 or more, not {samples}"):
        Trainer(LocalSGD(4), SoloTransport()).rounds.tell(1.0, samples)


def test_complex_weights_are_refused() -> None:
    with pytest.raises(PlanError, match="LocalSGD sends real numbers, as Horovod does, and w is complex64"):
        Trainer(LocalSGD(4), SoloTransport(), dtype=np.complex64)


@pytest.mark.parametrize(
    "plan",
    [
        LocalSGD(3),
        LocalSGD(3, overlap=1),
        LocalSGD(4, state="average"),
        DiLoCo(6, fragments=3, overlap=2),  # a NaN in one fragment reaches the others at the next step
        LocalSGD(4, fragments=2, state="average"),
        LocalSGD(2, groups="node", across=2),
    ],
    ids=str,
)
def test_a_rank_with_nan_does_not_vote_and_recovers_with_its_moments(plan: Relaxed) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, int, int]:
        trainer = Trainer(plan, transport, momentum=0.5)
        for _ in range(3):  # the second time nobody is told
            trainer.train(plan.every - 1)
            if transport.rank == 1:
                trainer.arrays["b"][0] = np.nan
            trainer.train(plan.every + 1)
        assert all(np.isfinite(velocity).all() for velocity in trainer.velocity.values())
        trainer.rounds.flush()
        return trainer.flat(), trainer.rounds.metrics.not_finite, trainer.rounds.anew

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = on_ranks(4, body)
    assert [str(w.message).split(" brought")[0] for w in caught] == ["Rank 1"]
    for rank, (weights, not_finite, anew) in enumerate(results):
        assert np.isfinite(weights).all()
        np.testing.assert_array_equal(weights, results[0][0])
        assert not_finite >= 3 or (rank > 1 and plan.groups == "node")
        assert (anew > 0) == (rank == 1 and plan.state == "keep")


@pytest.mark.parametrize(
    "plan", [DiLoCo(2), LocalSGD(2, overlap=1), LocalSGD(2, fragments=2), LocalSGD(2, state="average")], ids=str
)
def test_when_no_rank_is_finite_all_go_back_to_the_last_round(plan: Relaxed) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray]:
        trainer = Trainer(plan, transport, momentum=0.5)
        trainer.train(1)
        for array in trainer.arrays.values():
            array.flat[0] = np.inf
        for velocity in trainer.velocity.values():
            velocity[:] = np.nan
        trainer.rounds.flush()
        shared = np.concatenate([w.ravel() for w in trainer.rounds.outer_weights()])
        assert all(not velocity.any() for velocity in trainer.velocity.values())
        return shared, trainer.flat()

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = on_ranks(2, body)
    assert sum("the weights of the last round, because no rank had others" in str(w.message) for w in caught) == 2
    for shared, weights in results:
        if plan.fragments == 1:  # of two, one met before
            np.testing.assert_array_equal(shared, start().astype(np.float32))
        np.testing.assert_array_equal(weights, shared)
        np.testing.assert_array_equal(weights, results[0][1])
        assert np.isfinite(weights).all()


@pytest.mark.parametrize(
    "plan", [LocalSGD(3), DiLoCo(4, overlap=2), LocalSGD(2, groups="node", across=2), Gossip(2)], ids=str
)
@pytest.mark.parametrize("joins", [False, True], ids=["trains", "has no data"])
def test_ranks_that_begin_with_different_weights_are_told_so(plan: Relaxed, joins: bool) -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(plan, transport)
        trainer.arrays["v"] += transport.rank == 2
        trainer.train(0 if joins and transport.rank == 2 else 9)
        trainer.rounds.flush()

    results = run_loopback(4, body)
    assert all(isinstance(result, DesyncError) for result in results), results
    assert "different weights: those of rank 2 are not those of rank 0" in str(results[0])
    assert len({str(result) for result in results}) == 1


@pytest.mark.parametrize("plan", [LocalSGD(3), LocalSGD(2, groups="node", across=2), Gossip(2)], ids=str)
def test_a_rank_that_did_not_load_its_state_is_told_so(plan: Relaxed) -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(plan, transport)
        trainer.train(9)
        state, resumed = trainer.rounds.state_dict(), Trainer(plan, transport)
        if transport.rank != 1:
            resumed.rounds.load_state_dict(state)
        resumed.train(1)

    results = run_loopback(4, body)
    assert all(isinstance(result, DesyncError) for result in results), results
    assert "rank 1: round 0 of fragment 0, starting, after 0 steps" in str(results[0])


def test_a_start_that_was_refused_stays_refused() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(LocalSGD(3), transport)
        trainer.arrays["v"] += transport.rank
        for _ in range(2):
            with pytest.raises(DesyncError, match="different weights"):
                trainer.train(1)

    on_ranks(2, body)


def test_of_fragments_that_land_together_one_with_nan_does_not_undo_another() -> None:
    """Fragments 1 and 2 leave after step 2 and land after step 3; every rank learns 1 a step."""

    def body(transport: Transport) -> np.ndarray:
        trainer = Trainer(LocalSGD(2, fragments=3, overlap=1), transport)
        trainer.rounds.before_step()
        for spoils in ("", "b", "v"):  # fragment 1 as it leaves, and 2 as it lands
            for name, array in trainer.arrays.items():
                array += np.nan if transport.rank == 1 and name == spoils else 1
            trainer.rounds.after_step()
        return trainer.arrays["v"].ravel()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = on_ranks(3, body)
    for rank, weights in enumerate(results):
        learnt = 2 if rank == 1 else 3  # the step that was lost
        np.testing.assert_allclose(weights, start()[37:] + learnt, atol=1e-5)


@pytest.mark.parametrize("everywhere", [False, True])
def test_buffers_that_are_not_finite_do_not_touch_the_vote(everywhere: bool) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray, int]:
        trainer = Trainer(LocalSGD(3), transport)
        buffer = np.full(4, np.inf if everywhere or transport.rank == 1 else 1 + transport.rank, np.float32)
        trainer.rounds._store.buffers = NumPyTensors({"scale": buffer})
        trainer.train(7)
        trainer.rounds.flush()
        return trainer.flat(), buffer, trainer.rounds.metrics.not_finite

    expected = train(LocalSGD(3), ranks=3, steps=7)
    for (weights, buffer, not_finite), theirs in zip(on_ranks(3, body), expected, strict=True):
        np.testing.assert_allclose(weights, theirs, atol=1e-6)
        np.testing.assert_array_equal(buffer, np.full(4, np.inf if everywhere else 2))
        assert not_finite == 0


def test_a_loss_that_is_not_finite_anywhere_is_shown() -> None:
    def body(transport: Transport) -> float:
        trainer = Trainer(LocalSGD(2), transport)
        for step in range(4):
            trainer.rounds.tell(1.0 if step < 2 else float("nan"))
            trainer.train(1)
        return trainer.rounds.metrics.loss

    assert on_ranks(2, body) == [float("inf")] * 2


def test_last_bits_that_a_warm_up_left_apart_are_none_of_a_difference() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(LocalSGD(2), transport)
        trainer.arrays["v"] *= np.float32(1 + 1e-7 * transport.rank)
        trainer.train(4)

    on_ranks(3, body)


def test_weights_that_a_warm_up_spoilt_are_no_beginning() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(LocalSGD(2, warmup=2), transport)
        trainer.arrays["v"] *= np.nan if transport.rank == 1 else 1
        trainer.train(6)

    results = run_loopback(2, body)
    assert all(isinstance(result, PlanError) for result in results), results
    assert "Weights are not finite before the first round, on rank 0, 1" in str(results[0])


@pytest.mark.parametrize("fragments", [1, 2, 3])
def test_the_last_loss_that_was_told_stays(fragments: int) -> None:
    def body(transport: Transport) -> float:
        trainer = Trainer(LocalSGD(4, fragments=fragments), transport)
        for step in range(8):
            trainer.rounds.tell(float(step + transport.rank))
            trainer.train(1)
        trainer.rounds.flush()
        return trainer.rounds.metrics.loss

    assert on_ranks(2, body) == [np.mean(np.arange(8)[-(4 // fragments) :]) + 0.5] * 2


def test_ranks_at_different_rounds_are_told_so() -> None:
    def body(transport: Transport) -> None:
        trainer = Trainer(LocalSGD(2 + transport.rank, fragments=2), transport)
        trainer.train(4)

    results = run_loopback(2, body)
    assert all(isinstance(result, DesyncError) for result in results)
    assert "rank 0: round 0 of fragment 0, training, after 1 steps" in str(results[0])
    assert len({str(result) for result in results}) == 1


def test_weights_kept_in_half_precision_do_not_pull_the_anchor() -> None:
    """A rank that learns nothing says nothing: what rounding to float16 lost is not taken for learning."""

    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        trainer = Trainer(DiLoCo(2, outer_momentum=0), transport, dtype=np.float16)
        trainer.train(2)
        before = np.concatenate([w.ravel() for w in trainer.rounds.outer_weights()])
        for _ in range(20):
            trainer.rounds.after_step()  # a step that moved nothing
        return before, np.concatenate([w.ravel() for w in trainer.rounds.outer_weights()]), trainer.flat()

    for before, after, weights in on_ranks(2, body):
        np.testing.assert_allclose(after, before, atol=1e-7)
        assert np.abs(after - weights).max() > 1e-5, "the anchor has more bits than the weights"


@pytest.mark.parametrize("stop", [3, 6, 7, 9, 16])
@pytest.mark.parametrize("plan", [plan for plan, _ in PLANS], ids=lambda plan: repr(plan)[:90])
def test_killed_at_any_step_and_resumed_is_bit_equal_to_uninterrupted(plan: Relaxed, stop: int) -> None:
    def interrupted(transport: Transport) -> np.ndarray:
        trainer = Trainer(plan, transport, 0.9)
        trainer.train(stop)
        saved = trainer.rounds.state_dict()
        numbers = json.dumps({name: value for name, value in saved.items() if name != "arrays"})
        resumed = Trainer(plan, transport, 0.9)
        for name, array in trainer.arrays.items():
            resumed.arrays[name][...] = array
            resumed.velocity[name][...] = trainer.velocity[name]
        resumed.rounds.load_state_dict({**json.loads(numbers), "arrays": saved["arrays"]})
        resumed.train(23 - stop)
        return resumed.flat()

    np.testing.assert_array_equal(np.stack(on_ranks(2, interrupted)), train(plan, 2, momentum=0.9, flush=False))


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda state: {**state, "rank": 1}, "its rank is 1, here it is 0"),
        (lambda state: {**state, "format": "x"}, "its format is 'x'"),
        (lambda state: {**state, "plan": {**state["plan"], "every": "9"}}, "plan is 'every=9', here it is 'every=4'"),
        (lambda state: {**state, "tensors": state["tensors"][1:]}, r"tensors is \['b', \[7\], 'float32'\], here"),
        (lambda state: {**state, "arrays": {}}, "array '0.anchor' of shape \\(49,\\); it is not there"),
        (lambda state: {n: v for n, v in state.items() if n not in ("step", "parts")}, "lacks step, parts"),
        (lambda state: {**state, "tensors": state["tensors"][:1]}, "its number of tensors is 1, here it is 3"),
        (lambda state: {**state, "parts": []}, "damaged .IndexError"),
        (lambda state: {**state, "calendar": {}}, "damaged .KeyError: 'due'"),
        (lambda state: {**state, "metrics": {}}, "damaged .KeyError: 'bytes_sent'"),
        (lambda state: None, "damaged .AttributeError"),
    ],
    ids=["rank", "format", "plan", "tensors", "arrays", "parts", "count", "list", "calendar", "metrics", "nothing"],
)
def test_the_state_of_other_rounds_is_refused(change: Callable[[Any], Any], rule: str) -> None:
    trainer = Trainer(LocalSGD(4), SoloTransport())
    trainer.train(5)
    with pytest.raises(StateError, match=rule):
        trainer.rounds.load_state_dict(change(trainer.rounds.state_dict()))


def test_a_schedule_may_be_a_table_as_long_as_training() -> None:
    table = [2] * 11
    told = [LocalSGD(lambda step: table[step]).facts()["every"] for _ in range(2)]
    assert told[0] == told[1]
    assert told[0] != LocalSGD(lambda step: 3 if step == 10 else table[step]).facts()["every"]
    with pytest.raises(PlanError, match=r"every\(100000\) must be a whole number of steps from 1; it is 0"):
        LocalSGD(lambda step: 2 if step < 100000 else 0).facts()


@pytest.mark.parametrize("made", [Nesterov, DelayedNesterov, SlowMomentum])
@pytest.mark.parametrize("lr", [0, 0.0, -0.5, np.nan])
def test_an_outer_learning_rate_that_moves_nothing_is_refused(made: Callable[..., Any], lr: float) -> None:
    with pytest.raises(PlanError, match=f"learning rate must be a number above 0; it is {lr!r}"):
        made(lr=lr)
