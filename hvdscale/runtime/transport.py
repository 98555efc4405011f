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
    "LoopbackTransport",
    "MPITransport",
    "SoloTransport",
    "Transport",
    "broadcast",
    "run_loopback",
]

T = TypeVar("T")


class Transport(Protocol):
    """Collectives over byte strings. Every rank calls the same methods in the same order."""

    rank: int
    size: int

    def allgather(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, in rank order."""
        ...

    def subset(self, ranks: Sequence[int]) -> Transport:
        """The transport of these global ranks; called by exactly those ranks. ``rank`` is then the position in it."""
        ...


def broadcast(transport: Transport, data: bytes, root: int = 0) -> bytes:
    """``data`` of rank ``root``. Others pass anything."""
    return transport.allgather(data if transport.rank == root else b"")[root]


class SoloTransport:
    """The world of one."""

    rank = 0
    size = 1

    def allgather(self, data: bytes) -> list[bytes]:
        return [data]

    def subset(self, ranks: Sequence[int]) -> Transport:
        return self


class MPITransport:
    """mpi4py on a private duplicate of ``comm``, so that no message meets the user's or Horovod's.

    Messages go as MPI.BYTE: automatic types fail for half precision.
    """

    def __init__(self, comm: Any) -> None:
        self._comm = comm.Dup()
        self._subsets: dict[tuple[int, ...], MPITransport] = {}
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()

    def allgather(self, data: bytes) -> list[bytes]:
        from mpi4py import MPI

        lengths = np.zeros(self.size, np.int64)
        self._comm.Allgather([np.array([len(data)], np.int64), MPI.INT64_T], [lengths, MPI.INT64_T])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        everything = bytearray(int(offsets[-1]))
        self._comm.Allgatherv([data, MPI.BYTE], [everything, lengths.tolist(), offsets[:-1].tolist(), MPI.BYTE])
        return [bytes(everything[a:b]) for a, b in pairwise(offsets)]

    def subset(self, ranks: Sequence[int]) -> Transport:
        key = tuple(sorted(ranks))
        if key == tuple(range(self.size)):
            return self
        if key not in self._subsets:
            group = self._comm.Get_group().Incl(key)
            self._subsets[key] = MPITransport(self._comm.Create_group(group))
        return self._subsets[key]


class CollectiveTransport:
    """Any all-gather of ``uint8`` vectors of unequal length (Horovod's) as a transport.

    ``gather(vector, ranks)`` returns the concatenation in rank order over ``ranks`` (``None``: everyone).
    """

    def __init__(
        self,
        rank: int,
        size: int,
        gather: Callable[[np.ndarray, Sequence[int] | None], np.ndarray],
        ranks: Sequence[int] | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self._gather = gather
        self._ranks = ranks

    def allgather(self, data: bytes) -> list[bytes]:
        length = np.frombuffer(np.int64(len(data)).tobytes(), np.uint8)
        lengths = self._gather(length, self._ranks).view(np.int64)  # [size]
        if not lengths.sum():
            return [b""] * self.size
        everything = self._gather(np.frombuffer(data, np.uint8), self._ranks)  # [sum of lengths]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return [everything[a:b].tobytes() for a, b in pairwise(offsets)]

    def subset(self, ranks: Sequence[int]) -> Transport:
        ordered = sorted(ranks)
        if len(ordered) == self.size and self._ranks is None:
            return self
        return CollectiveTransport(ordered.index(self.rank), len(ordered), self._gather, ordered)


class LoopbackTransport:
    """Ranks as threads of one process, meeting at a barrier."""

    def __init__(self, rank: int, size: int, board: dict[Any, Any], timeout_seconds: float = 30.0) -> None:
        self.rank = rank
        self.size = size
        self._board = board
        self._timeout = timeout_seconds
        self._world = tuple(range(size))

    def _room(self) -> Any:
        with self._board["lock"]:
            return self._board.setdefault(self._world, (threading.Barrier(len(self._world)), [b""] * len(self._world)))

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

    def subset(self, ranks: Sequence[int]) -> Transport:
        ordered = tuple(sorted(self._world[r] for r in ranks))
        twin = LoopbackTransport(ordered.index(self._world[self.rank]), len(ordered), self._board, self._timeout)
        twin._world = ordered
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
