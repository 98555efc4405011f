"""Moving small control messages between ranks: digests, names, scalars. Tensors go through Horovod.

Three transports, one protocol: MPI (a private duplicate of the world), Horovod's own collectives (under
Gloo, where there is no MPI), and threads of one process (the loopback, for tests without a launcher).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import numpy as np

from hvdscale.errors import TransportError
from hvdscale.runtime.waiting import Stall, pauses

__all__ = [
    "LAST_TAG",
    "Closable",
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

    def close(self) -> None:
        """This rank takes no further part; peers that come to wait for it are told.

        Waits for nobody, but for what is attached to it to send its last messages.
        """
        ...

    def attach(self, other: Closable) -> None:
        """Close ``other``, which uses this transport's ranks, when this one is closed."""
        ...

    def release(self, patience_seconds: float) -> None:
        """After ``close()``: give back what the system lends, once every rank has closed. Waits so long at most."""
        ...

    def who_left(self, patience_seconds: float) -> tuple[int, ...]:
        """After a failure elsewhere: global ranks known to have closed. Asks peers that ask too, for so long."""
        ...


class Closable(Protocol):
    """What can say that this rank takes no further part."""

    def close(self) -> None: ...


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

    def close(self) -> None:
        """Nobody waits."""

    def attach(self, other: Closable) -> None:
        """What is used by one rank alone needs no end."""

    def release(self, patience_seconds: float) -> None:
        """Nothing was lent."""

    def who_left(self, patience_seconds: float) -> tuple[int, ...]:
        return ()


# What a rank sends in place of the length of its message when it has none to send.
_LEFT, _FAILED = -1, -2

# On a communicator that was lent: the tag of the empty message that a rank leaves behind when it goes.
LAST_TAG = 0


class MPITransport:
    """mpi4py on a private duplicate of ``comm``, so that no message meets the user's or Horovod's.

    Every all-gather starts with one of lengths. A rank that closes starts a last one, which says that it left: it
    meets whatever peers wait in, now or later, so nobody waits for a rank that is gone. Messages go as MPI.BYTE:
    automatic types fail for half precision.
    """

    def __init__(self, comm: Any, ranks: tuple[int, ...] | None = None, pause_seconds: float = 0.0) -> None:
        self._comm = comm.Dup()
        self._pause_seconds = pause_seconds
        self._subsets: dict[tuple[int, ...], MPITransport] = {}
        self._attached: list[Closable] = []
        self._lent: list[Any] = []
        self._gone: tuple[int, ...] = ()  # global ranks
        self._closed = False
        self._goodbye: Any = None  # the request of the last all-gather
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.ranks = tuple(range(self.size)) if ranks is None else ranks

    def allgather(self, data: bytes) -> list[bytes]:
        from mpi4py import MPI

        if not self._gone:
            request, lengths = self._start(len(data), np.empty(self.size + 1, np.int64))
            self._wait_for_peers(request)
            self._gone = self._saying(_LEFT, lengths)
        if self._gone:
            raise TransportError(
                f"{_named(self._gone)} left the job (sys.exit, hvd.shutdown or the end of the script) while rank "
                f"{self.ranks[self.rank]} waits for all ranks. Let every rank make the same calls and leave together."
            )
        failed = self._saying(_FAILED, lengths)
        if failed:
            raise TransportError(f"{_named(failed)} lost the connection of Horovod while others waited in a call.")
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        everything = bytearray(int(offsets[-1]))
        self._comm.Allgatherv([data, MPI.BYTE], [everything, lengths.tolist(), offsets[:-1].tolist(), MPI.BYTE])
        return [bytes(everything[a:b]) for a, b in pairwise(offsets)]

    def subset(self, process_set: RankSet) -> MPITransport:
        key = tuple(process_set.ranks or ())
        if not key or len(key) == self.size:
            return self
        if key not in self._subsets:
            everyone = self._comm.Get_group()
            group = everyone.Incl([self.ranks.index(rank) for rank in key])
            comm = self._comm.Create_group(group)
            self._subsets[key] = MPITransport(comm, key)  # which has one of its own
            for made in (comm, group, everyone):
                made.Free()
        return self._subsets[key]

    def close(self) -> None:
        from mpi4py import MPI

        if not self._closed and not MPI.Is_finalized():
            self._closed = True
            # Not awaited: MPI delivers it while Horovod's thread or MPI's own end makes progress.
            self._goodbye, _ = self._start(_LEFT, self._memory_for_good())
            for other in (*self._subsets.values(), *self._attached):
                other.close()

    def release(self, patience_seconds: float) -> None:
        """Free the communicators, of which MPI has some thousands. Those of a rank that has not closed stay.

        None is freed before the last message of every peer was taken. MPI gives its number to another one, and a
        message that comes late would be taken for one of that: all that is sent there after it stands still.
        """
        from mpi4py import MPI

        until = time.monotonic() + patience_seconds
        while not MPI.Is_finalized() and self._goodbye is not None:
            if self._all_said_goodbye():
                self._goodbye = None
                for made in (self._comm, *self._lent):
                    made.Free()
            elif time.monotonic() > until:
                break
            else:
                time.sleep(0.001)
        for other in (*self._subsets.values(), *self._attached):
            if isinstance(other, MPITransport):
                other.release(until - time.monotonic())

    def _all_said_goodbye(self) -> bool:
        from mpi4py import MPI

        peers = [(lent, peer) for lent in self._lent for peer in range(self.size) if peer != self.rank]
        if not (self._goodbye.Test() and all(lent.Iprobe(peer, LAST_TAG) for lent, peer in peers)):
            return False
        for lent, peer in peers:
            lent.Recv([None, 0, MPI.BYTE], peer, LAST_TAG)
        return True

    def lend(self) -> Any:
        """Another communicator of these ranks, freed with this one's. Collective.

        The last message of every rank to every other one is an empty one with ``LAST_TAG``.
        """
        self._lent.append(self._comm.Dup())
        return self._lent[-1]

    def twin(self, pause_seconds: float = 0.0) -> MPITransport:
        """Another transport of the same ranks, for another thread or another purpose; closed with this one. Collective.

        ``pause_seconds`` above 0: who waits sleeps between two looks, and leaves the core to others.
        """
        twin = MPITransport(self._comm, self.ranks, pause_seconds)
        self.attach(twin)
        return twin

    def attach(self, other: Closable) -> None:
        """Close ``other`` when this one is closed."""
        self._attached.append(other)

    @property
    def communicator(self) -> Any:
        """The private mpi4py communicator, for large buffers."""
        return self._comm

    def wait(self, request: Any) -> None:
        """Wait for a request of MPI's."""
        if not self._pause_seconds:
            request.Wait()
            return
        for _ in pauses(request.Test, self._pause_seconds):
            pass

    def _wait_for_peers(self, request: Any) -> None:
        """Where ranks meet, the first waits for the last, which may need its core."""
        stall: Stall | None = None  # most waits are over before their first pause
        for _ in pauses(request.Test, self._pause_seconds):
            stall = stall or Stall(self.ranks[self.rank])
            stall.look()

    def who_left(self, patience_seconds: float) -> tuple[int, ...]:
        if self._gone or self._closed:
            return self._gone
        request, lengths = self._start(_FAILED, self._memory_for_good())
        deadline = time.monotonic() + patience_seconds
        while not request.Test():
            if time.monotonic() > deadline:
                return ()
            time.sleep(0.01)
        self._gone = self._saying(_LEFT, lengths)
        return self._gone

    def _start(self, length: int, memory: np.ndarray) -> tuple[Any, np.ndarray]:
        """The all-gather of lengths under way, and where they will be. ``memory`` is ``int64[size + 1]``."""
        from mpi4py import MPI

        own, lengths = memory[:1], memory[1:]
        own[0] = length
        return self._comm.Iallgather([own, MPI.INT64_T], [lengths, MPI.INT64_T]), lengths

    def _memory_for_good(self) -> np.ndarray:
        """For an operation that may outlive this interpreter: never freed."""
        from mpi4py import MPI

        memory: Any = MPI.Alloc_mem(8 * (self.size + 1))
        numbers: np.ndarray = np.frombuffer(memory, np.int64)
        return numbers

    def _saying(self, word: int, lengths: np.ndarray) -> tuple[int, ...]:
        return tuple(rank for rank, length in zip(self.ranks, lengths, strict=True) if length == word)


def _named(ranks: tuple[int, ...]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


class CollectiveTransport:
    """Any all-gather of ``uint8`` vectors of unequal length (Horovod's) as a transport.

    ``gather(vector, process_set)`` concatenates in rank order over ``process_set`` (``None``: everyone).
    """

    def __init__(self, rank: int, size: int, gather: Gather, process_set: RankSet | None = None) -> None:
        self.rank = rank
        self.size = size
        self._attached: list[Closable] = []
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
        part = CollectiveTransport(process_set.rank() or 0, size, self._gather, process_set)
        self.attach(part)
        return part

    def close(self) -> None:
        """Horovod's own shutdown tells peers; what is attached tells its own."""
        while self._attached:
            self._attached.pop().close()

    def attach(self, other: Closable) -> None:
        """Close ``other`` when this one is closed."""
        self._attached.append(other)

    def release(self, patience_seconds: float) -> None:
        """Horovod's own shutdown does."""

    def who_left(self, patience_seconds: float) -> tuple[int, ...]:
        return ()


class LoopbackTransport:
    """Ranks as threads of one process, meeting at a barrier."""

    def __init__(self, rank: int, size: int, board: dict[Any, Any], timeout_seconds: float = 30.0) -> None:
        self.rank = rank
        self.size = size
        self._board = board
        self.timeout_seconds = timeout_seconds
        self._name: tuple[Any, ...] = ()  # of the room where these ranks meet
        self._subsets: Counter[tuple[int, ...]] = Counter()
        self._attached: list[Closable] = []
        self.ranks = tuple(range(size))

    def shared(self, name: str, make: Callable[[], T]) -> T:
        """A thing of all ranks, made by the first that comes: the n-th call gives what it gives on other ranks."""
        with self._board["lock"]:
            calls = (name, self.ranks, "calls", self.rank)
            number = self._board[calls] = self._board.get(calls, -1) + 1
            key = (name, self.ranks, number)
            if key not in self._board:
                self._board[key] = make()
            thing: T = self._board[key]
            return thing

    def _room(self) -> Any:
        with self._board["lock"]:
            room = threading.Barrier(len(self.ranks)), [b""] * len(self.ranks)
            return self._board.setdefault((self.ranks, self._name), room)

    def allgather(self, data: bytes) -> list[bytes]:
        barrier, slots = self._room()
        slots[self.rank] = data
        try:
            barrier.wait(self.timeout_seconds)
            everything = list(slots)
            barrier.wait(self.timeout_seconds)
        except threading.BrokenBarrierError:
            raise TransportError(f"rank {self.rank}: a peer left the all-gather or never came to it") from None
        return everything

    def subset(self, process_set: RankSet) -> Transport:
        members = tuple(process_set.ranks or self.ranks)
        twin = LoopbackTransport(members.index(self.ranks[self.rank]), len(members), self._board, self.timeout_seconds)
        twin.ranks = members
        self._subsets[members] += 1
        twin._name = (*self._name, self._subsets[members])  # each has a room of its own, for a thread of its own
        return twin

    def close(self) -> None:
        """Peers that wait for a message of what is attached are told; in an all-gather they find out by the timeout."""
        for other in self._attached:
            other.close()

    def attach(self, other: Closable) -> None:
        """Close ``other`` when this one is closed."""
        self._attached.append(other)

    def release(self, patience_seconds: float) -> None:
        """Threads are lent nothing."""

    def who_left(self, patience_seconds: float) -> tuple[int, ...]:
        return ()


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
        thread.join(2 * timeout_seconds)  # who waits for a peer so long then says so itself
    return results
