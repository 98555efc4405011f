"""Half precision: ranks skip the same steps, also when only one of them overflows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest

from tests.contract import oracle
from tests.contract.driver import ContractDriver
from tests.contract.keras_reference import (
    all_batches,
    assert_close,
    assert_equal_everywhere,
    fit,
    network,
    own_batches,
    plain_weights,
    small_batches,
    weights_of,
)

# Small numbers: at the first loss scale nothing overflows but what is planted.
SMALL = [0.1 * w for w in oracle.initial_weights()]
SGD = keras.optimizers.SGD


def _inside(hvd: Any) -> Any:
    """Keras wraps it at compile time."""
    return hvd.DistributedOptimizer(SGD(0.1))


def _inside_by_hand(hvd: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(_inside(hvd))


def _outside(hvd: Any) -> Any:
    return hvd.DistributedOptimizer(keras.optimizers.LossScaleOptimizer(SGD(0.1)))


def _accumulating(hvd: Any) -> Any:
    return hvd.DistributedOptimizer(SGD(0.1, gradient_accumulation_steps=2))


def _passes(hvd: Any) -> Any:
    return hvd.DistributedOptimizer(SGD(0.1), backward_passes_per_step=2)


WRAPPINGS = [_inside, _inside_by_hand, _outside, _accumulating, _passes]


@pytest.mark.parametrize("make", WRAPPINGS)
@pytest.mark.parametrize("eager", [False, True])
def test_one_rank_overflows_and_all_skip_the_step(
    driver: ContractDriver, policy: Callable[[str], None], make: Callable[[Any], Any], eager: bool
) -> None:
    policy("mixed_float16")
    model = network(SMALL)
    batches = small_batches(own_batches(4))
    if driver.hvd.rank() == 0:
        batches[1][0][0, 0] = np.inf
    fit(model, make(driver.hvd), batches, run_eagerly=eager)
    scaler = model.optimizer
    assert isinstance(scaler, keras.optimizers.LossScaleOptimizer)
    assert_equal_everywhere([*model.weights, scaler.dynamic_scale, scaler.inner_optimizer.iterations])
    assert np.isfinite(np.concatenate([w.ravel() for w in weights_of(model)])).all()
    assert float(scaler.dynamic_scale) == scaler.initial_scale / 2
    steps_of_two = make is _accumulating or make is _passes
    assert int(scaler.inner_optimizer.iterations) == (1 if steps_of_two else 3)


@pytest.mark.parametrize("name", ["mixed_float16", "mixed_bfloat16"])
def test_half_precision_trains_near_full_precision(
    driver: ContractDriver, policy: Callable[[str], None], name: str
) -> None:
    policy(name)
    model = network(SMALL)
    fit(model, driver.hvd.DistributedOptimizer(SGD(0.1)), small_batches(own_batches(3)))
    policy("float32")
    assert_equal_everywhere(model.weights)
    expected = plain_weights(SGD(0.1), small_batches(all_batches(3)), SMALL)
    assert_close(weights_of(model), expected, 3e-3)
    moved = max(float(np.abs(a - b).max()) for a, b in zip(expected, SMALL, strict=True))
    assert moved > 1e-2  # far more than the tolerance


def test_weights_in_bfloat16(driver: ContractDriver, policy: Callable[[str], None]) -> None:
    policy("bfloat16")
    model = network()
    fit(model, driver.hvd.DistributedOptimizer(SGD(0.05, momentum=0.9), model=model), own_batches(3))
    assert {v.dtype for v in model.weights} == {"bfloat16"}
    assert_equal_everywhere([*model.weights, *model.optimizer.variables])
