"""Large and small buffers between ranks, outside the framework's graph: what rounds and coded gradients are made of."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import pytest

from tests.contract.driver import ContractDriver

# Of a message: large ones go round a ring, or in pairs.
BYTES = [1, 1000, 64 << 10, 100_003]


def open_channel(driver: ContractDriver, patient: bool) -> Any:
    """Keras has none of its own: its backend's."""
    name = driver.hvd.__name__
    if name.endswith("keras"):
        name = f"hvdscale.{import_module('keras').backend.backend()}"
    return import_module(f"{name}.channel").open_channel(patient=patient)


def content(source: int, to: int, size: int) -> np.ndarray:
    return np.random.default_rng((source, to, size)).integers(0, 256, size, np.uint8)


@pytest.mark.parametrize("patient", [False, True])
def test_collectives_of_a_channel_bring_what_was_sent(driver: ContractDriver, rank: int, patient: bool) -> None:
    channel = open_channel(driver, patient)
    mine, everyone = channel.rank, range(channel.size)
    for size in BYTES:
        rows = np.stack([content(mine, to, size) for to in everyone])
        np.testing.assert_array_equal(channel.alltoall(rows), [content(source, mine, size) for source in everyone])
        np.testing.assert_array_equal(
            channel.allgather(content(mine, 0, size)), [content(source, 0, size) for source in everyone]
        )
        after, before = (mine + 1) % channel.size, (mine - 1) % channel.size
        came = channel.swap(content(mine, after, size), after, before)
        np.testing.assert_array_equal(came, content(before, mine, size))
        values = content(mine, 0, size).astype(np.float32)
        channel.allreduce(values)
        np.testing.assert_array_equal(values, sum(content(source, 0, size).astype(np.float32) for source in everyone))
