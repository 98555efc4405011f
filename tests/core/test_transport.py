"""Control messages: every transport gathers the same bytes, whatever their lengths."""

from __future__ import annotations

import gc
import sys
import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from hvdscale.errors import TransportError
from hvdscale.runtime.health import in_a_collective
from hvdscale.runtime.transport import (
    CollectiveTransport,
    RankSet,
    SoloTransport,
    Transport,
    broadcast,
    run_loopback,
)


@dataclass
class Members:
    """A process set, as far as transports look at it; ``me`` is a global rank."""

    ranks: list[int]
    me: int

    def rank(self) -> int:
        return self.ranks.index(self.me)

    def size(self) -> int:
        return len(self.ranks)


class Exchange:
    """All-gather of uint8 vectors among threads, as Horovod does it among ranks."""

    def __init__(self, size: int) -> None:
        self.rooms: dict[tuple[int, ...], Any] = {}
        self.lock = threading.Lock()
        self.world = tuple(range(size))

    def gather(self, rank: int, vector: np.ndarray, process_set: RankSet | None) -> np.ndarray:
        assert vector.dtype == np.uint8
        members = self.world if process_set is None else tuple(process_set.ranks or ())
        with self.lock:
            room = self.rooms.setdefault(members, (threading.Barrier(len(members)), {}))
        barrier, slots = room
        slots[rank] = vector.copy()
        barrier.wait(10)
        result = np.concatenate([slots[r] for r in members])
        barrier.wait(10)
        return result


def run(kind: str, size: int, body: Any) -> list[Any]:
    """``body(transport)`` on every rank of a world of the given kind."""
    if kind == "loopback":
        return run_loopback(size, body, timeout_seconds=10)
    exchange = Exchange(size)

    def over_collectives(loopback: Transport) -> Any:
        rank = loopback.rank
        gather = lambda vector, process_set: exchange.gather(rank, vector, process_set)  # noqa: E731
        return body(CollectiveTransport(rank, size, gather))

    return run_loopback(size, over_collectives, timeout_seconds=10)


KINDS = pytest.mark.parametrize("kind", ["loopback", "collectives"])


@KINDS
@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [lambda r: 16, lambda r: r * 1000, lambda r: 0, lambda r: 7 - r])
def test_allgather(kind: str, size: int, length: Any) -> None:
    messages = [bytes([r]) * length(r) for r in range(size)]
    assert run(kind, size, lambda t: t.allgather(messages[t.rank])) == [messages] * size


@KINDS
@pytest.mark.parametrize("root", [0, 2])
def test_broadcast(kind: str, root: int) -> None:
    assert run(kind, 3, lambda t: broadcast(t, b"from %d" % t.rank, root)) == [b"from %d" % root] * 3


@KINDS
def test_subsets_talk_among_themselves(kind: str) -> None:
    def body(transport: Transport) -> Any:
        mine = [r for r in range(5) if r % 2 == transport.rank % 2]
        part = transport.subset(Members(mine, transport.rank))
        return part.rank, part.size, part.allgather(b"%d" % transport.rank)

    results = run(kind, 5, body)
    assert results == [
        (0, 3, [b"0", b"2", b"4"]),
        (0, 2, [b"1", b"3"]),
        (1, 3, [b"0", b"2", b"4"]),
        (1, 2, [b"1", b"3"]),
        (2, 3, [b"0", b"2", b"4"]),
    ]


@KINDS
def test_the_whole_world_as_a_subset(kind: str) -> None:
    results = run(kind, 2, lambda t: t.subset(Members([0, 1], t.rank)).allgather(b"%d" % t.rank))
    assert results == [[b"0", b"1"]] * 2


def test_waiting_for_all_ranks_shows() -> None:
    seen: list[bool] = []

    def gather(vector: np.ndarray, process_set: Any) -> np.ndarray:
        seen.append(in_a_collective())
        return vector

    CollectiveTransport(0, 1, gather).allgather(b"x")
    assert seen == [True, True]
    assert not in_a_collective()
    assert run_loopback(1, lambda transport: in_a_collective()) == [False]


def test_looking_where_threads_stand_collects_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is run at the end of garbage would run under a lock of the interpreter's own, and may wait for a thread."""
    collects: list[bool] = []
    look = sys._current_frames
    monkeypatch.setattr(sys, "_current_frames", lambda: collects.append(gc.isenabled()) or look())
    assert gc.isenabled()
    in_a_collective()
    assert collects == [False]
    assert gc.isenabled()


def test_a_world_of_one() -> None:
    transport = SoloTransport()
    assert (transport.rank, transport.size) == (0, 1)
    assert transport.allgather(b"x") == [b"x"]
    assert transport.subset(Members([0], 0)) is transport


def test_a_peer_that_never_comes_is_an_error() -> None:
    def body(transport: Transport) -> Any:
        return transport.allgather(b"") if transport.rank == 0 else None

    first, second = run_loopback(2, body, timeout_seconds=0.5)
    assert isinstance(first, TransportError)
    assert "rank 0: a peer left" in str(first)
    assert second is None


def test_what_a_rank_raises_is_its_result() -> None:
    def body(transport: Transport) -> Any:
        raise KeyError(transport.rank)

    assert [type(result) for result in run_loopback(2, body)] == [KeyError, KeyError]
