"""A team's sums are the same bits on every rank, whatever the size of the array, and close to the true sum."""

from __future__ import annotations

import numpy as np
import pytest

from hvdscale.errors import TransportError
from hvdscale.runtime.team import Team, open_team
from hvdscale.runtime.transport import LoopbackTransport, SoloTransport, Transport, run_loopback


def never(groups: object) -> list:
    raise AssertionError("threads need no process set")


def numbers(rank: int, *shape: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(rank).normal(size=shape).astype(dtype)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (5, 3), (0, 3), (101, 67)], ids=str)  # the last one goes in shares
def test_sums_and_maxima(ranks: int, dtype: str, shape: tuple[int, ...]) -> None:
    def body(transport: Transport) -> tuple[np.ndarray, np.ndarray, np.ndarray, bool]:
        team = open_team([range(ranks)], transport, lambda groups: [_All(transport.ranks)])
        own = numbers(transport.rank, *shape, dtype=dtype)
        kept = own.copy()
        return team.add(own), team.largest(own), team.first(own), bool((own == kept).all())

    everyone = [numbers(rank, *shape, dtype=dtype) for rank in range(ranks)]
    results = run_loopback(ranks, body)
    for result in results:
        assert not isinstance(result, Exception), result
        total, most, first, untouched = result
        assert total.shape == shape
        assert total.dtype == dtype
        assert untouched
        assert total.tobytes() == results[0][0].tobytes()  # type: ignore[index]
        np.testing.assert_allclose(total, np.sum(np.float64(everyone), axis=0), rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(most, np.max(everyone, axis=0))
        np.testing.assert_array_equal(first, everyone[0])


class _All:
    """A process set of these ranks."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks

    def rank(self) -> None:
        return None

    def size(self) -> None:
        return None


def test_groups_exchange_apart_and_parts_may_be_uneven() -> None:
    groups = [(0, 2), (1, 3)]

    def body(transport: Transport) -> tuple[tuple[int, ...], float, list[list[float]]]:
        team = open_team(groups, transport, lambda groups: [_All(tuple(g)) for g in groups])
        shapes = [(1,), (2,)]
        parts = team.collect(np.full(shapes[team.rank], float(transport.rank)), shapes)
        return team.ranks, float(team.add(np.float64(transport.rank))), [list(part) for part in parts]

    assert run_loopback(4, body) == [
        ((0, 2), 2.0, [[0.0], [2.0, 2.0]]),
        ((1, 3), 4.0, [[1.0], [3.0, 3.0]]),
        ((0, 2), 2.0, [[0.0], [2.0, 2.0]]),
        ((1, 3), 4.0, [[1.0], [3.0, 3.0]]),
    ]


def test_a_team_of_one_sends_nothing() -> None:
    team = open_team([[0]], SoloTransport(), never)
    assert (team.size, team.sent_bytes) == (1, 0)
    values = np.arange(3.0)
    total = team.add(values)
    assert (total == values).all()
    assert total is not values


def test_arrays_of_other_sizes_are_an_error() -> None:
    def body(transport: LoopbackTransport) -> None:
        team: Team = open_team([[0, 1]], transport, lambda groups: [_All((0, 1))])
        team.add(np.zeros(3 + transport.rank))

    results = run_loopback(2, body)  # type: ignore[arg-type]
    assert all(isinstance(result, TransportError) for result in results), results
