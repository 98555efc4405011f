"""Who applies the update changes no weights: central, sharded and local training end at the same place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdscale.sync import EveryStep, LocalSGD
from tests.contract.driver import ContractDriver
from tests.contract.oracle import batches, initial_weights
from tests.contract.test_training import Case, assert_equal, expected

STEPS = 50
PLACED = ("central", "sharded")


def trained(
    driver: ContractDriver, kind: str, rank: int, seed: int = 0, passes: int = 1, **arguments: Any
) -> np.ndarray:
    model = driver.model(initial_weights(seed))
    optimizer = driver.distribute(driver.optimizer(kind, model), model, **arguments)
    driver.train(model, optimizer, batches(STEPS * passes, rank), passes)
    return np.concatenate([w.ravel() for w in driver.weights(model)])


@pytest.mark.parametrize("kind", ["sgd", "momentum", "adam", "adamw"])
def test_training_ends_where_local_updates_do(driver: ContractDriver, rank: int, size: int, kind: str) -> None:
    """``adamw`` has weight decay and clips by the global norm."""
    local = trained(driver, kind, rank)
    for update in PLACED:
        # Every rank starts elsewhere: training begins at the first one's weights.
        weights = trained(driver, kind, rank, seed=rank, sync=EveryStep(update))
        np.testing.assert_allclose(weights, local, atol=1e-6, rtol=1e-6, err_msg=update)
        everyone = driver.everyones(weights)
        assert (everyone == everyone[0]).all(), f"ranks hold different weights, {update}"


@pytest.mark.parametrize("update", PLACED)
def test_training_equals_the_oracle_with_other_reductions(
    driver: ContractDriver, rank: int, size: int, update: Any
) -> None:
    plan = EveryStep(update)
    for case, arguments in (
        (Case("sum", summed=True), {"op": driver.hvd.Sum}),
        (Case("predivided"), {"gradient_predivide_factor": 4.0}),
        (Case("half precision", rtol=5e-3), {"compression": driver.hvd.Compression.fp16}),
    ):
        model = driver.model(initial_weights())
        optimizer = driver.distribute(driver.optimizer("sgd", model), model, sync=plan, **arguments)
        driver.train(model, optimizer, batches(5, rank))
        assert_equal(driver.weights(model), expected(case, range(size)), case.rtol)


@pytest.mark.parametrize("update", PLACED)
def test_a_process_set_trains_apart_with_its_updates_placed(
    driver: ContractDriver, rank: int, size: int, update: Any
) -> None:
    case = Case("adam", optimizer="adam")
    model = driver.model(initial_weights())
    optimizer = driver.distribute(
        driver.optimizer("adam", model), model, sync=EveryStep(update), process_set=driver.even_ranks
    )
    driver.train(model, optimizer, batches(5, rank))
    peers = range(0, size, 2) if rank % 2 == 0 else [rank]
    assert_equal(driver.weights(model), expected(case, peers), case.rtol)


def test_ranks_with_different_updates_are_told_in_training(driver: ContractDriver, rank: int, size: int) -> None:
    if size == 1:
        return
    with pytest.raises(driver.hvd.DesyncError, match="update='central'"):
        trained(driver, "sgd", rank, sync=EveryStep("central" if rank == size - 1 else "sharded"))


@pytest.mark.parametrize("update", PLACED)
def test_what_cannot_be_placed_in_training_is_refused(driver: ContractDriver, rank: int, update: Any) -> None:
    for arguments, rule in (
        ({"op": driver.hvd.Adasum}, "op=Adasum"),
        ({"groups": 2}, "Leave groups out"),
    ):
        with pytest.raises(driver.hvd.PlanError, match=rule):
            trained(driver, "sgd", rank, sync=EveryStep(update), **arguments)
    for sync, rule in (
        (EveryStep("sharded"), "Adafactor does not: its second moments are means over rows"),
        (update, "sync takes"),
        ([EveryStep(update), LocalSGD(4)], "sync takes"),
    ):
        with pytest.raises(driver.hvd.PlanError, match=rule):
            trained(driver, "adafactor", rank, sync=sync)
