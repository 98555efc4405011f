"""The contract suite on real ranks: every adapter, both launchers, both controllers."""

from __future__ import annotations

import re

import pytest

from tests.launcher import launch

TORCH = {"HVDSCALE_ADAPTER": "torch"}
TENSORFLOW = {"HVDSCALE_ADAPTER": "tensorflow"}
KERAS_TENSORFLOW = {"HVDSCALE_ADAPTER": "keras", "KERAS_BACKEND": "tensorflow"}
KERAS_TORCH = {"HVDSCALE_ADAPTER": "keras", "KERAS_BACKEND": "torch"}

TABLE = [
    # adapter, launcher, ranks
    (TORCH, "mpirun", 2),
    (TORCH, "horovodrun", 2),
    (TORCH, "horovodrun-gloo", 2),
    (TORCH, "mpirun", 4),
    (TORCH, "alone", 1),
    (TENSORFLOW, "mpirun", 2),
    (TENSORFLOW, "horovodrun-gloo", 2),
    (TENSORFLOW, "alone", 1),
    (KERAS_TENSORFLOW, "mpirun", 2),
    (KERAS_TORCH, "mpirun", 2),
    (KERAS_TORCH, "horovodrun-gloo", 2),
]


@pytest.mark.parametrize(
    ("env", "launcher", "ranks"), TABLE, ids=lambda v: "-".join(v.values()) if isinstance(v, dict) else str(v)
)
def test_contract(env: dict[str, str], launcher: str, ranks: int) -> None:
    suite = ["-m", "pytest", "tests/contract", "-q", "-p", "no:cacheprovider"]
    output = launch(suite, ranks=ranks, launcher=launcher, env=env, deadline_seconds=600).check()
    assert len(re.findall(r"\d+ passed", output)) == ranks, output
