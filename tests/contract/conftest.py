"""The contract suite runs inside ranks: ``HVDSCALE_ADAPTER=torch mpirun -np 2 python -m pytest tests/contract``."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator

import pytest

ADAPTER = os.environ.get("HVDSCALE_ADAPTER")

# test_<adapter>_*.py holds what only that adapter promises.
OTHERS = [name for name in ("torch", "tensorflow", "keras") if name != ADAPTER]
collect_ignore_glob = [f"test_{name}_*.py" for name in OTHERS] if ADAPTER else ["test_*.py"]


@pytest.fixture(scope="session")
def driver() -> Iterator[object]:
    module = importlib.import_module(f"tests.contract.drivers.{ADAPTER}")
    driver = module.Driver()
    driver.hvd.init()
    yield driver
    driver.hvd.shutdown()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failing test ends the job at once: after it, ranks would no longer meet in the same collectives."""
    outcome = yield
    report = outcome.get_result()
    if report.failed and ADAPTER:
        from hvdscale.runtime.health import abort

        sys.__stderr__.write(f"\nFAILED {item.nodeid} ({call.when})\n{report.longreprtext}\n")
        sys.__stderr__.flush()
        abort(1)
