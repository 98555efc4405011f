"""How a test run ends when it is told to, and in what order its lanes go through it.

A run that is told to end (``kill``, ``timeout``) does what it does at Ctrl-C: it ends its launches first. Python's own
answer to SIGTERM is to be gone at once, and leave ranks behind. Ranks themselves keep it.
"""

from __future__ import annotations

import os
import signal

import pytest


def pytest_configure() -> None:
    if "HVDSCALE_ADAPTER" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In lanes, the rows of the contract suite come first, into one lane: they take minutes each, and most cores."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: "test_contract_suites" not in item.nodeid)
