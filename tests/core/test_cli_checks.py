"""What ``hvdscale doctor`` takes for proof that ranks agree after ``fit``."""

from __future__ import annotations

import pytest

from hvdscale.cli.checks.fit import judge
from hvdscale.errors import DesyncError


@pytest.mark.parametrize(
    ("apart", "moved", "apart_at_start", "says"),
    [
        (0.3, 0.5, 1.0, "gradients were not averaged"),
        (0.0, 0.0, 1.0, "applied no gradients"),
        (0.0, 0.5, 0.0, "would prove nothing"),
        (float("nan"), 0.5, 1.0, "gradients were not averaged"),
        (0.0, float("nan"), 1.0, "applied no gradients"),
    ],
)
def test_ranks_that_do_not_agree_are_seen(apart: float, moved: float, apart_at_start: float, says: str) -> None:
    with pytest.raises(DesyncError, match=says):
        judge(apart, moved, apart_at_start)


@pytest.mark.parametrize("apart", [0.0, 1e-8])
def test_ranks_that_agree_and_moved_are_well(apart: float) -> None:
    judge(apart, moved=0.5, apart_at_start=1.0)
