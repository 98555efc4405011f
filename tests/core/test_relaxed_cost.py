"""What rounds cost a rank: the memory that docs/relaxed.md says, and each parameter read and written once."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from ci.bench.mirror import Mirror
from hvdscale.sync import DiLoCo, Gossip, LocalSGD, Relaxed, Rounds, SlowMo
from tests.core.numpy_store import NumPyStore, NumPyTensors

ROWS, WIDTH, TENSORS = 512, 256, 8
MODEL_BYTES = 4 * TENSORS * ROWS * WIDTH
RANKS = 4


class Counting(NumPyTensors):
    """Counts the values read and written."""

    def __init__(self, arrays: dict[str, Any]) -> None:
        super().__init__(arrays)
        self.values_read = self.values_written = 0

    def read(self, positions: Sequence[int], out: np.ndarray) -> None:
        super().read(positions, out)
        self.values_read += out.size

    def write(self, positions: Sequence[int], values: np.ndarray) -> None:
        super().write(positions, values)
        self.values_written += values.size

    def view(self, position: int, writes: bool = False) -> np.ndarray | None:
        there: np.ndarray | None = super().view(position, writes)
        if there is not None and writes:
            self.values_written += there.size
        elif there is not None:
            self.values_read += there.size
        return there


def weights(dtype: Any = np.float32) -> Counting:
    rng = np.random.default_rng(0)
    return Counting({f"w{i}": rng.normal(size=(ROWS, WIDTH)).astype(dtype) for i in range(TENSORS)})


def copies(plan: Relaxed, dtype: Any = np.float32) -> tuple[float, float]:
    """Float32 copies of the model that ``plan`` keeps, and how many more it needs at the most during a round."""
    tensors = weights(dtype)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    rounds = Rounds(plan, NumPyStore(tensors), Mirror(RANKS))
    rounds.before_step()
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for _ in range(2 * plan.every if isinstance(plan.every, int) else 0):
        rounds.after_step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return (kept - before) / MODEL_BYTES, (peak - kept) / MODEL_BYTES


TABLE: list[tuple[Relaxed, Any, float, float]] = [  # plan, dtype of the parameters, kept, more in a round
    (LocalSGD(1), np.float32, 2, 0),
    (LocalSGD(1), np.float16, 3, 0),
    (LocalSGD(4, fragments=4), np.float32, 1.25, 0),
    (LocalSGD(1, merge="mix"), np.float32, 2, 1),
    (LocalSGD(1, groups="node"), np.float32, 2, 0),
    (DiLoCo(1), np.float32, 3, 0),
    (SlowMo(4, fragments=4), np.float32, 2.25, 0),
    (LocalSGD(4, fragments=4, overlap=1), np.float32, 1, 2 * 0.25),
    (LocalSGD(1, wire="bf16"), np.float32, 2 + 1 + 1 / RANKS, 1.5),
    (LocalSGD(1, wire="int8"), np.float32, 2 + 1 + 1 / RANKS, 0.8),
    (LocalSGD(1, wire="int4"), np.float32, 2 + 1 + 1 / RANKS, 0.4),
    (LocalSGD(4, wire="int8", fragments=4), np.float32, 1.25 + 1 + 1 / RANKS, 0.8 / 4),
    (Gossip(1, peers="pairs"), np.float32, 1, 1),
    (Gossip(1, peers="ring"), np.float32, 1, 2),
]


@pytest.mark.parametrize(("plan", "dtype", "kept", "more"), TABLE, ids=lambda value: repr(value)[:100])
def test_memory_is_what_the_buffers_of_the_plan_need(plan: Relaxed, dtype: Any, kept: float, more: float) -> None:
    held, extra = copies(plan, dtype)
    assert kept - 0.01 <= held <= kept + 0.02
    assert extra <= more + 0.15  # blocks of a few hundred kB that arithmetic goes through


@pytest.mark.parametrize("plan", [LocalSGD(1), DiLoCo(1, wire="int8"), SlowMo(3, fragments=3), Gossip(1)])
def test_a_round_reads_and_writes_each_parameter_once(plan: Relaxed) -> None:
    tensors = weights()
    rounds = Rounds(plan, NumPyStore(tensors), Mirror(RANKS))
    rounds.before_step()
    tensors.values_read = tensors.values_written = 0
    for _ in range(plan.every if isinstance(plan.every, int) else 0):
        rounds.after_step()
    assert tensors.values_read == tensors.values_written == TENSORS * ROWS * WIDTH
