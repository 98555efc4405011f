"""What the suites of the loaders share."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.contract.driver import ContractDriver


def everyones(driver: ContractDriver, value: Any) -> list[Any]:
    """``value`` of every rank, as JSON."""
    text = json.dumps(value).encode()
    assert len(text) < 1 << 16
    gathered = driver.everyones(np.frombuffer(text.ljust(1 << 16), np.uint8).astype(np.int32))
    return [json.loads(bytes(row.astype(np.uint8))) for row in gathered]


def all_numbers(driver: ContractDriver, mine: list[int]) -> list[int]:
    """The sample numbers that all ranks have read, sorted."""
    return sorted(itertools.chain(*everyones(driver, [int(number) for number in mine])))


def one_pass(loader: Any, most: int | None = None) -> Iterator[tuple[int, list[int]]]:
    """On to the end of the epoch, or over ``most`` batches, as a loop or a fit of the framework would: of each batch
    the epoch and the sample numbers in it."""
    if not hasattr(loader, "on_epoch_end"):
        for batch in itertools.islice(loader, most):
            yield loader.batch.epoch, [int(number) for number in batch]
        return
    steps = len(loader)  # Keras: as fit does, without a model
    if not steps:
        loader.feed.finish()
        return
    loader.counter.set_params({"steps": steps})
    loader.counter.on_train_begin()
    loader.on_epoch_begin()
    loader.counter.on_epoch_begin(0)
    for step in range(steps if most is None else min(steps, most)):
        batch = loader[step]
        numbers = np.asarray(batch[0] if isinstance(batch, tuple) else batch).tolist()
        loader.counter.on_train_batch_end(step)
        yield loader.batch.epoch, numbers
    loader.counter.on_train_end()
    loader.on_epoch_end()


def batches_of(loader: Any, count: int) -> Iterator[tuple[int, list[int]]]:
    """The next ``count`` batches, from one epoch into the next."""
    while count:
        for batch in one_pass(loader, count):
            yield batch
            count -= 1
