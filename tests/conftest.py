"""How a test run ends when it is told to, and in what order its lanes go through it.

A run that is told to end (``kill``, ``timeout``) does what it does at Ctrl-C: it ends its launches first. Python's own
answer to SIGTERM is to be gone at once, and leave ranks behind. Ranks themselves keep it.
"""

from __future__ import annotations

import os
import signal

import pytest
from xdist.workermanage import NodeManager

# A lane is told to end, interrupted 5 s later, and ends its launches. After 10 s xdist would kill it, and leave them.
_LANE_ENDS_SECONDS = 30


def pytest_configure() -> None:
    if "HVDSCALE_ADAPTER" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        NodeManager.EXIT_TIMEOUT = _LANE_ENDS_SECONDS


# Where tests that take long are, longest first; the rest take milliseconds.
_LONG = ("tests/parallel/test_contract_suites", "tests/parallel/test_train_lm", "tests/faults", "tests/parallel")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In lanes, what takes minutes is begun first and what takes milliseconds last: so all lanes end together."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: next((i for i, at in enumerate(_LONG) if item.nodeid.startswith(at)), len(_LONG)))
