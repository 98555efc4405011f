"""Training with rounds equals the float64 oracle on a small network, whatever the plan and the inner optimizer.

Mostly to 5e-6: so two adapters, or two backends, are within 1e-5 of each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest

from hvdscale.sync import DiLoCo, Gossip, LocalSGD, Relaxed, SlowMo, drift_target, qsr
from hvdscale.sync.peers import TOPOLOGIES
from tests.contract.driver import TRACES, ContractDriver, crossed
from tests.contract.oracle import Weights, batches, gradients, initial_weights
from tests.relaxed_oracle import Adam, Momentum, trajectory

STEPS = 13
PLACES = (0, 15, 20, 25, 26)  # where the oracle's W1, b1, W2, b2 begin and end in one flat vector
FRAGMENTS = {1: [slice(0, 26)], 2: [slice(0, 15), slice(15, 26)]}
INNER: dict[str, Any] = {"sgd": Momentum, "momentum": lambda: Momentum(mu=0.9), "adam": Adam}
ALL = tuple(INNER)
# Absolute and relative. Adam divides by the root of what may be nearly nothing.
TOLERANCE = {"sgd": 5e-6, "momentum": 5e-6, "adam": 1e-5}
NESTEROV = ("nesterov", 0.7, 0.9)


PLACED = ((0, 2), (1, 3))  # nodes, of four ranks


@dataclass(frozen=True)
class Case:
    name: str
    plan: Relaxed
    settings: dict[str, Any] = field(default_factory=dict)  # the oracle's, as far as they differ from its defaults
    inner: tuple[str, ...] = ("momentum",)


def in_nodes(plan: Relaxed, size: int) -> Relaxed:
    """The plan with its groups cut down to ``size`` ranks: nodes of one each, where there are two."""
    if plan.groups != PLACED:
        return plan
    groups = tuple(tuple(rank for rank in group if rank < size) for group in PLACED)
    return replace(plan, groups=tuple(group for group in groups if group))


def halving(step: int) -> float:
    """A learning rate for ``qsr``: periods of 2 steps, then of 9."""
    return 0.1 if step < 4 else 0.05


def shrinking(step: int) -> int:
    """What a drift target far too small makes of periods of 4 steps: 4, 2, 1, 1 ..."""
    return max(1, 4 >> (step + 1) // 3)


CASES = [
    Case("local SGD", LocalSGD(4), inner=ALL),
    Case("every step", LocalSGD(1), inner=ALL),
    Case("warm-up", LocalSGD(4, warmup=5), {"warmup": 5}, inner=ALL),
    Case("elastic averaging", LocalSGD(4, merge="mix:0.3"), {"mixing": 0.3}, inner=ALL),
    Case("DiLoCo", DiLoCo(4), {"outer": NESTEROV}, inner=ALL),
    Case("SlowMo", SlowMo(4, lr=0.8, momentum=0.6), {"outer": ("slow", 0.8, 0.6)}, inner=ALL),
    Case("overlap", LocalSGD(4, overlap=2), {"overlap": 2}, inner=ALL),
    Case("streaming DiLoCo", DiLoCo(5, fragments=2, overlap=2), {"outer": NESTEROV, "overlap": 2}, inner=ALL),
    Case("averaged moments", LocalSGD(4, state="average"), {"average_moments": True}, inner=ALL),
    Case("quadratic rule", LocalSGD(qsr(halving, 2, 0.15))),
    Case("drift target", LocalSGD(drift_target(1e-9, first=4)), {"every": shrinking}),
    Case("nodes", DiLoCo(2, groups=PLACED, across=2), {"outer": NESTEROV, "across": 2}),
    Case("nodes, overlapped", LocalSGD(2, groups=PLACED, across=3, overlap=3), {"across": 3, "overlap": 3}),
    Case("one host", LocalSGD(3, groups="node", across=2), {"across": 2}),
    Case("ring", Gossip()),
    Case("pairs, overlapped", Gossip(3, peers="pairs", seed=5, overlap=2), {"overlap": 2}),
]


def flat(weights: Weights) -> np.ndarray:
    return np.concatenate([w.ravel() for w in weights])


def nested(vector: np.ndarray) -> Weights:
    shapes = [w.shape for w in initial_weights()]
    return [vector[a:b].reshape(s) for a, b, s in zip(PLACES, PLACES[1:], shapes, strict=False)]


def expected(case: Case, kind: str, ranks: int, flush: bool) -> np.ndarray:
    """[ranks, 26]"""
    data = [batches(STEPS, rank) for rank in range(ranks)]
    functions = [lambda x, step, own=own: flat(gradients(nested(x), own[step])) for own in data]
    settings = {"every": case.plan.every, **case.settings}
    if case.plan.groups != "world":
        groups = in_nodes(case.plan, ranks).groups
        settings["nodes"] = [range(ranks)] if groups == "node" else groups
    if isinstance(case.plan, Gossip):
        topology, seed = TOPOLOGIES[case.plan.peers], case.plan.seed
        ways = lambda number: [np.arange(ranks), *topology(number, ranks, seed)]  # noqa: E731
        settings["matrix"] = lambda number: np.mean([np.eye(ranks)[way].T for way in ways(number)], axis=0)
    pieces, every = FRAGMENTS[case.plan.fragments], settings.pop("every")
    return trajectory(functions, flat(initial_weights()), pieces, STEPS, every, INNER[kind], flush=flush, **settings)


# Where trainings trace graphs, each plan with one of its inner optimizers, in turn, and the first plan with all: a
# round sees weights and moments alone. PyTorch shows every plan with every one.
FOLLOWED = [
    pytest.param(case, kind, id=f"{case.name}-{kind}")
    for number, case in enumerate(CASES)
    for kind in (case.inner if number == 0 or not TRACES else case.inner[number % len(case.inner) :][:1])
]


@pytest.mark.parametrize(("case", "kind"), FOLLOWED)
def test_follows_the_oracle(driver: ContractDriver, rank: int, size: int, case: Case, kind: str) -> None:
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer(kind, model), model, sync=in_nodes(case.plan, size))
    driver.train(model, optimizer, batches(STEPS, rank))
    near = TOLERANCE[kind]
    before = expected(case, kind, size, flush=False)
    np.testing.assert_allclose(flat(driver.weights(model)), before[rank], near, near, err_msg="before the flush")
    optimizer.sync.flush()
    after = expected(case, kind, size, flush=True)
    np.testing.assert_allclose(flat(driver.weights(model)), after[rank], near, near, err_msg="after the flush")
    everyone = driver.everyones(flat(driver.weights(model)))
    assert (everyone == everyone[0]).all(), "ranks hold different weights after a flush"


@pytest.mark.parametrize("wire", ["fp16", "bf16", "int8", "int4", "topk:0.5"])
def test_a_narrow_wire_ends_near_the_wide_one(driver: ContractDriver, rank: int, size: int, wire: str) -> None:
    ends = []
    for plan in (DiLoCo(3), DiLoCo(3, wire=wire)):
        model = driver.model(initial_weights())
        optimizer = driver.distribute(driver.optimizer("sgd", model), model, sync=plan)
        driver.train(model, optimizer, batches(STEPS, rank))
        optimizer.sync.flush()
        ends.append(flat(driver.weights(model)))
    moved = np.abs(ends[0] - flat(initial_weights())).max()
    assert np.abs(ends[1] - ends[0]).max() < 0.3 * moved
    everyone = driver.everyones(ends[1])
    assert (everyone == everyone[0]).all()


RESUMED = [
    DiLoCo(4, overlap=2, wire="int8"),
    SlowMo(2, groups=PLACED, across=2, overlap=3, wire="bf16"),
    Gossip(3, peers="pairs", overlap=2, fragments=2),
    LocalSGD(4, warmup=2),  # a new process has not warmed up, and must not begin to
]


@pytest.mark.parametrize(
    ("plan", "stop"), crossed(RESUMED, [5, 6]), ids=lambda v: v if v in (5, 6) else type(v).__name__
)
def test_killed_and_resumed_is_bit_equal(
    driver: ContractDriver, rank: int, size: int, plan: Relaxed, stop: int
) -> None:
    """Half-way through a period, and with a fragment on its way."""
    plan = in_nodes(plan, size)

    def fresh() -> tuple[Any, Any]:
        model = driver.model(initial_weights())
        return model, driver.distribute(driver.optimizer("sgd", model), model, sync=plan)

    data = batches(STEPS, rank)
    model, optimizer = fresh()
    driver.train(model, optimizer, data)
    whole = flat(driver.weights(model))
    model, optimizer = fresh()
    driver.train(model, optimizer, data[:stop])
    saved, weights = optimizer.sync.state_dict(), driver.weights(model)
    numbers = json.loads(json.dumps({name: value for name, value in saved.items() if name != "arrays"}))
    model, optimizer = fresh()
    driver.set_weights(model, weights)
    optimizer.sync.load_state_dict({**numbers, "arrays": saved["arrays"]})
    driver.train(model, optimizer, data[stop:])
    np.testing.assert_array_equal(flat(driver.weights(model)), whole)


def test_outer_weights_are_the_shared_ones(driver: ContractDriver, rank: int, size: int) -> None:
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model, sync=LocalSGD(4))
    driver.train(model, optimizer, batches(6, rank))
    own = flat(driver.weights(model))
    with optimizer.sync.evaluating():
        shared = flat(driver.weights(model))
    np.testing.assert_array_equal(flat(driver.weights(model)), own)
    everyone = driver.everyones(shared)
    assert (everyone == everyone[0]).all()
    if size > 1:
        assert np.abs(shared - own).max() > 1e-3
    listed = np.sort(np.concatenate([np.ravel(driver.numpy(w)) for w in optimizer.sync.outer_weights().values()]))
    np.testing.assert_array_equal(listed, np.sort(shared))


def test_metrics_count_rounds_and_bytes(driver: ContractDriver, rank: int, size: int) -> None:
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model, sync=LocalSGD(4))
    for step, batch in enumerate(batches(STEPS, rank)):
        optimizer.sync.tell(loss=float(step), samples=8)
        driver.train(model, optimizer, [batch])
    metrics = optimizer.sync.metrics()
    assert metrics["rounds"] == 3
    assert metrics["steps"] == STEPS
    assert metrics["loss"] == np.mean([8, 9, 10, 11])
    payload = 26 * 4
    headers = 4 * (size - 1) * 72  # one before the first round
    assert metrics["bytes_sent"] == 3 * (2 * (size - 1) * payload // size) + headers
    assert (metrics["drift"] > 0) == (size > 1)


def start_training(driver: ContractDriver, **arguments: Any) -> None:
    """What is wrong with a plan is said when the optimizer is wrapped or, in Keras, when it meets its variables."""
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model, **arguments)
    driver.train(model, optimizer, batches(1, 0))


def test_ranks_that_begin_with_different_weights_are_told(driver: ContractDriver, rank: int, size: int) -> None:
    """Nobody has made the first rank's weights everyone's."""
    model = driver.model([w + np.float32(rank) for w in initial_weights()])
    optimizer = driver.distribute(driver.optimizer("sgd", model), None, sync=LocalSGD(2))
    if size == 1:
        driver.train(model, optimizer, batches(2, rank))
        return
    with pytest.raises(driver.hvd.DesyncError, match=r"Ranks begin with different weights: .* Pass model="):
        driver.train(model, optimizer, batches(2, rank))


def test_ranks_with_different_plans_are_told(driver: ContractDriver, rank: int, size: int) -> None:
    if size == 1:
        return
    with pytest.raises(driver.hvd.DesyncError, match="every = 5"):
        start_training(driver, sync=LocalSGD(4 + (rank == size - 1)))


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"sync": LocalSGD(4, fragments=9)}, "at most 4 fragments"),
        ({"sync": LocalSGD(4), "op": "Sum"}, "op=Average"),
        ({"sync": LocalSGD(4), "gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    ],
    ids=["fragments", "op", "predivide"],
)
def test_a_plan_that_cannot_be_is_refused(driver: ContractDriver, arguments: dict[str, Any], rule: str) -> None:
    given = {name: getattr(driver.hvd, value) if name == "op" else value for name, value in arguments.items()}
    with pytest.raises(driver.hvd.PlanError, match=rule):
        start_training(driver, **given)
