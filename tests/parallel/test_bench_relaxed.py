"""The bench of relaxed synchronisation runs: on ranks of this machine, without links between them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_a_plan_and_its_limit_are_measured(tmp_path: Path) -> None:
    words = ("--rates", "none", "--ways", "local SGD, 1", "--steps", "2", "--json", str(tmp_path / "out.json"))
    done = subprocess.run(
        (sys.executable, "-m", "ci.bench.relaxed_links", *words), capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads((tmp_path / "out.json").read_text())["seconds"]["None"]
    assert list(measured) == ["no communication", "local SGD, 1"]
    assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in measured.values())
    assert "local SGD, 1" in done.stdout
