"""Groups of ranks become process sets, each made once, whoever asks and in whatever order its ranks are named."""

from __future__ import annotations

import importlib
import os

import numpy as np
import pytest

from tests.contract.driver import ContractDriver

FRAMEWORK = {"keras": os.environ.get("KERAS_BACKEND", "")}.get(
    os.environ.get("HVDSCALE_ADAPTER", ""), os.environ.get("HVDSCALE_ADAPTER", "")
)


def test_each_process_set_is_made_once(driver: ContractDriver, rank: int, size: int) -> None:
    intern = importlib.import_module(f"hvdscale.{FRAMEWORK}.process_sets").intern
    world, alone, even, again = intern([range(size), [size - 1], range(0, size, 2), list(range(0, size, 2))[::-1]])
    assert world is driver.hvd.global_process_set
    assert (alone.size(), alone.included()) == (1, rank == size - 1 or size == 1)
    assert even.process_set_id == again.process_set_id
    if size > 2:
        assert even.process_set_id == driver.even_ranks.process_set_id  # made at init()
        pair, once_more = intern([[size - 1, 0], [0, size - 1]])
        assert pair.process_set_id == once_more.process_set_id
        if rank in (0, size - 1):
            total = driver.hvd.allreduce(driver.tensor(np.float32([rank])), op=driver.hvd.Sum, process_set=pair)
            assert driver.numpy(total) == size - 1
    for ranks in ([], [0, 0], [size], [-1]):
        with pytest.raises(driver.hvd.PlanError, match="A group holds different ranks out of 0 to"):
            intern([ranks])


def test_operations_without_a_name_meet_after_some_ranks_worked_among_themselves(
    driver: ContractDriver, size: int
) -> None:
    hvd, some = driver.hvd, driver.even_ranks
    one = driver.tensor(np.float32([1]))
    for _ in range(3 if some.included() else 0):
        assert driver.numpy(hvd.allreduce(one, op=hvd.Sum, process_set=some)) == some.size()
    assert driver.numpy(hvd.allreduce(one, op=hvd.Sum)) == size
    assert len(driver.numpy(hvd.allgather(one))) == size
