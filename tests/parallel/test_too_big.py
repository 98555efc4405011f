"""The model that one process has no room for, and two train."""

from __future__ import annotations

import re

import pytest

from tests.launcher import launch


def test_a_model_is_too_big_for_one_process() -> None:
    alone = launch(["examples/too_big.py"], ranks=1, launcher="alone", deadline_seconds=200)
    assert alone.returncode == 1, alone.output
    assert "the model does not fit 900 MB a process" in alone.output


@pytest.mark.parametrize("how", [(), ("--stages",)], ids=["features", "stages"])
def test_it_trains_on_two(how: tuple[str, ...]) -> None:
    output = launch(["examples/too_big.py", *how], ranks=2, launcher="mpirun", deadline_seconds=300).check()
    losses = [float(found) for found in re.findall(r"step \d  loss ([\d.]+)", output)]
    assert len(losses) == 3
    assert losses[-1] < losses[0]
    whole, held = map(int, re.search(r"weights (\d+) MB in all, (\d+) MB on this rank", output).groups())  # type: ignore[union-attr]
    assert whole * 4 > 900  # with gradients and two moments
    assert held <= 1.1 / 2 * whole
