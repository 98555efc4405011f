"""Training under a parameter server: the float64 oracle without staleness, the bound with it, one end for all."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest

from hvdscale.sync import ParameterServer
from tests.contract.driver import ContractDriver
from tests.contract.oracle import batches, gradients, initial_weights
from tests.contract.test_relaxed import FRAGMENTS, INNER, NESTEROV, flat, nested, start_training
from tests.relaxed_oracle import trajectory

STEPS = 9


def expected(plan: ParameterServer, kind: str, workers: int) -> np.ndarray:
    """The weights after a flush, [26]."""
    data = [batches(STEPS, rank) for rank in range(workers)]
    functions = [lambda x, step, own=own: flat(gradients(nested(x), own[step])) for own in data]
    outer = ("nesterov", plan.outer_lr, plan.outer_momentum)
    start = flat(initial_weights())
    return trajectory(functions, start, FRAGMENTS[1], STEPS, plan.every, INNER[kind], outer=outer)[0]


def fresh(driver: ContractDriver, plan: ParameterServer, kind: str = "sgd") -> tuple[Any, Any]:
    model = driver.model(initial_weights())
    return model, driver.distribute(driver.optimizer(kind, model), model, sync=plan)


def everyones(driver: ContractDriver, model: Any) -> np.ndarray:
    """[ranks, 26]"""
    return driver.everyones(flat(driver.weights(model)))


CASES = [
    (ParameterServer(0), "sgd"),
    (ParameterServer(0), "momentum"),
    (ParameterServer(0), "adam"),
    (ParameterServer(0, servers=1, every=3), "adam"),
    (ParameterServer(0, every=3, outer_lr=NESTEROV[1], outer_momentum=NESTEROV[2]), "momentum"),
]


@pytest.mark.parametrize(("plan", "kind"), CASES, ids=lambda value: str(value)[:60])
def test_without_staleness_it_follows_the_oracle(
    driver: ContractDriver, rank: int, size: int, plan: ParameterServer, kind: str
) -> None:
    model, optimizer = fresh(driver, plan, kind)
    driver.train(model, optimizer, batches(STEPS, rank))
    optimizer.sync.flush()
    bound = 2e-5 if kind == "adam" else 1e-6  # Adam divides small float32 gradients by their own size
    np.testing.assert_allclose(flat(driver.weights(model)), expected(plan, kind, size), atol=bound)
    weights = everyones(driver, model)
    assert (weights == weights[0]).all()


@pytest.mark.parametrize("kind", ["sgd", "momentum"])
def test_without_staleness_it_equals_the_all_reduce(driver: ContractDriver, rank: int, kind: str) -> None:
    ends = []
    for arguments in ({}, {"sync": ParameterServer(0)}):
        model = driver.model(initial_weights())
        optimizer = driver.distribute(driver.optimizer(kind, model), model, **arguments)
        driver.train(model, optimizer, batches(STEPS, rank))
        ends.append(flat(driver.weights(model)))
    np.testing.assert_allclose(ends[1], ends[0], atol=1e-6)


@pytest.mark.parametrize("staleness", [2, None])
def test_under_a_straggler_the_bound_holds(driver: ContractDriver, rank: int, size: int, staleness: int | None) -> None:
    """The last rank is slow. When a rank begins a step, all others have made at least as many but ``staleness``."""
    model, optimizer = fresh(driver, ParameterServer(staleness))
    took = []
    for batch in batches(2, rank):  # whatever is compiled is compiled in the first
        took.append(-time.monotonic())
        driver.train(model, optimizer, [batch])
        took[-1] += time.monotonic()
    optimizer.sync.flush()
    begins, ends = [], []
    for batch in batches(6, rank):
        begins.append(time.monotonic())
        time.sleep(max(0.1, 4 * took[1]) * (rank == size - 1))
        driver.train(model, optimizer, [batch])
        ends.append(time.monotonic())
    optimizer.sync.flush()
    times = driver.everyones(np.array([begins, ends]))  # [ranks, 2, steps]; one clock for all of this host
    for mine, theirs in ((a, b) for a in times for b in times):
        made = np.searchsorted(theirs[1], mine[0])  # pushed before I began my step 0, 1, ...
        if staleness is not None:
            assert (np.arange(6) - made <= staleness + 1).all()  # a push is on its way back when its sender may go on
    metrics = optimizer.sync.metrics()
    leads = driver.everyones(np.array([metrics["lead_max"]]))
    if size > 1:
        assert 1 <= leads.max() <= staleness if staleness is not None else leads.max() > 2
    assert sum(n for name, n in metrics.items() if name[6:].isdigit()) == metrics["rounds"] == 8
    weights = everyones(driver, model)
    assert (weights == weights[0]).all()


def test_training_with_ranks_set_aside(driver: ContractDriver, rank: int, size: int) -> None:
    """The last rank serves and does not train; in the end it holds the weights, too."""
    plan = ParameterServer(0, dedicated=True)
    if size == 1:
        with pytest.raises(driver.hvd.PlanError, match="none is left to train"):
            start_training(driver, sync=plan)
        return
    model, optimizer = fresh(driver, plan)
    if optimizer.sync.trains:
        driver.train(model, optimizer, batches(STEPS, rank))
    else:
        assert rank == size - 1
        with pytest.raises(driver.hvd.PlanError, match=f"rank {rank} is set aside"):
            driver.train(model, optimizer, batches(1, rank))
    optimizer.sync.flush()
    weights = everyones(driver, model)
    assert (weights == weights[0]).all()
    np.testing.assert_allclose(weights[0], expected(plan, "sgd", size - 1), atol=1e-6)


@pytest.mark.parametrize("staleness", [0, 3])
def test_killed_and_resumed_goes_on(driver: ContractDriver, rank: int, size: int, staleness: int) -> None:
    plan = ParameterServer(staleness, every=2, outer_lr=0.7, outer_momentum=0.5)
    data = batches(STEPS, rank)
    model, optimizer = fresh(driver, plan)
    driver.train(model, optimizer, data)
    optimizer.sync.flush()
    whole = flat(driver.weights(model))
    model, optimizer = fresh(driver, plan)
    driver.train(model, optimizer, data[:5])
    saved, weights = optimizer.sync.state_dict(), driver.weights(model)
    numbers = json.loads(json.dumps({name: value for name, value in saved.items() if name != "arrays"}))
    model, optimizer = fresh(driver, plan)
    driver.set_weights(model, weights)
    optimizer.sync.load_state_dict({**numbers, "arrays": saved["arrays"]})
    driver.train(model, optimizer, data[5:])
    optimizer.sync.flush()
    if staleness == 0:
        np.testing.assert_array_equal(flat(driver.weights(model)), whole)
    assert optimizer.sync.metrics()["rounds"] == 5
    resumed = everyones(driver, model)
    assert (resumed == resumed[0]).all()


def test_evaluating_shows_the_shared_weights(driver: ContractDriver, rank: int, size: int) -> None:
    model, optimizer = fresh(driver, ParameterServer(0, every=4))
    driver.train(model, optimizer, batches(6, rank))
    own = flat(driver.weights(model))
    with optimizer.sync.evaluating():
        shared = everyones(driver, model)
    np.testing.assert_array_equal(flat(driver.weights(model)), own)
    assert (shared == shared[0]).all()
    assert np.abs(shared[0] - own).max() > 1e-3
    optimizer.sync.flush()


def test_bad_arguments_are_refused_on_every_rank(driver: ContractDriver, rank: int, size: int) -> None:
    with pytest.raises(driver.hvd.PlanError, match=f"servers={size + 1}, and {size} rank"):
        start_training(driver, sync=ParameterServer(1, servers=size + 1))
    for arguments, rule in (
        ({"op": driver.hvd.Sum}, "op=Average"),
        ({"compression": driver.hvd.Compression.fp16}, "compression"),
        ({"gradient_predivide_factor": 2.0}, "gradient_predivide_factor"),
    ):
        with pytest.raises(driver.hvd.PlanError, match=rule):
            start_training(driver, sync=ParameterServer(1), **arguments)
    for staleness in (-1, 0.5, True):
        with pytest.raises(driver.hvd.PlanError, match=f"staleness .*it is {staleness}"):
            driver.hvd.ParameterServer(staleness)
    if size > 1:  # plans that differ
        with pytest.raises(driver.hvd.DesyncError, match="staleness="):
            start_training(driver, sync=ParameterServer(int(rank == 0)))
