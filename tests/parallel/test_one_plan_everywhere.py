"""The same plan gives the same bytes in every framework and with none; a run goes on from one into the next."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hvdscale.data import ShardPlan
from tests.launcher import launch
from tests.parallel.one_plan import BATCHES, SHARDS, N, plans

# ranks, the backend of Keras, ways; one way after the other is a leg of the run
LAUNCHES = [(2, "torch", ["torch", "keras"]), (3, "", ["bare"]), (2, "tensorflow", ["tensorflow", "keras"])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, leg = tmp_path_factory.mktemp("one-plan"), 0
    for ranks, backend, ways in LAUNCHES:
        command = ["-m", "tests.parallel.one_plan", str(folder), str(leg), *ways]
        launch(command, ranks=ranks, env={"KERAS_BACKEND": backend}).check()
        leg += len(ways)
    return folder


@pytest.mark.parametrize("name", plans())
def test_every_way_reads_the_same_bytes(folder: Path, name: str) -> None:
    plan = plans()[name]
    for shard in range(SHARDS):
        read = [(folder / f"{name}, shard {shard}, leg {leg}").read_bytes() for leg in range(len(BATCHES))]
        assert len(read[0]) > 0
        assert len(set(read)) == 1, f"shard {shard} differs"
        if isinstance(plan, ShardPlan) and plan.tail == "exact":
            assert read[0] == np.concatenate([plan.indices(shard, epoch) for epoch in (0, 1)]).tobytes()


def test_a_run_that_each_framework_takes_over_reads_every_sample_once(folder: Path) -> None:
    read = [tuple(each) for file in folder.glob("read *") for each in json.loads(file.read_text())]
    last_states = sorted(folder.glob(f"state {len(BATCHES) - 1} *"))
    rest = ShardPlan.resume([json.loads(file.read_text()) for file in last_states], 5)
    assert rest.first_epoch >= 1, "whole epochs were handed on"
    last = max(epoch for epoch, _ in read)
    for epoch in range(rest.first_epoch, last + 1):
        read += [(epoch, int(number)) for shard in range(5) for number in rest.indices(shard, epoch)]
    assert sorted(read) == [(epoch, number) for epoch in range(last + 1) for number in range(N)]
