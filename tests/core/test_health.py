"""A rank that fails says why, once, and ends the job. Run in a process of its own: it changes ``sys.excepthook``."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

HEADER = """
import os, sys
from hvdscale.runtime import health

def end(code):
    sys.stderr.write(f"<end {code}>")
    sys.stderr.flush()
    os._exit(7)

health.end_job_on_error(3, end)
health.end_job_on_error(4, end)  # a second init() changes nothing
class HorovodInternalError(RuntimeError): pass
"""


def run(body: str) -> tuple[int, str, float]:
    start = time.monotonic()
    finished = subprocess.run([sys.executable, "-c", HEADER + body], capture_output=True, text=True, timeout=30)
    return finished.returncode, finished.stdout + finished.stderr, time.monotonic() - start


def test_the_traceback_is_printed_once_and_last() -> None:
    code, output, _ = run("print('before')\nraise ValueError('broken')")
    assert code == 7
    assert output.startswith("before\n")
    assert output.count("Traceback (most recent call last)") == 1
    assert "[rank 3] ended the job:" in output
    assert output.endswith("ValueError: broken\n<end 1>")


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        ("HorovodInternalError('connection lost')", True),
        ("RuntimeError('Horovod has been shut down. This was caused by ...')", True),
        ("RuntimeError('something else')", False),
    ],
)
def test_an_echo_of_another_ranks_failure_waits_for_it_to_speak(error: str, waits: bool) -> None:
    code, output, seconds = run(f"health.ECHO_SECONDS = 2.0\nraise {error}")
    assert code == 7
    assert output.endswith("<end 1>")
    assert (seconds >= 2.0) == waits


@pytest.mark.parametrize(("body", "code"), [("sys.exit(5)", 5), ("pass", 0)])
def test_an_ordinary_end_is_left_alone(body: str, code: int) -> None:
    assert run(body)[:2] == (code, "")


def test_control_c_ends_the_job_too() -> None:
    code, output, _ = run("raise KeyboardInterrupt")
    assert code == 7
    assert "KeyboardInterrupt" in output
    assert "ended the job" not in output


def test_abort_ends_the_process_without_exit_handlers() -> None:
    code, output, _ = run("import atexit\natexit.register(print, 'handler')\nhealth.abort(9)")
    assert (code, output) == (9, "")
