"""Promises of embeddings whose rows few ranks look up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hvdscale.errors import PlanError
from hvdscale.runtime.transport import Transport
from hvdscale.sync import Gossip, LocalSGD, Rounds
from tests.core.numpy_store import NumPyStore, NumPyTensors
from tests.core.trainer import HostedChannel, on_ranks

MOVES = {0: {0: 8.0, 1: 1.0}, 1: {1: 3.0}, 2: {1: 2.0, 2: 4.0}, 3: {2: 4.0}}  # rank -> row -> by how much
MEANS = {"all": [2.0, 1.5, 2.0, 0.0], "touched": [8.0, 2.0, 4.0, 0.0]}
NODES: dict[str, Any] = {"groups": "node", "across": 1}


@pytest.mark.parametrize("arguments", [{}, NODES, {"wire": "int8"}], ids=["flat", "nodes", "int8"])
@pytest.mark.parametrize("rows", ["all", "touched"])
def test_a_row_becomes_the_mean_of_those_that_count(rows: Any, arguments: dict[str, Any]) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray]:
        arrays = {"words": np.ones((4, 2), np.float32), "w": np.zeros((3, 2), np.float32)}
        store = NumPyStore(NumPyTensors(arrays, {"words": "embedding"}))
        rounds = Rounds(LocalSGD(1, rows=rows, **arguments), store, HostedChannel(transport))
        rounds.before_step()
        for row, by in MOVES[transport.rank].items():
            arrays["words"][row] += by
        arrays["w"] += transport.rank
        rounds.after_step()
        return arrays["words"], arrays["w"]

    for words, w in on_ranks(4, body):
        np.testing.assert_allclose(words, 1 + np.array(MEANS[rows])[:, None] * [1, 1], rtol=1e-6)
        np.testing.assert_allclose(w, 1.5, rtol=0.01)  # what is no embedding is the mean of all


def test_rows_are_told_apart_where_a_node_has_met_before() -> None:
    """Row 0 was moved by one rank, in a round of its node; between nodes only that node counts."""

    def body(transport: Transport) -> np.ndarray:
        arrays = {"words": np.ones((4, 2), np.float32)}
        store = NumPyStore(NumPyTensors(arrays, {"words": "embedding"}))
        plan = LocalSGD(1, rows="touched", groups="node", across=2)
        rounds = Rounds(plan, store, HostedChannel(transport))
        for step in range(2):
            rounds.before_step()
            for row, by in MOVES[transport.rank].items() if step == 0 else ():
                arrays["words"][row] += by
            rounds.after_step()
        return arrays["words"][:, 0] - 1

    for moved in on_ranks(4, body):
        np.testing.assert_allclose(moved, [8.0, 2.0, 4.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    ("plan", "arguments", "rule"),
    [
        (LocalSGD, {"every": 4, "rows": "some"}, "rows is one of 'all', 'touched'; it is 'some'"),
        (LocalSGD, {"every": 4, "rows": "touched", "overlap": 1}, 'Use overlap=0 and merge="adopt"'),
        (LocalSGD, {"every": 4, "rows": "touched", "merge": "mix"}, 'Use overlap=0 and merge="adopt"'),
        (Gossip, {"rows": "touched"}, "Gossip mixes weights"),
    ],
)
def test_rows_that_cannot_be_told_apart(plan: Any, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(PlanError, match=rule):
        plan(**arguments)
