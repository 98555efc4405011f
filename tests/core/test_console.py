"""Start-up notices are kept off the screen; warnings, errors and the user's own choice are not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hvdscale.runtime.console import is_notice

LINES = [
    ("WARNING: All log messages before absl::InitializeLog() is called are written to STDERR", True),
    ("I0000 00:00:1.2 15304 port.cc:153] oneDNN custom operations are on.", True),
    ("To enable the following instructions: AVX2 FMA, in other operations, rebuild TensorFlow", True),
    ("E0000 00:00:1.2 1 cuda_fft.cc:477] Unable to register cuFFT factory", True),
    ("W0000 00:00:1.2 1 allocator.cc:1] Allocation exceeds 10% of free memory.", False),
    ("E0000 00:00:1.2 1 loader.cc:1] Could not load library", False),
    ("UserWarning: Important", False),
    ("", False),
]


@pytest.mark.parametrize(("line", "notice"), LINES, ids=lambda v: v[:30] if isinstance(v, str) else "")
def test_what_a_notice_is(line: str, notice: bool) -> None:
    assert is_notice(line) is notice


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
def test_an_import_is_quiet(name: str, tmp_path: pytest.TempPathFactory) -> None:
    env, before, errors, output = CASES[name]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("{before}", before)],
        cwd=str(tmp_path),
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (done.stderr, done.stdout) == (errors, output)
