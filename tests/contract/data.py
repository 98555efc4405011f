"""What the suites of the loaders share."""

from __future__ import annotations

import itertools
import json
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
