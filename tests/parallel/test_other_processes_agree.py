"""Whichever process decides, it decides the same: nothing hangs on the order of sets or on hashes of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from hvdscale.data import ShardPlan, balance, pack, split
from tests.core.test_streams import POLICIES, read, records, stream


def in_another_process(code: str) -> Any:
    """What ``code`` prints, as JSON."""
    done = subprocess.run([sys.executable, "-c", f"import json\n{code}"], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("equal_counts", [False, True])
def test_balance(equal_counts: bool) -> None:
    costs = [i * i % 977 for i in range(300)]
    there = in_another_process(
        f"from hvdscale.data import balance; print(balance({costs}, 7, 1.0, 0.01, {equal_counts}).tolist())"
    )
    assert there == balance(costs, 7, 1.0, 0.01, equal_counts).tolist()


@pytest.mark.parametrize("method", ["best-fit", "chop"])
def test_pack(method: str) -> None:
    lengths = [i * 37 % 101 for i in range(999)]
    there = in_another_process(
        f"from hvdscale.data import pack; print(json.dumps(pack({lengths}, 128, {method!r}).digest))"
    )
    assert there == pack(lengths, 128, method).digest


def test_plans_and_splits() -> None:
    there = in_another_process(
        "from hvdscale.data import ShardPlan, split\n"
        "keys = [f'k{i}' for i in range(200)]\n"
        "print([ShardPlan(200, 3, 'random', seed=7).indices(1, 4).tolist(),\n"
        "       ShardPlan(200, 3, 'hash', seed=7, keys=keys).indices(1).tolist(),\n"
        "       split(keys, (0.8, 0.2))[1].tolist()])"
    )
    keys = [f"k{i}" for i in range(200)]
    assert there == [
        ShardPlan(200, 3, "random", seed=7).indices(1, 4).tolist(),
        ShardPlan(200, 3, "hash", seed=7, keys=keys).indices(1).tolist(),
        split(keys, (0.8, 0.2))[1].tolist(),
    ]


@pytest.mark.parametrize("policy", POLICIES)
def test_streams(policy: str) -> None:
    there = in_another_process(
        "from tests.core.test_streams import *\n"
        f"print(json.dumps(read(stream({policy!r}, 3, seed=9, epoch=2), records(300))))"
    )
    assert there == read(stream(policy, 3, seed=9, epoch=2), records(300))
