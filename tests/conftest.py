"""A test run that is told to end (``kill``, ``timeout``) does what it does at Ctrl-C: it ends its launches first.

Python's own answer to SIGTERM is to be gone at once, and leave ranks behind. Ranks themselves keep it.
"""

from __future__ import annotations

import os
import signal


def pytest_configure() -> None:
    if "HVDSCALE_ADAPTER" not in os.environ:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
