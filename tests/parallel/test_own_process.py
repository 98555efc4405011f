"""What shows only in a process of its own: what imports load and say, and how the command line ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from hvdscale.runtime.fencing import Process
from hvdscale.runtime.memory import uses_glibc
from tests.core.test_imports import FRAMEWORKS, modules, name_of


def test_import_of_the_package_is_light() -> None:
    """How long it takes is shown by ci/bench/overhead."""
    code = "import sys; before = set(sys.modules)\nimport hvdscale\nprint(*set(sys.modules) - before)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in shown.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) == {"hvdscale"}


def test_import_of_the_whole_core_loads_no_framework() -> None:
    names = [name_of(path).removesuffix(".py").replace("/", ".") for path in modules("hvdscale")]
    names = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not FRAMEWORKS & set(json.loads(shown.stdout))


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, json\n"
        "from hvdscale.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(json.dumps(sorted(sys.modules)))"
    )
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(json.loads(shown.stdout.splitlines()[-1]))
    assert "hvdscale.cli.main" in loaded
    assert not {"torch", "tensorflow", "keras", "horovod", "mpi4py", "numpy", "rich"} & loaded


def test_an_error_of_the_system_is_one_message(tmp_path: Path) -> None:
    """A cache that cannot be made: its parent is a file."""
    (tmp_path / "file").touch()
    shown = subprocess.run(
        [sys.executable, "-m", "hvdscale", "build-horovod"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert shown.returncode == 1
    assert shown.stderr.startswith("hvdscale: ")
    assert str(tmp_path / "file") in shown.stderr
    assert "Traceback" not in shown.stderr


def test_a_reader_that_leaves_is_not_an_error_message(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.touch()
    command = f"{sys.executable} -m hvdscale run -np 2 --dry-run {script} | true"
    shown = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=180, check=False)
    assert shown.stderr == ""


# A framework that writes a notice and a warning, below Python, when it is imported.
SCRIPT = r"""
import os, sys, pathlib
from hvdscale.runtime.console import quiet_import
pathlib.Path("noisy.py").write_text(
    "import os\nos.write(2, b'I0000 loaded\\nW0000 careful\\n')\nif os.environ.get('BROKEN'): raise ImportError('no')\n"
)
sys.path.insert(0, ".")
{before}
try:
    with quiet_import("noisy"):
        import noisy
except ImportError as error:
    print("import failed:", error)
os.write(2, b"I0000 after\n")
assert set(os.listdir("/proc/self/fd")) <= {"0", "1", "2", "3"}, "a file stayed open"  # 3: the listing itself
print(os.environ.get("TF_CPP_MIN_LOG_LEVEL"))
"""

CASES = {
    "by default": ({}, "", "W0000 careful\nI0000 after\n", "1\n"),
    "the user asked for all": ({"TF_CPP_MIN_LOG_LEVEL": "0"}, "", "I0000 loaded\nW0000 careful\nI0000 after\n", "0\n"),
    "the user's level stays": ({"TF_CPP_MIN_LOG_LEVEL": "2"}, "", "W0000 careful\nI0000 after\n", "2\n"),
    "imported already": ({}, "import noisy", "I0000 loaded\nW0000 careful\nI0000 after\n", "None\n"),
    "the import fails": ({"BROKEN": "1"}, "", "W0000 careful\nI0000 after\n", "import failed: no\n1\n"),
}


@pytest.mark.parametrize("name", CASES)
def test_an_import_is_quiet(name: str, tmp_path: Path) -> None:
    env, before, errors, output = CASES[name]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{before}", before)],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )
    assert (done.stderr, done.stdout) == (errors, output)


def test_only_the_process_that_was_meant_is_ended() -> None:
    show = "from hvdscale.runtime.fencing import Process; print(Process.own().encode().decode(), flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", show], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        own, other = Process.own(), Process.read(child.stdout.readline())
        assert other.number == child.pid
        for wrong in (own, replace(other, started=other.started + 1), replace(other, place="another boot")):
            assert not own.end(wrong)
        assert child.poll() is None
        assert own.end(other)
        assert child.wait(20) == -signal.SIGKILL
    assert not own.end(other)


# A step takes, touches and frees 32 buffers of 1 MiB; the second one's page faults.
_STEPS = """
import ctypes, os, resource, sys
from hvdscale.runtime.launch import Launch
from hvdscale.runtime.settings import put_in_force

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def step():
    buffers = [libc.malloc(1 << 20) for _ in range(32)]
    for buffer in buffers:
        ctypes.memset(buffer, 1, 1 << 20)
    for buffer in reversed(buffers):
        libc.free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

if sys.argv[1:] == ["settings"]:
    put_in_force(Launch("none", "single"), {}, mpi_running=False)
print(-(step() - step()))
"""


def faults_of_a_step(*arguments: str) -> int:
    run = [sys.executable, "-c", _STEPS, *arguments]
    return int(subprocess.run(run, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(not uses_glibc(), reason="the settings are for glibc's malloc")
def test_memory_that_a_step_frees_is_there_for_the_next() -> None:
    assert faults_of_a_step("settings") < 0.2 * faults_of_a_step()
