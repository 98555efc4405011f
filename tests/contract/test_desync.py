"""Ranks that build different things hear of it on every rank, before anything is exchanged."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest

from tests.contract.driver import ContractDriver
from tests.contract.oracle import HIDDEN, INPUTS, batches, initial_weights

Build = Callable[[ContractDriver, bool], tuple[str, int, dict[str, Any]]]

# What the last rank builds differently: (kind of optimizer, width of the hidden layer, arguments).
DIFFERENCES: dict[str, tuple[Build, str]] = {
    "shapes": (lambda d, odd: ("sgd", HIDDEN + odd, {}), "parameter 0"),
    "optimizers": (lambda d, odd: ("adam" if odd else "sgd", HIDDEN, {}), "optimizer = "),
    "passes": (lambda d, odd: ("sgd", HIDDEN, {"backward_passes_per_step": 1 + odd}), f"passes={2}"),
    "ops": (lambda d, odd: ("sgd", HIDDEN, {"op": d.hvd.Sum if odd else d.hvd.Average}), "op='sum'"),
    "groups": (lambda d, odd: ("sgd", HIDDEN, {"groups": 2 if odd else None}), "groups=2"),
    "compression": (
        lambda d, odd: ("sgd", HIDDEN, {"compression": getattr(d.hvd.Compression, "fp16" if odd else "none")}),
        "FP16Compressor",
    ),
}


def weights(hidden: int) -> list[np.ndarray]:
    return [np.ones(shape) for shape in ((INPUTS, hidden), (hidden,), (hidden, 1), (1,))]


def expectation(driver: ContractDriver, size: int) -> AbstractContextManager[Any]:
    return pytest.raises(driver.hvd.DesyncError) if size > 1 else nullcontext()


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_every_rank_is_told(driver: ContractDriver, rank: int, size: int, difference: str) -> None:
    build, first = DIFFERENCES[difference]
    odd_one = size - 1
    kind, hidden, arguments = build(driver, rank == odd_one)
    model = driver.model(weights(hidden))
    with expectation(driver, size) as caught:
        optimizer = driver.distribute(driver.optimizer(kind, model), model, **arguments)
        passes = arguments.get("backward_passes_per_step", 1)
        driver.train(model, optimizer, batches(passes, rank), passes)
    if size > 1:
        text = str(caught.value)
        assert f"rank {odd_one} differs from rank 0" in text
        assert first in text
        digest = np.frombuffer(text.encode().ljust(4096)[:4096], np.uint8).astype(np.int32)
        everyone = driver.everyones(digest)
        assert (everyone == everyone[0]).all(), "ranks were told different things"


def test_the_job_goes_on_after_a_refusal(driver: ContractDriver, rank: int, size: int) -> None:
    model = driver.model(initial_weights())
    optimizer = driver.distribute(driver.optimizer("sgd", model), model)
    driver.train(model, optimizer, batches(1, rank))
    everyone = driver.everyones(np.concatenate([w.ravel() for w in driver.weights(model)]))
    assert (everyone == everyone[0]).all()
