"""Promises of the timeline: a trace per rank that opens, whole or cut off, on one clock; nothing when off."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdscale.cli.main import main
from hvdscale.errors import StateError, WorldError
from hvdscale.runtime import timeline
from hvdscale.runtime.channel import SoloChannel
from hvdscale.runtime.timeline import VARIABLE, Timeline, open_together, path_of_rank
from hvdscale.runtime.trace import merge, read, spent
from hvdscale.runtime.transport import SoloTransport, Transport, run_loopback
from hvdscale.sync import LocalSGD, Rounds
from tests.core.numpy_store import NumPyStore, NumPyTensors


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    timeline.stop()


def train(steps: int, overlap: int = 0) -> None:
    store = NumPyStore(NumPyTensors({"w": np.ones((4, 4), np.float32)}))
    rounds = Rounds(LocalSGD(2, overlap=overlap), store, SoloChannel())
    for _ in range(steps):
        rounds.before_step()
        rounds.after_step()
    rounds.flush()


def names(events: list[dict[str, Any]], track: int) -> list[str]:
    return [e["name"] for e in events if e["ph"] == "B" and e["tid"] == track]


@pytest.mark.parametrize(
    ("path", "of_rank_3"),
    [("trace.json", "trace.rank3.json"), ("runs/a.b.json", "runs/a.b.rank3.json"), ("trace", "trace.rank3.json")],
)
def test_each_rank_has_a_file_of_its_own(path: str, of_rank_3: str) -> None:
    assert path_of_rank(path, 3) == Path(of_rank_3)


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_trace_shows_steps_and_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overlap: int) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "new" / "trace.json"))
    timeline.start(SoloTransport())
    train(5, overlap)
    timeline.stop()
    events = json.loads((tmp_path / "new" / "trace.rank0.json").read_text())  # strictly JSON
    training, under_way = names(events, 0), names(events, 1)
    steps = [e["args"]["step"] for e in events if e["ph"] == "B" and e["name"] in ("start", "compute")]
    assert set(steps) == set(range(1, 7))
    assert training[0] == "start"
    assert steps == sorted(steps)
    assert training.count("arrive") == under_way.count("transfer") == 3  # two rounds, and what flush() had left
    assert {"depart", "wait"} <= set(training)
    for track in (0, 1):
        phases = [e["ph"] for e in events if e["tid"] == track and e["ph"] in "BE"]
        assert phases.count("B") == phases.count("E")
    times = [e["ts"] for e in events if e["ph"] in "BE" and e["tid"] == 0]
    assert times == sorted(times)


def test_without_the_variable_nothing_is_made_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    timeline.start(SoloTransport())
    assert timeline.span("wait", round=1) is timeline.span("arrive") is timeline.travel("transfer")
    train(5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("cut_bytes", [0, 1, 17])
def test_a_killed_rank_leaves_what_it_was_doing(tmp_path: Path, cut_bytes: int) -> None:
    killed = Timeline(tmp_path / "trace.json", 4)  # never closed
    killed.step()
    with killed.travel("transfer"), killed.span("wait"):
        text = (tmp_path / "trace.json").read_bytes()
    (tmp_path / "trace.json").write_bytes(text[: len(text) - cut_bytes])
    events = read(tmp_path / "trace.json")
    assert names(events, 0) == ["start", "compute", "wait"][: 3 if cut_bytes < 2 else 2]
    assert names(events, 1) == ["transfer"]
    assert events[-1]["ph"] == "B" or cut_bytes


def test_ranks_share_one_clock_and_a_variable_that_reached_one_of_them(tmp_path: Path) -> None:
    def body(transport: Transport) -> Timeline | None:
        env = {VARIABLE: str(tmp_path / "trace.json")} if transport.rank == 1 else {}
        return open_together(transport, env)

    opened = run_loopback(3, body)
    origins = []
    for rank, mine in enumerate(opened):
        assert isinstance(mine, Timeline)
        assert mine.path == tmp_path / f"trace.rank{rank}.json"
        mine.close()
        origins.append(mine.origin_ns)
        (facts,) = (e["args"] for e in read(mine.path) if e.get("name") == "hvdscale")
        assert facts["ranks"] == 3
        within_us = facts["clocks_agree_within_us"]
    assert (max(origins) - min(origins)) / 1000 <= within_us  # threads of one process have one clock


def test_a_file_one_rank_cannot_write_is_said_on_every_rank(tmp_path: Path) -> None:
    (tmp_path / "trace.rank1.json").mkdir()

    def body(transport: Transport) -> Timeline | None:
        return open_together(transport, {VARIABLE: str(tmp_path / "trace.json")})

    for error in run_loopback(2, body):
        assert isinstance(error, WorldError)
        assert "rank 1 cannot write" in str(error)


def test_a_full_disk_ends_the_trace_and_not_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = Timeline(tmp_path / "trace.json", 0)

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hvdscale.runtime.timeline.os.write", full)
    with pytest.warns(UserWarning, match="No space left"):
        mine.step()
    mine.step()  # and says it once
    mine.close()


MIXED = [
    ("B", 0, 0, "compute"),
    ("B", 1, 1, "transfer"),
    ("E", 3, 0, ""),
    ("B", 3, 0, "wait"),
    ("E", 5, 1, ""),
    ("E", 6, 0, ""),
    ("B", 6, 0, "compute"),
    ("E", 10, 0, ""),
]


def test_time_is_computing_or_rounds_and_what_is_under_way_hides_behind_computing() -> None:
    events = [{"ph": ph, "ts": at * 1e6, "pid": 2, "tid": tid, "name": name} for ph, at, tid, name in MIXED]
    (seconds,) = spent([{"ph": "M", "pid": 2}, *events]).values()
    assert (seconds.computing, seconds.rounds, seconds.under_way, seconds.hidden) == (7, 3, 4, 2)


def test_traces_of_ranks_become_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [tmp_path / f"trace.rank{rank}.json" for rank in range(2)]
    open_traces = [Timeline(file, rank) for rank, file in enumerate(files)]
    for mine in open_traces:
        mine.step()
    open_traces[0].close()  # and rank 1 was killed
    assert main(["timeline", *map(str, files), "--merge", str(tmp_path / "all.json")]) == 0
    assert "computing" in capsys.readouterr().out
    events = json.loads((tmp_path / "all.json").read_text())
    assert {e["pid"] for e in events} == {0, 1}
    assert sorted(map(str, events)) == sorted(map(str, [*read(files[0]), *read(files[1])]))
    times = [e["ts"] for e in events if "ts" in e]
    assert times == sorted(times)


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    Timeline(tmp_path / "a.json", 0).close()
    for name, text in {"b.json": (tmp_path / "a.json").read_text(), "c.json": "{}", "d.json": "no"}.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(StateError, match="both hold rank 0"):
        merge([tmp_path / "a.json", tmp_path / "b.json"])
    for name in ("c.json", "d.json"):
        with pytest.raises(StateError, match="no Chrome trace"):
            read(tmp_path / name)
