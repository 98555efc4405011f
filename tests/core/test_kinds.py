"""What ranks send for one variable: the most that any of them has, known to all."""

from __future__ import annotations

from typing import Any

import pytest

from hvdscale.runtime.transport import SoloTransport, Transport, run_loopback
from hvdscale.sync import Kind, common_kinds

NONE, SPARSE, DENSE = Kind.NONE, Kind.SPARSE, Kind.DENSE


def agreed(*ranks: list[Kind]) -> list[Any]:
    def body(transport: Transport) -> tuple[Kind, ...]:
        return common_kinds(ranks[transport.rank], transport)

    return run_loopback(len(ranks), body, timeout_seconds=10)


@pytest.mark.parametrize(
    ("ranks", "common"),
    [
        ([[NONE], [NONE]], (NONE,)),
        ([[NONE], [SPARSE]], (SPARSE,)),
        ([[DENSE], [NONE]], (DENSE,)),
        ([[SPARSE], [DENSE]], (DENSE,)),
        ([[SPARSE], [NONE], [SPARSE]], (SPARSE,)),
        ([[NONE, DENSE, SPARSE], [SPARSE, NONE, SPARSE], [NONE, NONE, NONE]], (SPARSE, DENSE, SPARSE)),
        ([[], []], ()),
    ],
)
def test_the_greatest_is_what_all_send(ranks: list[list[Kind]], common: tuple[Kind, ...]) -> None:
    results = agreed(*ranks)
    assert results == [common] * len(ranks)
    assert all(type(kind) is Kind for result in results for kind in result)


def test_alone_it_is_ones_own() -> None:
    assert common_kinds([SPARSE, NONE, DENSE], SoloTransport()) == (SPARSE, NONE, DENSE)


def test_lists_of_different_lengths_are_an_error_on_every_rank() -> None:
    assert [type(result) for result in agreed([DENSE], [DENSE, NONE])] == [ValueError, ValueError]
