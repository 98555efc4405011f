"""Point-to-point messages between ranks, for what collectives cannot say: a stage's output to the next one, a push.

Four posts, one protocol: MPI on a private communicator, TCP where there is no MPI (see ``tcp_post``), threads of one
process (the loopback, for tests), and the world of one.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from hvdscale.errors import PlanError, TransportError
from hvdscale.runtime.mailbox import Handover, Mailbox, length_error
from hvdscale.runtime.transport import LAST_TAG, Closable, LoopbackTransport, MPITransport, Transport
from hvdscale.runtime.waiting import pauses

__all__ = ["LoopbackPost", "MPIPost", "Post", "SoloPost", "Ticket", "left_message", "open_post"]

Bytes = npt.NDArray[np.uint8]


class Ticket(Protocol):
    """A message on its way."""

    def test(self) -> bool:
        """Whether it is done; makes progress, never blocks.

        Raises:
            TransportError: it will never be done: the peer is gone, or the message has another length.
        """
        ...

    def wait(self) -> None:
        """Return when it is done.

        Raises:
            TransportError: as ``test``.
        """
        ...


class Post(Protocol):
    """Point-to-point messages among ``ranks``, apart from every other message of the job.

    ``to`` and ``source`` are positions in ``ranks``, the global ranks that take part. Buffers are contiguous vectors of
    ``uint8``, used where they lie. Messages of one source and one tag arrive in the order they were sent.
    ``sent_bytes`` counts what this rank has sent.
    """

    rank: int
    size: int
    ranks: tuple[int, ...]
    sent_bytes: int

    def send(self, data: Bytes, to: int, tag: int) -> Ticket:
        """Start to send uint8[n], which stays untouched until the ticket is done. ``tag`` is at least 0."""
        ...

    def receive(self, out: Bytes, source: int, tag: int) -> Ticket:
        """Start to receive exactly uint8[n]; may be called long before the message is sent."""
        ...

    def probe(self, source: int | None = None, tag: int | None = None) -> tuple[int, int, int] | None:
        """(source, tag, bytes) of a message that has come and that no ``receive`` asked for; makes progress."""
        ...

    def has_left(self, position: int) -> bool:
        """Whether this rank has closed, or its connection is broken: no further message of it will come."""
        ...

    def attach(self, other: Closable) -> None:
        """Close ``other`` first when this one is closed, maybe by its transport: it may have last things to send."""
        ...

    def close(self) -> None:
        """This rank takes no further part: peers that wait for it are told."""
        ...


def left_message(who: int, waits: int) -> str:
    """What rank ``waits`` is told when the message it waits for cannot come."""
    return (
        f"rank {who} left the job (sys.exit, hvd.shutdown or the end of the script) while rank {waits} waits for a "
        "message from it or to it. Let every rank make the same calls and leave together."
    )


class SoloPost:
    """The world of one: there is nobody to write to."""

    rank = 0
    size = 1
    ranks: tuple[int, ...] = (0,)
    sent_bytes = 0

    def send(self, data: Bytes, to: int, tag: int) -> Ticket:
        raise PlanError(f"A message goes to another rank; there is one rank, and position {to} was given.")

    def receive(self, out: Bytes, source: int, tag: int) -> Ticket:
        raise PlanError(f"A message comes from another rank; there is one rank, and position {source} was given.")

    def probe(self, source: int | None = None, tag: int | None = None) -> tuple[int, int, int] | None:
        return None

    def has_left(self, position: int) -> bool:
        return False

    def attach(self, other: Closable) -> None:
        """Nobody is told anything."""

    def close(self) -> None:
        """Nobody waits."""


class MPIPost:
    """mpi4py on a private duplicate of the communicator of ``transport``, which closes it. Collective.

    A rank that closes sends everyone an empty message, which is looked for by those that wait, and taken at the end by
    the transport. Its tag is before those of users.
    """

    def __init__(self, transport: MPITransport) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self.communicator = transport.lend()
        self.rank = transport.rank
        self.size = transport.size
        self.ranks = transport.ranks
        self.sent_bytes = 0
        self._attached: list[Closable] = []
        self._closed = False
        transport.attach(self)

    def send(self, data: Bytes, to: int, tag: int) -> Ticket:
        self.sent_bytes += data.nbytes
        return _Request(self, self.communicator.Isend([data, self._mpi.BYTE], to, tag + 1), to, None)

    def receive(self, out: Bytes, source: int, tag: int) -> Ticket:
        return _Request(self, self.communicator.Irecv([out, self._mpi.BYTE], source, tag + 1), source, out)

    def probe(self, source: int | None = None, tag: int | None = None) -> tuple[int, int, int] | None:
        status = self._mpi.Status()
        from_ = self._mpi.ANY_SOURCE if source is None else source
        # ANY_TAG would also find the empty message of a rank that left, again and again.
        if tag is None:
            found = self.communicator.Iprobe(from_, self._mpi.ANY_TAG, status) and status.Get_tag() != LAST_TAG
        else:
            found = self.communicator.Iprobe(from_, tag + 1, status)
        return (status.Get_source(), status.Get_tag() - 1, status.Get_count(self._mpi.BYTE)) if found else None

    def has_left(self, position: int) -> bool:
        return bool(self.communicator.Iprobe(position, LAST_TAG))

    def attach(self, other: Closable) -> None:
        self._attached.append(other)

    def close(self) -> None:
        while self._attached:
            self._attached.pop().close()
        if not self._closed and not self._mpi.Is_finalized():
            self._closed = True
            for position in range(self.size):
                if position != self.rank:
                    # Not awaited: an empty message needs no buffer and no answer.
                    self.communicator.Isend([None, 0, self._mpi.BYTE], position, LAST_TAG).Free()


class _Request:
    """A request of MPI's as a ticket."""

    def __init__(self, post: MPIPost, request: Any, peer: int, out: Bytes | None) -> None:
        self._post, self._request, self._peer, self._out = post, request, peer, out
        self._done = False

    def test(self) -> bool:
        if not self._done:
            status = self._post._mpi.Status()
            try:
                self._done = self._request.Test(status)
            except self._post._mpi.Exception as error:
                wrong = None
                if self._out is not None and error.Get_error_class() == self._post._mpi.ERR_TRUNCATE:
                    wrong = length_error(self._what(), "more", self._out.nbytes)
                raise TransportError(wrong or f"{self._what()}: {error}") from error
            if self._done and self._out is not None:
                wrong = length_error(self._what(), status.Get_count(self._post._mpi.BYTE), self._out.nbytes)
                if wrong is not None:
                    raise TransportError(wrong)
        return self._done

    def wait(self) -> None:
        for pause in pauses(self.test):
            if pause % 16 == 0 and self._post.has_left(self._peer) and not self.test():
                ranks = self._post.ranks
                raise TransportError(left_message(ranks[self._peer], ranks[self._post.rank]))

    def _what(self) -> str:
        ranks = self._post.ranks
        verb = "send to" if self._out is None else "receive from"
        return f"rank {ranks[self._post.rank]}, {verb} rank {ranks[self._peer]}"


class LoopbackPost:
    """Ranks as threads of one process. A message is done when it was taken: nothing is buffered on the way."""

    def __init__(self, transport: LoopbackTransport) -> None:
        self.rank = transport.rank
        self.size = transport.size
        self.ranks = transport.ranks
        self.sent_bytes = 0
        self._patience_seconds = transport.timeout_seconds
        self._boxes: list[Mailbox] = transport.shared("post", lambda: [Mailbox() for _ in transport.ranks])
        self._attached: list[Closable] = []
        transport.attach(self)

    def send(self, data: Bytes, to: int, tag: int) -> Ticket:
        self.sent_bytes += data.nbytes
        ticket = Handover(f"rank {self.ranks[self.rank]}, send to rank {self.ranks[to]}", None, self._patience_seconds)
        self._boxes[to].deliver(self.rank, tag, data, ticket)
        return ticket

    def receive(self, out: Bytes, source: int, tag: int) -> Ticket:
        what = f"rank {self.ranks[self.rank]}, receive from rank {self.ranks[source]}"
        return self._boxes[self.rank].ask(source, tag, Handover(what, out, self._patience_seconds))

    def probe(self, source: int | None = None, tag: int | None = None) -> tuple[int, int, int] | None:
        return self._boxes[self.rank].probe(source, tag)

    def has_left(self, position: int) -> bool:
        return self._boxes[self.rank].has_lost(position)

    def attach(self, other: Closable) -> None:
        self._attached.append(other)

    def close(self) -> None:
        while self._attached:
            self._attached.pop().close()
        for box in self._boxes:
            box.lose(self.rank, f"rank {self.ranks[self.rank]} closed its post")


def open_post(transport: Transport) -> Post:
    """A post of its own among the ranks of ``transport``. Collective."""
    if transport.size == 1:
        return SoloPost()
    if isinstance(transport, MPITransport):
        return MPIPost(transport)
    if isinstance(transport, LoopbackTransport):
        return LoopbackPost(transport)
    from hvdscale.runtime.tcp_post import TCPPost

    return TCPPost(transport)
