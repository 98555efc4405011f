"""The contract suite runs inside ranks: ``HVDSCALE_ADAPTER=torch mpirun -np 2 python -m pytest tests/contract``.

``test_<adapter>_*.py`` holds what is true of one adapter only, and is collected for that one alone.
``HVDSCALE_DEVICE=cuda`` runs the torch adapter's on a GPU, which the ranks of one machine may share.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

ADAPTER = os.environ.get("HVDSCALE_ADAPTER")
ADAPTERS = ("torch", "tensorflow", "keras")

if os.environ.get("HVDSCALE_DEVICE") and ADAPTER == "torch":
    from tests.contract.on_device import put_on

    put_on(os.environ["HVDSCALE_DEVICE"])

collect_ignore_glob = [f"test_{name}_*.py" for name in ADAPTERS if name != ADAPTER] if ADAPTER else ["test_*.py"]
if not os.environ.get("HVDSCALE_DEVICE"):
    collect_ignore_glob.append("test_torch_gpu.py")


@pytest.fixture(scope="session")
def driver() -> Iterator[Any]:
    module = importlib.import_module(f"tests.contract.drivers.{ADAPTER}")
    driver = module.Driver()
    os.environ["HOROVOD_DYNAMIC_PROCESS_SETS"] = "1"  # tests add process sets of their own
    driver.init()
    yield driver
    driver.hvd.world().transport.allgather(b"")  # Horovod stops everywhere when one rank leaves: all leave together
    driver.hvd.shutdown()


@pytest.fixture(scope="session")
def hvd(driver: Any) -> Any:
    return driver.hvd


@pytest.fixture
def rank(hvd: Any) -> int:
    return hvd.rank()


@pytest.fixture
def size(hvd: Any) -> int:
    return hvd.size()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that hangs prints where every thread stands and ends its rank, and with it the job.

    So does a rank that another one's failing test ends: it may be the one that stands still.
    """
    if ADAPTER:
        faulthandler.register(signal.SIGTERM, file=sys.__stderr__, all_threads=True, chain=True)
        for item in items:
            item.add_marker(pytest.mark.timeout(300, method="thread"))


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


@pytest.fixture
def policy() -> Iterator[Callable[[str], None]]:
    """Sets Keras's dtype policy for one test."""
    import keras

    yield keras.config.set_dtype_policy
    keras.config.set_dtype_policy("float32")
