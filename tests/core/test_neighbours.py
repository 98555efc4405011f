"""Lists of arrays added up in shared memory, on threads: the same bits everywhere, and nothing read too late."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import DesyncError, TransportError
from hvdscale.runtime.neighbours import Neighbours, packed_bytes
from hvdscale.runtime.shared_memory import shared_rows
from hvdscale.runtime.transport import Transport, run_loopback


class Numbers:
    """``MPITransport.start_numbers`` among threads: a number is told at once, and waited for later."""

    def __init__(self, rank: int, size: int, told: dict[int, dict[int, int]], news: threading.Condition) -> None:
        self.rank, self.size, self.ranks = rank, size, tuple(range(size))
        self._told, self._news, self._calls = told, news, 0

    def start_numbers(self, number: int) -> Callable[[], np.ndarray]:
        call, self._calls = self._calls, self._calls + 1
        with self._news:
            self._told.setdefault(call, {})[self.rank] = number
            self._news.notify_all()

        def numbers() -> np.ndarray:
            with self._news:
                assert self._news.wait_for(lambda: len(self._told[call]) == self.size, timeout=10)
            return np.array([self._told[call][rank] for rank in self.ranks], np.int64)

        return numbers


def run(size: int, room: int, body: Callable[[Neighbours, int], Any]) -> list[Any]:
    """``body(neighbours, rank)`` on every rank; what it returned or raised."""
    told: dict[int, dict[int, int]] = {}
    news = threading.Condition()

    def rank_of(transport: Transport) -> Any:
        rows = shared_rows(transport, 2 * size, room)
        assert rows is not None
        return body(Neighbours(Numbers(transport.rank, size, told, news), rows.reshape(2, size, -1)), transport.rank)

    return run_loopback(size, rank_of, timeout_seconds=20)


SHAPES = [(3, 5), (), (0,), (1000,), (2, 1, 7)]


def lists(rank: int, steps: int, dtype: Any) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(rank)
    return [[np.asarray(rng.normal(size=shape), dtype) for shape in SHAPES] for _ in range(steps)]


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("dtypes", [[np.float32], [np.float64], [np.float32, np.float64]], ids=str)
@pytest.mark.parametrize(("before", "after"), [(1.0, 1.0), (1.0, 1 / 3), (0.25, 4.0)])
def test_sums_are_the_oracles_and_equal_bit_for_bit(
    size: int, dtypes: Sequence[Any], before: float, after: float
) -> None:
    steps = 5  # more than there are rows

    def train(neighbours: Neighbours, rank: int) -> list[list[np.ndarray]]:
        results = []
        for parts in zip(*(lists(rank, steps, dtype) for dtype in dtypes), strict=True):
            arrays = [array for part in parts for array in part]
            arrays[0] = np.asfortranarray(arrays[0])  # of any layout
            sums = [np.empty_like(array) for array in arrays]
            neighbours.start(arrays, before, after)(sums)
            results.append(sums)
        return results

    ranks = run(size, 1 << 16, train)
    for step in range(steps):
        place = 0
        for dtype in dtypes:
            everyones = [lists(rank, steps, dtype)[step] for rank in range(size)]
            for arrays in zip(*everyones, strict=True):
                expected = sum(array.astype(np.float64) * before for array in arrays) * after
                first = ranks[0][step][place]
                assert first.dtype == dtype
                np.testing.assert_allclose(first, expected, rtol=1e-5 if dtype == np.float32 else 1e-14, atol=1e-6)
                for other in ranks[1:]:
                    np.testing.assert_array_equal(first, other[step][place])
                place += 1


def test_a_slow_rank_still_reads_what_was_sent_to_it() -> None:
    """Rank 0 is as far ahead as it can be: it may not write over what rank 1 has not read."""
    steps = 6
    gate = threading.Semaphore(0)

    def train(neighbours: Neighbours, rank: int) -> list[float]:
        seen = []
        for step in range(steps):
            values = np.full(1000, step + 1.0, np.float32)
            if rank == 1 and step:
                gate.acquire(timeout=0.05)  # rank 0 has gone on by then, if anything lets it
            finish = neighbours.start([values])
            if rank == 0:
                gate.release()
            finish([values])
            seen.append((values.min(), values.max()))
        return seen

    for seen in run(2, 4096, train):
        assert seen == [(2 * step, 2 * step) for step in range(1, steps + 1)]


def test_sums_may_overwrite_and_what_was_begun_may_be_thrown_away() -> None:
    def train(neighbours: Neighbours, rank: int) -> np.ndarray:
        neighbours.start([np.full(4, 100.0)])  # a step that was given up
        values = np.full(4, rank + 1.0)
        neighbours.start([values])([values])
        return values

    for values in run(2, 4096, train):
        np.testing.assert_array_equal(values, np.full(4, 3.0))


def test_a_list_that_others_were_begun_over_is_refused() -> None:
    def train(neighbours: Neighbours, rank: int) -> np.ndarray:
        finishes = [neighbours.start([np.full(4, value)]) for value in (1.0, 10.0, 100.0)]
        values = np.zeros(4)
        for finish in finishes[:2]:
            with pytest.raises(TransportError, match="after list 3 was started"):
                finish([values])
        finishes[2]([values])
        return values

    for values in run(2, 4096, train):
        np.testing.assert_array_equal(values, np.full(4, 200.0))


@pytest.mark.parametrize(
    "odd",
    [[np.zeros(4, np.float32)], [np.zeros((2, 2))], [np.zeros(4), np.zeros(1)], []],
    ids=["dtype", "shape", "one more", "none"],
)
def test_different_lists_are_told_on_every_rank(odd: list[np.ndarray]) -> None:
    def differ(neighbours: Neighbours, rank: int) -> None:
        arrays = odd if rank == 2 else [np.zeros(4)]
        neighbours.start(arrays)([a.copy() for a in arrays])

    errors = run(3, 4096, differ)
    assert {type(error) for error in errors} == {DesyncError}
    assert {str(error) for error in errors} == {str(errors[0])}
    assert "Ranks [0, 1] and [2] reduce different gradients" in str(errors[0])


@pytest.mark.parametrize(("sizes", "fits"), [([(1024, 4)], True), ([(1000, 4), (17, 4)], False), ([], True)])
def test_room(sizes: list[tuple[int, int]], fits: bool) -> None:
    assert packed_bytes([(1, 4), (17, 4), (0, 8)]) == 64 + 128
    assert run(2, 4096, lambda neighbours, rank: neighbours.fit(sizes)) == [fits, fits]


def test_memory_that_one_rank_cannot_reach_is_used_by_none(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = os.open
    lock, calls = threading.Lock(), [0]

    def sometimes(path: Any, flags: int, *more: Any) -> int:
        if str(path).startswith("/proc/"):
            with lock:
                calls[0] += 1
                if calls[0] == 2:
                    raise PermissionError(13, "another container")
        return opened(path, flags, *more)

    monkeypatch.setattr(os, "open", sometimes)
    assert run_loopback(3, lambda t: shared_rows(t, 2, 100)) == [None] * 3
    assert calls == [3]


def test_without_such_memory_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def memfd_create(name: str) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    assert run_loopback(2, lambda t: shared_rows(t, 2, 100)) == [None] * 2


def test_rows_are_shared_zero_at_first_and_leave_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))

    def body(transport: Transport) -> tuple[bool, list[int]]:
        rows = shared_rows(transport, 2, 10_000)
        assert rows is not None
        blank = not rows.any()
        transport.allgather(b"")
        rows[transport.rank, :4] = transport.rank + 1
        transport.allgather(b"")
        return blank, rows[:, 3].tolist()

    assert run_loopback(2, body) == [(True, [1, 2])] * 2
    assert len(os.listdir("/proc/self/fd")) == before
