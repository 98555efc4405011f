"""Cutting a batch, and what ranks tell each other before a step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from hvdscale.errors import DesyncError, PlanError
from hvdscale.model.batch import Claim, agree_on_batch, cut
from hvdscale.runtime.transport import SoloTransport, run_loopback


@pytest.mark.parametrize(
    ("samples", "microbatches", "sizes"),
    [(8, 4, [2, 2, 2, 2]), (7, 4, [2, 2, 2, 1]), (9, 4, [3, 2, 2, 2]), (3, 4, [1, 1, 1]), (5, 1, [5])],
)
def test_pieces_are_as_equal_as_can_be(samples: int, microbatches: int, sizes: list[int]) -> None:
    pieces = cut(samples, microbatches)
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(samples))


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(PlanError, match="at least one sample"):
        cut(0, 2)


FIRST = Claim("train", x="float32[8, 2]", samples=8)
LAST = Claim("train", y="int64[8]", samples=8)
ALL = Claim("train", x="float32[8, 2]", y="int64[8]", samples=8)


def told(*claims: Claim, targets: bool = True, abreast: int = 1) -> list[Any]:
    return run_loopback(len(claims), lambda t: agree_on_batch(t, claims[t.rank], targets, abreast), timeout_seconds=5)


@pytest.mark.parametrize("claims", [(FIRST, LAST), (ALL, ALL), (FIRST, Claim("train"), LAST)])
def test_each_stage_may_bring_what_it_reads(claims: tuple[Claim, ...]) -> None:
    assert told(*claims) == [ALL] * len(claims)


@pytest.mark.parametrize(
    ("claims", "error", "rule"),
    [
        ((FIRST, FIRST), PlanError, "last stage reads the target; rank 1"),
        ((LAST, LAST), PlanError, "first stage reads the input; rank 0"),
        ((FIRST, replace(LAST, samples=7)), DesyncError, "'samples' rank 0 has 8 and rank 1 7"),
        ((ALL, replace(ALL, x="float32[8, 3]")), DesyncError, "rank 1 float32"),
        ((FIRST, replace(LAST, does="evaluate")), DesyncError, "train and rank 1 evaluate"),
        ((FIRST, Claim("train", error="the target has 7 rows")), PlanError, "rank 1: the target has 7 rows"),
    ],
)
def test_every_rank_is_told_the_same(claims: tuple[Claim, ...], error: type[Exception], rule: str) -> None:
    results = told(*claims)
    assert [type(result) for result in results] == [error] * len(claims)
    assert len({str(result) for result in results}) == 1
    assert rule in str(results[0])


def test_pipelines_abreast_read_the_same_values() -> None:
    firsts, lasts = (replace(FIRST, x_digest="a"), replace(LAST, y_digest="b"))
    assert told(firsts, firsts, lasts, lasts, abreast=2) == [ALL] * 4
    for claims, rule in (
        ((firsts, replace(FIRST, x_digest="c"), lasts, lasts), "for 'the values of x' rank 0 has a and rank 1 c"),
        ((firsts, firsts, replace(LAST, y_digest="c"), lasts), "for 'the values of y' rank 2 has c and rank 3 b"),
        ((firsts, Claim("train"), lasts, lasts), "first stage reads the input; rank 1"),
        ((firsts, firsts, Claim("train"), lasts), "last stage reads the target; rank 2"),
    ):
        assert all(rule in str(result) for result in told(*claims, abreast=2))


def test_one_rank_has_both_ends() -> None:
    assert agree_on_batch(SoloTransport(), ALL, True) == ALL
    with pytest.raises(PlanError, match="last stage reads the target"):
        agree_on_batch(SoloTransport(), FIRST, True)
    assert agree_on_batch(SoloTransport(), FIRST, False) == FIRST
