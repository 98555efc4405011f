"""Training on N ranks equals one process fed with the reduced gradients of all: the promise of data parallelism."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.contract.driver import ContractDriver
from tests.contract.oracle import OPTIMIZERS, Weights, batches, gradients, initial_weights

STEPS = 5


@dataclass(frozen=True)
class Case:
    """One way to distribute. ``arguments`` gets the driver and the model, and gives Horovod's keyword arguments."""

    name: str
    arguments: Callable[[ContractDriver, Any], dict[str, Any]] = lambda driver, model: {}
    optimizer: str = "sgd"
    passes: int = 1
    summed: bool = False
    rtol: float = 1e-5


CASES = [
    Case("sgd"),
    Case("momentum", optimizer="momentum"),
    Case("adam", optimizer="adam"),
    Case("two passes", lambda d, m: {"backward_passes_per_step": 2}, passes=2),
    Case("two passes, adam", lambda d, m: {"backward_passes_per_step": 2}, optimizer="adam", passes=2),
    Case("sum", lambda d, m: {"op": d.hvd.Sum}, summed=True),
    Case("predivided", lambda d, m: {"gradient_predivide_factor": 4.0}),
    Case("two groups", lambda d, m: {"groups": 2}),
    Case("two groups, predivided", lambda d, m: {"groups": 2, "gradient_predivide_factor": 4.0}),
    Case("more groups than parameters", lambda d, m: {"groups": 9}),
    Case("listed groups", lambda d, m: {"groups": [d.parameters(m)[1:3], d.parameters(m)[3:]]}),
    Case("two groups, two passes", lambda d, m: {"groups": 2, "backward_passes_per_step": 2}, passes=2),
    Case("half precision on the wire", lambda d, m: {"compression": d.hvd.Compression.fp16}, rtol=5e-3),
]


def expected(case: Case, ranks: Sequence[int], seed: int = 0) -> Weights:
    """The oracle's weights after ``STEPS`` steps on the batches of these ranks."""
    update = OPTIMIZERS[case.optimizer]()
    weights = initial_weights(seed)
    data = [batches(STEPS * case.passes, rank) for rank in ranks]
    for step in range(STEPS):
        every = [gradients(weights, b) for own in data for b in own[step * case.passes : (step + 1) * case.passes]]
        divisor = 1 if case.summed else len(ranks)
        weights = update(weights, [sum(parts) / divisor for parts in zip(*every, strict=True)])
    return weights


def trained(driver: ContractDriver, case: Case, rank: int, seed: int = 0, **more: Any) -> Weights:
    model = driver.model(initial_weights(seed))
    optimizer = driver.distribute(
        driver.optimizer(case.optimizer, model), model, **case.arguments(driver, model), **more
    )
    driver.train(model, optimizer, batches(STEPS * case.passes, rank), case.passes)
    return driver.weights(model)


def assert_equal(actual: Weights, wanted: Weights, rtol: float) -> None:
    for a, w in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(a, w, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_one_process_with_everyones_gradients(driver: ContractDriver, rank: int, size: int, case: Case) -> None:
    weights = trained(driver, case, rank)
    assert_equal(weights, expected(case, range(size)), case.rtol)
    everyone = driver.everyones(np.concatenate([w.ravel() for w in weights]))
    assert (everyone == everyone[0]).all(), "ranks hold different weights"


def test_the_oracle_tells_a_rank_that_trains_alone(size: int) -> None:
    """The comparison above is sharp enough: a rank on its own gradients ends elsewhere."""
    alone, together = expected(CASES[0], [0]), expected(CASES[0], range(max(size, 2)))
    assert max(np.abs(a - t).max() for a, t in zip(alone, together, strict=True)) > 1e-2


def test_training_starts_from_the_first_ranks_weights(driver: ContractDriver, rank: int, size: int) -> None:
    case = Case("momentum", optimizer="momentum")
    assert_equal(trained(driver, case, rank, seed=rank), expected(case, range(size)), case.rtol)


def test_a_process_set_trains_apart(driver: ContractDriver, rank: int, size: int) -> None:
    """Even ranks average among themselves; every odd rank trains alone."""
    case = Case("adam", optimizer="adam")
    peers = range(0, size, 2) if rank % 2 == 0 else [rank]
    assert_equal(trained(driver, case, rank, process_set=driver.even_ranks), expected(case, peers), case.rtol)


def test_several_models_do_not_meet(driver: ContractDriver, rank: int, size: int) -> None:
    """Two networks with equal parameter names, stepped in turn."""
    case = Case("sgd")
    models = [driver.model(initial_weights(seed)) for seed in (0, 1)]
    optimizers = [driver.distribute(driver.optimizer("sgd", m), m) for m in models]
    for batch in batches(STEPS, rank):
        for model, optimizer in zip(models, optimizers, strict=True):
            driver.train(model, optimizer, [batch])
    for seed, model in enumerate(models):
        assert_equal(driver.weights(model), expected(case, range(size), seed), case.rtol)


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({"backward_passes_per_step": 0}, "backward_passes_per_step must be"),
        ({"gradient_predivide_factor": -1.0}, "gradient_predivide_factor must be > 0"),
        ({"groups": -1}, "groups must be"),
        ({"sync": "sometimes"}, "sync takes EveryStep"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_arguments_that_cannot_be(driver: ContractDriver, arguments: dict[str, Any], rule: str) -> None:
    model = driver.model(initial_weights())
    with pytest.raises(driver.hvd.PlanError, match=rule):
        driver.distribute(driver.optimizer("sgd", model), model, **arguments)


def test_predivision_needs_an_average(driver: ContractDriver) -> None:
    model = driver.model(initial_weights())
    with pytest.raises(driver.hvd.PlanError, match="splits an average in two"):
        driver.distribute(driver.optimizer("sgd", model), model, op=driver.hvd.Sum, gradient_predivide_factor=2.0)


def test_an_optimizer_wrapped_twice_is_refused(driver: ContractDriver) -> None:
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model)
    with pytest.raises(driver.hvd.PlanError, match="distributed already"):
        driver.distribute(optimizer, model)
