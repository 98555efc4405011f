"""Keeping a framework's start-up notices off the screen; its warnings and errors stay."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["is_notice", "quiet_import"]

# Read by TensorFlow's own logging and by gRPC inside it, once, when the library is loaded.
_DEFAULTS = {"TF_CPP_MIN_LOG_LEVEL": "1", "GRPC_VERBOSITY": "ERROR"}  # no information; warnings stay

# These lines are written before any setting is read, so they can only be caught on their way out.
_NOTICES = re.compile(
    r"^(WARNING: All log messages before absl::InitializeLog\(\)"
    r"|I\d{4} "  # absl's prefix of an information line
    r"|To enable the following instructions: "
    r"|.*Unable to register cu(FFT|DNN|BLAS) factory"
    r"|.*computation placer already registered)"
)


def is_notice(line: str) -> bool:
    """Whether a line of standard error is a start-up notice and no warning or error."""
    return _NOTICES.match(line) is not None


@contextmanager
def quiet_import(framework: str = "tensorflow") -> Iterator[None]:
    """Import ``framework`` inside: its notices are dropped, everything else it writes is passed on afterwards.

    A value the user gave to ``TF_CPP_MIN_LOG_LEVEL`` wins; with ``0`` every line is shown as it comes.
    Nothing happens when the framework is imported already.
    """
    if framework in sys.modules:
        yield
        return
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] == "0":
        yield
        return
    try:
        screen = os.dup(2)
    except OSError:  # no standard error: nothing to keep quiet
        yield
        return
    with os.fdopen(screen, "wb"), tempfile.TemporaryFile() as caught:
        sys.stderr.flush()
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(screen, 2)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines(keepends=True):
                if not is_notice(line):
                    sys.stderr.write(line)
