"""Moving large buffers between ranks, outside the framework's graph: what the rounds of the relaxed family need.

Four channels, one protocol: MPI on a private communicator, Horovod's collectives (under Gloo, where there is no MPI),
any control transport (threads of one process, for tests), and the world of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hvdscale.runtime.host import host_number
from hvdscale.runtime.transport import MPITransport, RankSet, Transport

__all__ = ["Channel", "HorovodChannel", "MPIChannel", "SoloChannel", "TransportChannel"]

Bytes = npt.NDArray[np.uint8]
Float32s = npt.NDArray[np.float32]
Float64s = npt.NDArray[np.float64]

_PAUSE_SECONDS = 0.0005
# From here on the time of a message is its bytes, and MPI's own order, all at once, shares links out badly: an
# all-gather of 0.8 MB of 4 ranks took 1.8 times what 100 Mbit/s allow, round a ring 1.1 times.
_LARGE_BYTES = 64 << 10


class Channel(Protocol):
    """Collectives over NumPy buffers. Every rank of ``ranks`` calls the same methods in the same order.

    ``sent_bytes`` counts what this rank has put on its way, headers of the network's own protocols left out.
    ``concurrent``: another thread may use it while training goes on.
    """

    concurrent: bool
    rank: int
    size: int
    ranks: tuple[int, ...]
    sent_bytes: int

    def table(self, row: Float64s) -> Float64s:
        """float64[size, m]: the row float64[m] of every rank."""
        ...

    def allreduce(self, values: Float32s) -> None:
        """Add float32[n] over ranks, in place; the same bits on every rank."""
        ...

    def alltoall(self, rows: Bytes) -> Bytes:
        """uint8[size, m]: row ``r`` came from rank ``r``; row ``r`` of ``rows``, uint8[size, m], went to it."""
        ...

    def allgather(self, data: Bytes) -> Bytes:
        """uint8[size, m]: ``data``, uint8[m], of every rank."""
        ...

    def swap(self, data: Bytes, to: int, source: int) -> Bytes:
        """Send uint8[m] to one rank, receive as much from another; what a rank sends to itself does not travel."""
        ...

    def split(self, groups: Sequence[Sequence[int]], patient: bool = False) -> Channel | None:
        """A channel of its own for each group of positions in this one: that of this rank's group. Collective.

        ``patient``: as where the channel was opened. ``None``: this rank is in no group.
        """
        ...

    def host(self) -> float:
        """A number that ranks on one host share, and no others. Collective."""
        ...


def _ring_bytes(size: int, payload_bytes: int) -> int:
    """What each rank sends in a ring all-reduce."""
    return 2 * (size - 1) * payload_bytes // size


class SoloChannel:
    """The world of one: nothing travels."""

    concurrent = True
    rank = 0
    size = 1
    ranks: tuple[int, ...] = (0,)

    def __init__(self) -> None:
        self.sent_bytes = 0

    def table(self, row: Float64s) -> Float64s:
        return row[None]

    def allreduce(self, values: Float32s) -> None:
        pass

    def alltoall(self, rows: Bytes) -> Bytes:
        return rows

    def allgather(self, data: Bytes) -> Bytes:
        return data[None]

    def swap(self, data: Bytes, to: int, source: int) -> Bytes:
        return data

    def split(self, groups: Sequence[Sequence[int]], patient: bool = False) -> Channel | None:
        return self if groups else None

    def host(self) -> float:
        return 0.0


class MPIChannel:
    """mpi4py on a private duplicate of the communicator of ``transport``; collective.

    ``patient``: messages are looked after by a thread that sleeps between two looks and leaves the core to the
    training step. Otherwise the caller waits inside MPI.
    """

    def __init__(self, transport: MPITransport, patient: bool = False) -> None:
        self.concurrent = True
        self._origin, self._patient = transport, patient
        self._transport = transport.twin(_PAUSE_SECONDS if patient else 0.0)
        self._comm = self._transport.communicator
        self.rank = transport.rank
        self.size = transport.size
        self.ranks = transport.ranks
        self.sent_bytes = 0

    def table(self, row: Float64s) -> Float64s:
        # Through the transport, which tells when a rank has left the job.
        self.sent_bytes += (self.size - 1) * row.nbytes
        return np.stack([np.frombuffer(data, np.float64) for data in self._transport.allgather(row.tobytes())])

    def allreduce(self, values: Float32s) -> None:
        from mpi4py import MPI

        if not self._patient:
            self.sent_bytes += _ring_bytes(self.size, values.nbytes)
            self._comm.Allreduce(MPI.IN_PLACE, [values, MPI.FLOAT], MPI.SUM)
            return
        # MPI's own non-blocking sum adds in another order on each rank, and the last bits differ. So every rank adds
        # up one share and passes it round: as many bytes as a ring sends, and the same bits everywhere.
        share = -(-values.size // self.size)
        padded = np.zeros((self.size, share), np.float32)
        padded.reshape(-1)[: values.size] = values
        theirs = self.alltoall(padded.view(np.uint8)).view(np.float32)  # [size, share]
        total: Float32s = np.sum(theirs, axis=0, dtype=np.float32)  # [share]
        values[:] = self.allgather(total.view(np.uint8)).view(np.float32).reshape(-1)[: values.size]

    def alltoall(self, rows: Bytes) -> Bytes:
        from mpi4py import MPI

        received = np.empty_like(rows)
        self.sent_bytes += (self.size - 1) * rows.shape[1]
        if rows.shape[1] < _LARGE_BYTES:
            self._transport.wait(self._comm.Ialltoall([rows, MPI.BYTE], [received, MPI.BYTE]))
            return received
        received[self.rank] = rows[self.rank]
        for hop in range(1, self.size):  # one message at a time on every link, each way
            to, source = (self.rank + hop) % self.size, (self.rank - hop) % self.size
            self._trade(rows[to], to, received[source], source)
        return received

    def allgather(self, data: Bytes) -> Bytes:
        from mpi4py import MPI

        everyone = np.empty((self.size, data.size), np.uint8)
        self.sent_bytes += (self.size - 1) * data.size
        if data.size < _LARGE_BYTES:
            self._transport.wait(self._comm.Iallgather([data, MPI.BYTE], [everyone, MPI.BYTE]))
            return everyone
        everyone[self.rank] = data
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        # Round a ring: what came last goes on, over one connection that keeps its pace.
        for hop in range(self.size - 1):
            held, comes = (self.rank - hop) % self.size, (before - hop) % self.size
            self._trade(everyone[held], after, everyone[comes], before)
        return everyone

    def swap(self, data: Bytes, to: int, source: int) -> Bytes:
        if to == self.rank == source:
            return data
        received = np.empty_like(data)
        self.sent_bytes += data.nbytes
        self._trade(data, to, received, source)
        return received

    def _trade(self, data: Bytes, to: int, out: Bytes, source: int) -> None:
        from mpi4py import MPI

        receiving = self._comm.Irecv([out, MPI.BYTE], source)
        sending = self._comm.Isend([data, MPI.BYTE], to)
        self._transport.wait(receiving)
        self._transport.wait(sending)

    def split(self, groups: Sequence[Sequence[int]], patient: bool = False) -> Channel | None:
        mine = _group_of(self.rank, groups)
        return None if mine is None else MPIChannel(self._origin.subset(ranks_of(mine, self.ranks)), patient)

    def host(self) -> float:
        from mpi4py import MPI

        here = self._comm.Split_type(MPI.COMM_TYPE_SHARED)
        lowest = np.array([self.rank], np.int64)
        here.Allreduce(MPI.IN_PLACE, [lowest, MPI.INT64_T], MPI.MIN)
        here.Free()
        return float(lowest[0])


class HorovodChannel:
    """Horovod's collectives, which need a name each and no common order.

    Args:
        rank: position in ``ranks``.
        ranks: those that take part, ascending.
        add: ``add(float32[n], name) -> float32[n]``, the sum over ranks.
        gather: ``gather(uint8[m], name) -> uint8[size * m]``, in rank order.
        scatter: ``scatter(uint8[size * m], name) -> uint8[size * m]``, an all-to-all.
        prefix: put before the names; another for every channel.
        narrow: ``narrow(groups) -> Channel | None``, that of this rank's group of global ranks.
        concurrent: whether another thread may use it while training goes on.
    """

    def __init__(
        self,
        rank: int,
        ranks: tuple[int, ...],
        *,
        add: Callable[[Float32s, str], Float32s],
        gather: Callable[[Bytes, str], Bytes],
        scatter: Callable[[Bytes, str], Bytes],
        prefix: str,
        narrow: Callable[[Sequence[Sequence[int]]], Channel | None],
        concurrent: bool = True,
    ) -> None:
        self.concurrent = concurrent
        self.rank = rank
        self.size = len(ranks)
        self.ranks = ranks
        self.sent_bytes = 0
        self._add, self._gather, self._scatter = add, gather, scatter
        self._prefix = prefix
        self._narrow = narrow

    def table(self, row: Float64s) -> Float64s:
        return self.allgather(row.view(np.uint8)).view(np.float64)

    def allreduce(self, values: Float32s) -> None:
        self.sent_bytes += _ring_bytes(self.size, values.nbytes)
        values[:] = self._add(values, f"{self._prefix}.add")

    def alltoall(self, rows: Bytes) -> Bytes:
        self.sent_bytes += (self.size - 1) * rows.shape[1]
        return self._scatter(rows.ravel(), f"{self._prefix}.scatter").reshape(rows.shape)

    def allgather(self, data: Bytes) -> Bytes:
        self.sent_bytes += (self.size - 1) * data.size
        return self._gather(data, f"{self._prefix}.gather").reshape(self.size, data.size)

    def swap(self, data: Bytes, to: int, source: int) -> Bytes:
        # Horovod has no point-to-point message: everyone's data, of which one row is wanted.
        theirs: Bytes = self.allgather(data)[source]
        return theirs

    def split(self, groups: Sequence[Sequence[int]], patient: bool = False) -> Channel | None:
        return self._narrow([[self.ranks[r] for r in group] for group in groups])

    def host(self) -> float:
        return host_number()


class TransportChannel:
    """Any control transport's all-gather as a channel. It sends more than it must: for tests and small worlds."""

    def __init__(self, transport: Transport) -> None:
        self.concurrent = True
        self._transport = transport
        self.rank = transport.rank
        self.size = transport.size
        self.ranks = transport.ranks
        self.sent_bytes = 0

    def table(self, row: Float64s) -> Float64s:
        self.sent_bytes += (self.size - 1) * row.nbytes
        return np.stack([np.frombuffer(data, np.float64) for data in self._everyone(row)])

    def allreduce(self, values: Float32s) -> None:
        self.sent_bytes += _ring_bytes(self.size, values.nbytes)
        everyone = np.stack([np.frombuffer(data, np.float32) for data in self._everyone(values)])  # [size, n]
        np.sum(everyone, axis=0, out=values)

    def alltoall(self, rows: Bytes) -> Bytes:
        self.sent_bytes += (self.size - 1) * rows.shape[1]
        everyone = [np.frombuffer(data, np.uint8).reshape(rows.shape) for data in self._everyone(rows)]
        mine: Bytes = np.stack([theirs[self.rank] for theirs in everyone])
        return mine

    def allgather(self, data: Bytes) -> Bytes:
        self.sent_bytes += (self.size - 1) * data.size
        return np.stack([np.frombuffer(theirs, np.uint8) for theirs in self._everyone(data)])

    def swap(self, data: Bytes, to: int, source: int) -> Bytes:
        self.sent_bytes += data.nbytes * (to != self.rank)
        return np.frombuffer(self._everyone(data)[source], np.uint8).copy()

    def split(self, groups: Sequence[Sequence[int]], patient: bool = False) -> Channel | None:
        mine = _group_of(self.rank, groups)
        return None if mine is None else TransportChannel(self._transport.subset(ranks_of(mine, self.ranks)))

    def host(self) -> float:
        return 0.0

    def _everyone(self, array: npt.NDArray[Any]) -> list[bytes]:
        return self._transport.allgather(array.tobytes())


@dataclass
class _Ranks:
    """A set of ranks as a transport asks for it."""

    ranks: Sequence[int] | None

    def rank(self) -> int | None:
        return None

    def size(self) -> int | None:
        return None if self.ranks is None else len(self.ranks)


def _group_of(rank: int, groups: Sequence[Sequence[int]]) -> Sequence[int] | None:
    return next((group for group in groups if rank in group), None)


def ranks_of(positions: Sequence[int], world: Sequence[int]) -> RankSet:
    """The global ranks at ``positions``."""
    return _Ranks(tuple(world[position] for position in positions))
