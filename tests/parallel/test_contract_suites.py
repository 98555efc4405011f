"""The contract suite on real ranks: every adapter, both launchers, both controllers."""

from __future__ import annotations

import re

import pytest

from tests.launcher import launch

TORCH = {"HVDSCALE_ADAPTER": "torch"}
TENSORFLOW = {"HVDSCALE_ADAPTER": "tensorflow"}
KERAS_TENSORFLOW = {"HVDSCALE_ADAPTER": "keras", "KERAS_BACKEND": "tensorflow"}
KERAS_TORCH = {"HVDSCALE_ADAPTER": "keras", "KERAS_BACKEND": "torch"}

EVERYTHING = ""
PROCESS_SETS = "process_set"  # on 3 ranks the set of the even ones has two members, and one rank is outside

TABLE = [
    # adapter, launcher, ranks, tests
    (TORCH, "mpirun", 2, EVERYTHING),
    (TORCH, "horovodrun", 2, EVERYTHING),
    (TORCH, "horovodrun-gloo", 2, EVERYTHING),
    (TORCH, "mpirun", 4, EVERYTHING),
    (TORCH, "alone", 1, EVERYTHING),
    (TENSORFLOW, "mpirun", 2, EVERYTHING),
    (TENSORFLOW, "mpirun", 3, PROCESS_SETS),
    (TENSORFLOW, "horovodrun", 2, EVERYTHING),
    (TENSORFLOW, "horovodrun-gloo", 2, EVERYTHING),
    (TENSORFLOW, "alone", 1, EVERYTHING),
    (KERAS_TENSORFLOW, "mpirun", 2, EVERYTHING),
    (KERAS_TENSORFLOW, "mpirun", 3, PROCESS_SETS),
    (KERAS_TENSORFLOW, "horovodrun-gloo", 2, EVERYTHING),
    (KERAS_TENSORFLOW, "alone", 1, EVERYTHING),
    (KERAS_TORCH, "mpirun", 2, EVERYTHING),
    (KERAS_TORCH, "mpirun", 3, PROCESS_SETS),
    (KERAS_TORCH, "horovodrun-gloo", 2, EVERYTHING),
    (KERAS_TORCH, "alone", 1, EVERYTHING),
]


def _name(value: object) -> str:
    return "-".join(value.values()) if isinstance(value, dict) else str(value or "everything")


@pytest.mark.parametrize(("env", "launcher", "ranks", "tests"), TABLE, ids=_name)
def test_contract(env: dict[str, str], launcher: str, ranks: int, tests: str) -> None:
    suite = ["-m", "pytest", "tests/contract", "-q", "-p", "no:cacheprovider", "-k", tests]
    output = launch(suite, ranks=ranks, launcher=launcher, env=env, deadline_seconds=600).check()
    assert len(re.findall(r"\d+ passed", output)) == ranks, output
