"""A rank that fails says why, once, and ends the job. Run in a process of its own: it changes ``sys.excepthook``."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from hvdscale.runtime import health

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
class UnknownError(RuntimeError): pass
"""


COUNT_SLEEP = """
def sleep(seconds):
    sys.stderr.write(f"<slept {seconds:.3f}>")
    sys.stderr.flush()

health.time.sleep = sleep
"""


def run(body: str) -> tuple[int, str]:
    finished = subprocess.run([sys.executable, "-c", HEADER + body], capture_output=True, text=True, timeout=30)
    return finished.returncode, finished.stdout + finished.stderr


def test_the_traceback_is_printed_once_and_last() -> None:
    code, output = run("print('before')\nraise ValueError('broken')")
    assert code == 7
    assert output.startswith("before\n")
    assert output.count("Traceback (most recent call last)") == 1
    assert "[rank 3] ended the job:" in output
    assert output.endswith("ValueError: broken\n<end 1>")


GLOO_IN_TENSORFLOW = (
    "UnknownError('{{function_node HorovodAllreduce}} Connection closed by peer [Op:HorovodAllreduce]')"
)


@pytest.mark.parametrize(
    ("error", "waits"),
    [
        ("HorovodInternalError('connection lost')", True),
        ("RuntimeError('Horovod has been shut down. This was caused by ...')", True),
        (GLOO_IN_TENSORFLOW, True),
        ("UnknownError('disk on fire [Op:ReadFile]')", False),
        ("RuntimeError('something else')", False),
    ],
)
def test_an_echo_of_another_ranks_failure_waits_for_it_to_speak(error: str, waits: bool) -> None:
    code, output = run(f"{COUNT_SLEEP}\nraise {error}")
    assert code == 7
    slept = [float(text) for text in re.findall(r"<slept ([\d.]+)>", output)]
    spoke = output.index("ended the job")
    before = [float(text) for text in re.findall(r"<slept ([\d.]+)>", output[:spoke])]
    assert len(slept) > len(before)  # once more after it spoke: its words are passed on before the job ends
    assert before == ([pytest.approx(health.ECHO_SECONDS, abs=0.5)] if waits else [])


@pytest.mark.parametrize(("left", "says"), [((1,), "rank 1 had left the job"), ((1, 3), "ranks 1, 3 had left the job")])
def test_who_left_is_named_at_once(left: tuple[int, ...], says: str) -> None:
    body = f"{COUNT_SLEEP}\nhealth.end_job_on_error(3, end, lambda patience: {left})\nraise HorovodInternalError('x')"
    code, output = run(body)
    assert code == 7
    assert says in output.split("HorovodInternalError: x\n")[1]
    assert "<slept" not in output[: output.index("ended the job")]


@pytest.mark.parametrize(("body", "code"), [("sys.exit(5)", 5), ("pass", 0)])
def test_an_ordinary_end_is_left_alone(body: str, code: int) -> None:
    assert run(body) == (code, "")


def test_control_c_ends_the_job_too() -> None:
    code, output = run("raise KeyboardInterrupt")
    assert code == 7
    assert "KeyboardInterrupt" in output
    assert "ended the job" not in output


def test_abort_ends_the_process_without_exit_handlers() -> None:
    code, output = run("import atexit\natexit.register(print, 'handler')\nhealth.abort(9)")
    assert (code, output) == (9, "")
