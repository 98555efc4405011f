"""The launches of a bench: they start clean, and one that fails, hangs or does not agree is an error."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from ci.bench.harness import BenchError, Process, Variant, run_once
from ci.bench.local import local_variants
from ci.bench.pipeline import NAMES, ROLES
from ci.bench.turns import take_turns


def python(code: str, **env: str) -> Process:
    return Process((sys.executable, "-c", code), env)


def leaving(*steps: float, weights: Sequence[str | None] | None = None) -> Variant:
    """A variant whose rank r leaves the result ``steps[r]`` and ``weights[r]``."""
    code = "from ci.bench.workers.ranks import leave_result; leave_result({}, {!r}, step={})"
    processes = (python(code.format(r, weights[r] if weights else None, s)) for r, s in enumerate(steps))
    return Variant("ours", "ours", len(steps), tuple(processes))


def test_a_launch_counts_as_its_slowest_rank() -> None:
    assert run_once(leaving(0.25, 0.5), 30) == {"step": 0.5}


@pytest.mark.parametrize(
    ("variant", "says"),
    [
        (leaving(0.25, 0.5, weights=("a", "b")), "different weights"),
        (Variant("mute", "ours", 1, (python("pass"),)), "0 ranks left a result, 1 must"),
        (
            Variant("broken", "ours", 1, (python("raise SystemExit('no such model')"),)),
            r"(?s)ended with \[1\].*no such model",
        ),
    ],
    ids=["disagrees", "mute", "broken"],
)
def test_a_launch_that_does_not_do_its_work_is_an_error(variant: Variant, says: str) -> None:
    with pytest.raises(BenchError, match=says):
        run_once(variant, 30)


def test_a_launch_past_its_deadline_is_killed_with_its_children(tmp_path: Path) -> None:
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEP.format(str(tmp_path / 'pid'))!r}])"
    start = time.monotonic()
    with pytest.raises(BenchError, match="ran past its deadline of 3 s"):
        run_once(Variant("slow", "ours", 1, (python(child),)), 3)
    assert time.monotonic() - start < 20
    pid = int((tmp_path / "pid").read_text())
    end = time.monotonic() + 5
    while _lives(pid) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(pid)


def test_a_launch_starts_clean_of_an_outer_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "1")
    monkeypatch.setenv("HOROVOD_CYCLE_TIME", "9")
    code = (
        "import os; from ci.bench.workers.ranks import leave_result;"
        "names = {'OMPI_COMM_WORLD_RANK', 'HOROVOD_CYCLE_TIME', 'MINE'};"
        "leave_result(0, step=len(names & set(os.environ)))"
    )
    assert run_once(Variant("ours", "ours", 1, (python(code, MINE="1"),)), 30) == {"step": 1}


def stepping(name: str, file: Path, step: str, weights: str | None = None) -> Variant:
    """Two ranks that write a line into ``file`` at every step and then do ``step``."""
    code = (
        "import time; from ci.bench.workers.ranks import leave_result, median_seconds\n"
        f"def step():\n  open({str(file)!r}, 'a').write('{name}\\n'); {step}\n"
        f"leave_result({{0}}, {weights}, {{{{'part': {{0}}}}}}, step=median_seconds(step, 99, warmup=1))"
    )
    return Variant(name, "ours", 2, tuple(python(code.format(rank)) for rank in range(2)))


def test_variants_that_stay_alive_take_turns(tmp_path: Path) -> None:
    file = tmp_path / "steps"
    variants = [stepping("a", file, "time.sleep(0.01)"), stepping("b", file, "time.sleep(0.02)")]
    results = take_turns(variants, rounds=3, steps=2, deadline_seconds=30)
    names = file.read_text().split()
    assert names[4:] == (["a"] * 4 + ["b"] * 4) * 3  # of two ranks, after warming up
    assert {name: len(samples["step"]) for name, samples in results.samples.items()} == {"a": 3, "b": 3}
    assert results.median("b", "step") >= 0.02
    assert results.samples["a"]["part"] == [1.0] * 3  # the larger rank's


@pytest.mark.parametrize(
    ("step", "weights", "says"),
    [
        ("raise SystemExit('no such model')", None, r"(?s)ended before its first turn.*no such model"),
        ("open(FILE).read().count('a') < 5 or exit('out of data')", None, r"(?s)in the middle of a turn.*out of data"),
        ("pass", "{0}", "different weights"),
    ],
    ids=["start", "turn", "disagrees"],
)
def test_a_variant_that_cannot_take_its_turn_is_an_error(
    tmp_path: Path, step: str, weights: str | None, says: str
) -> None:
    file = tmp_path / "steps"
    with pytest.raises(BenchError, match=says):
        take_turns([stepping("a", file, step.replace("FILE", repr(str(file))), weights)], 3, 2, 30)


def test_a_peer_that_does_not_start_is_told_about_and_left_out() -> None:
    failures: list[str] = []
    peer = Variant("theirs", "peer", 1, (python("raise SystemExit('no such strategy')"),))
    with pytest.raises(BenchError, match="no such strategy"):
        take_turns([peer], 1, 1, 30)
    results = take_turns([peer], 1, 1, 30, failures)
    assert (results.variants, dict(results.samples)) == ((), {})
    assert len(failures) == 1
    assert "theirs ended before its first turn" in failures[0]
    assert "no such strategy" in failures[0]
    with pytest.raises(BenchError, match="no such strategy"):  # one of ours must start
        take_turns([replace(peer, role="ours")], 1, 1, 30, failures)


def test_every_way_of_the_pipeline_bench_is_timed_for_what_it_is_asked() -> None:
    roles = {way: role for way, role in ROLES.items() if way != "torch"}  # torch's own is not ours to test
    variants, _ = local_variants("ci.bench.workers.pipeline", 2, roles, NAMES, 1)
    samples = take_turns(variants, rounds=1, steps=1, deadline_seconds=120).samples
    assert {name: list(by_metric) for name, by_metric in samples.items()} == {
        NAMES["independent"]: ["m=4", "m=8", "m=16"],
        NAMES["1f1b"]: ["m=4", "m=8", "m=16"],
        NAMES["zb"]: ["m=4"],
    }
    assert all(seconds > 0 for by_metric in samples.values() for (seconds,) in by_metric.values())


SLEEP = "import os, time; open({!r}, 'w').write(str(os.getpid())); time.sleep(60)"


def _lives(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
