"""The same plan gives the same bytes in every framework and with none; a run goes on from one into the next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hvdscale.data import ShardPlan
from tests.launcher import launch
from tests.parallel.one_plan import SHARDS, N, plans

# way, ranks, batches that rank r of the run reads, over (r + 1)
RELAY = [("torch", 2, 11), ("bare", 3, 4), ("tensorflow", 2, 5), ("keras", 1, 9)]
WAYS = [way for way, _, _ in RELAY]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one-plan")
    for way, ranks, batches in RELAY:
        command = ["-m", "tests.parallel.one_plan", str(folder), way, str(batches)]
        launch(command, ranks=ranks, env={"KERAS_BACKEND": "tensorflow"}).check()
        for old in folder.glob("state-*"):
            old.unlink()
        for new in folder.glob("next-state-*"):
            new.rename(folder / new.name.removeprefix("next-"))
    return folder


@pytest.mark.parametrize("name", plans())
def test_every_way_reads_the_same_bytes(folder: Path, name: str) -> None:
    plan = plans()[name]
    for shard in range(SHARDS):
        read = {way: (folder / f"{name}, shard {shard}, {way}").read_bytes() for way in WAYS}
        assert len(set(read.values())) == 1, f"shard {shard} differs"
        if isinstance(plan, ShardPlan) and plan.tail == "exact":
            assert read["torch"] == np.concatenate([plan.indices(shard, epoch) for epoch in (0, 1)]).tobytes()
        assert len(read["torch"]) > 0


def test_a_run_that_each_framework_takes_over_reads_every_sample_once(folder: Path) -> None:
    read = [tuple(each) for file in folder.glob("read by *") for each in json.loads(file.read_text())]
    assert len({file.name for file in folder.glob("read by *")}) == sum(ranks for _, ranks, _ in RELAY)
    rest = ShardPlan.resume([json.loads(file.read_text()) for file in sorted(folder.glob("state-*"))], 5)
    assert rest.first_epoch >= 1, "whole epochs were handed on"
    last = max(epoch for epoch, _ in read)
    for epoch in range(rest.first_epoch, last + 1):
        read += [(epoch, int(number)) for shard in range(5) for number in rest.indices(shard, epoch)]
    assert sorted(read) == [(epoch, number) for epoch in range(last + 1) for number in range(N)]
