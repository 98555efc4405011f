"""Core tests start no process: those that need one, or ranks, are in ``tests/parallel`` and ``tests/faults``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# On a busy machine examples are drawn slowly, and that says nothing of what is tested.
settings.register_profile("busy", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

_STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
_in_a_core_test = False


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _in_a_core_test and event in _STARTS:
        raise AssertionError(f"A core test starts a process ({event}). It belongs in tests/parallel or tests/faults.")


def pytest_configure() -> None:
    sys.addaudithook(_refuse)


@pytest.fixture(autouse=True)
def starts_no_process() -> Iterator[None]:
    global _in_a_core_test
    _in_a_core_test = True
    yield
    _in_a_core_test = False
