"""Moving small control messages between ranks: digests, names, scalars. Tensors go through Horovod.

Three transports, one protocol: MPI (a private duplicate of the world), Horovod's own collectives (under
Gloo, where there is no MPI), and threads of one process (the loopback, for tests without a launcher).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from hvdscale.errors import TransportError

__all__ = [
    "CollectiveTransport",
    "Gather",
    "LoopbackTransport",
    "MPITransport",
    "RankSet",
    "SoloTransport",
    "Transport",
    "broadcast",
    "run_loopback",
]

T = TypeVar("T")
Gather = Callable[[np.ndarray, "RankSet | None"], np.ndarray]


class RankSet(Protocol):
    """What a transport needs of Horovod's ``ProcessSet``: global ranks, and this rank's position among them."""

    ranks: Sequence[int] | None

    def rank(self) -> int | None: ...

    def size(self) -> int | None: ...


class Transport(Protocol):
    """Collectives over byte strings. Every rank calls the same methods in the same order.

    ``rank`` is the position in ``ranks``, the global ranks that take part.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]

    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, in rank order."""
        ...

    def subset(self, process_set: RankSet) -> Transport:
        """The transport of these ranks; called by exactly those. Its ``rank`` is the position among them."""
        ...


def broadcast(transport: Transport, data: bytes, root: int = 0) -> bytes:
    """``data`` of rank ``root``. Others pass anything."""
    return transport.allgather(data if transport.rank == root else b"")[root]


class SoloTransport:
    """The world of one."""

    rank = 0
    size = 1
    ranks: tuple[int, ...] = (0,)

    def allgather(self, data: bytes) -> list[bytes]:
        return [data]

    def subset(self, process_set: RankSet) -> Transport:
        return self


class MPITransport:
    """mpi4py on a private duplicate of ``comm``, so that no message meets the user's or Horovod's.

    Messages go as MPI.BYTE: automatic types fail for half precision.
    """

    def __init__(self, comm: Any, ranks: tuple[int, ...] | None = None) -> None:
        self._comm = comm.Dup()
        self._subsets: dict[tuple[int, ...], MPITransport] = {}
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.ranks = tuple(range(self.size)) if ranks is None else ranks

    def allgather(self, data: bytes) -> list[bytes]:
        from mpi4py import MPI

        lengths = np.zeros(self.size, np.int64)
        self._comm.Allgather([np.array([len(data)], np.int64), MPI.INT64_T], [lengths, MPI.INT64_T])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        everything = bytearray(int(offsets[-1]))
        self._comm.Allgatherv([data, MPI.BYTE], [everything, lengths.tolist(), offsets[:-1].tolist(), MPI.BYTE])
        return [bytes(everything[a:b]) for a, b in pairwise(offsets)]

    def subset(self, process_set: RankSet) -> Transport:
        key = tuple(process_set.ranks or ())
        if not key or len(key) == self.size:
            return self
        if key not in self._subsets:
            group = self._comm.Get_group().Incl(key)
            self._subsets[key] = MPITransport(self._comm.Create_group(group), key)
        return self._subsets[key]


class CollectiveTransport:
    """Any all-gather of ``uint8`` vectors of unequal length (Horovod's) as a transport.

    ``gather(vector, process_set)`` concatenates in rank order over ``process_set`` (``None``: everyone).
    """

    def __init__(self, rank: int, size: int, gather: Gather, process_set: RankSet | None = None) -> None:
        self.rank = rank
        self.size = size
        self.ranks = tuple(range(size)) if process_set is None else tuple(process_set.ranks or ())
        self._gather = gather
        self._process_set = process_set

    def allgather(self, data: bytes) -> list[bytes]:
        length = np.frombuffer(np.int64(len(data)).tobytes(), np.uint8)
        lengths = self._gather(length, self._process_set).view(np.int64)  # [size]
        if not lengths.sum():
            return [b""] * self.size
        everything = self._gather(np.frombuffer(data, np.uint8), self._process_set)  # [sum of lengths]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return [everything[a:b].tobytes() for a, b in pairwise(offsets)]

    def subset(self, process_set: RankSet) -> Transport:
        size = process_set.size()
        if size is None or size == self.size:
            return self
        return CollectiveTransport(process_set.rank() or 0, size, self._gather, process_set)


class LoopbackTransport:
    """Ranks as threads of one process, meeting at a barrier."""

    def __init__(self, rank: int, size: int, board: dict[Any, Any], timeout_seconds: float = 30.0) -> None:
        self.rank = rank
        self.size = size
        self._board = board
        self._timeout = timeout_seconds
        self.ranks = tuple(range(size))

    def _room(self) -> Any:
        with self._board["lock"]:
            return self._board.setdefault(self.ranks, (threading.Barrier(len(self.ranks)), [b""] * len(self.ranks)))

    def allgather(self, data: bytes) -> list[bytes]:
        barrier, slots = self._room()
        slots[self.rank] = data
        try:
            barrier.wait(self._timeout)
            everything = list(slots)
            barrier.wait(self._timeout)
        except threading.BrokenBarrierError:
            raise TransportError(f"rank {self.rank}: a peer left the all-gather or never came to it") from None
        return everything

    def subset(self, process_set: RankSet) -> Transport:
        members = tuple(process_set.ranks or self.ranks)
        twin = LoopbackTransport(members.index(self.ranks[self.rank]), len(members), self._board, self._timeout)
        twin.ranks = members
        return twin


def run_loopback(size: int, body: Callable[[Transport], T], timeout_seconds: float = 30.0) -> list[T | Exception]:
    """Run ``body(transport)`` on ``size`` threads; return each rank's result or the exception it raised."""
    board: dict[Any, Any] = {"lock": threading.Lock()}
    results: list[Any] = [TransportError("the rank did not finish in time")] * size

    def target(rank: int) -> None:
        try:
            results[rank] = body(LoopbackTransport(rank, size, board, timeout_seconds))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=target, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_seconds)
    return results
