"""Point-to-point messages over TCP, for jobs without MPI: every pair of ranks has a connection, and a thread reads it.

Ranks find each other through the control transport, and show a secret that only they know. A message is a header
(tag and length, int64 each, as this machine writes them) and its bytes.
"""

from __future__ import annotations

import json
import queue
import secrets
import socket
import struct
import threading
from contextlib import closing, suppress

import numpy as np
import numpy.typing as npt

from hvdscale.errors import TransportError
from hvdscale.runtime.mailbox import Handover, Mailbox
from hvdscale.runtime.post import Ticket, left_message
from hvdscale.runtime.transport import Closable, Transport

__all__ = ["TCPPost"]

Bytes = npt.NDArray[np.uint8]

_HEADER = struct.Struct("=qq")  # tag, length
_HELLO = struct.Struct("=q32s")  # position, secret
_CONNECT_SECONDS = 30.0


class TCPPost:
    """Sockets among the ranks of ``transport``, which closes them. Collective.

    A message that nobody asked for yet waits in memory; one that was asked for is read where it belongs.

    Raises:
        TransportError: some pair of ranks cannot connect; on every rank.
    """

    def __init__(self, transport: Transport) -> None:
        self.rank = transport.rank
        self.size = transport.size
        self.ranks = transport.ranks
        self.sent_bytes = 0
        self._box = Mailbox()
        self._attached: list[Closable] = []
        self._outgoing: dict[int, queue.SimpleQueue[tuple[bytes, Bytes, Handover] | None]] = {}
        for position, connection in _connect(transport).items():
            self._outgoing[position] = queue.SimpleQueue()
            for work in (self._read, self._write):
                threading.Thread(target=work, args=(position, connection), name="hvdscale-post", daemon=True).start()
        transport.attach(self)

    def send(self, data: Bytes, to: int, tag: int) -> Ticket:
        self.sent_bytes += data.nbytes
        ticket = Handover(f"rank {self.ranks[self.rank]}, send to rank {self.ranks[to]}")
        self._outgoing[to].put((_HEADER.pack(tag, data.nbytes), data, ticket))
        return ticket

    def receive(self, out: Bytes, source: int, tag: int) -> Ticket:
        what = f"rank {self.ranks[self.rank]}, receive from rank {self.ranks[source]}"
        return self._box.ask(source, tag, Handover(what, out))

    def probe(self, source: int | None = None, tag: int | None = None) -> tuple[int, int, int] | None:
        return self._box.probe(source, tag)

    def has_left(self, position: int) -> bool:
        return self._box.has_lost(position)

    def attach(self, other: Closable) -> None:
        self._attached.append(other)

    def close(self) -> None:
        while self._attached:
            self._attached.pop().close()
        for outgoing in self._outgoing.values():
            outgoing.put(None)

    def _write(self, position: int, connection: socket.socket) -> None:
        outgoing = self._outgoing[position]
        while (message := outgoing.get()) is not None:
            header, data, ticket = message
            try:
                connection.sendall(header)
                connection.sendall(data.data)
                ticket.finish()
            except OSError:
                ticket.finish(left_message(self.ranks[position], self.ranks[self.rank]))
        with suppress(OSError):  # the peer closed first
            connection.shutdown(socket.SHUT_WR)

    def _read(self, position: int, connection: socket.socket) -> None:
        header = memoryview(bytearray(_HEADER.size))
        left = left_message(self.ranks[position], self.ranks[self.rank])
        ticket = None  # taken out of the mailbox, which does not know it any more
        try:
            while _fill(connection, header):
                tag, length = _HEADER.unpack(header)
                ticket = self._box.expected(position, tag)
                in_place = ticket is not None and ticket.out is not None and ticket.out.nbytes == length
                data = ticket.out if ticket is not None and in_place else np.empty(length, np.uint8)
                assert data is not None
                if length and not _fill(connection, data.data):
                    break
                if ticket is None:
                    self._box.deliver(position, tag, data)
                elif in_place:
                    ticket.finish()
                else:
                    ticket.fill(data)  # of another length: says so
                ticket = None
        except OSError:
            pass  # a connection that breaks is a peer that left
        if ticket is not None:
            ticket.finish(left)
        self._box.lose(position, left)


def _fill(connection: socket.socket, buffer: memoryview) -> bool:
    """Whether the whole buffer was read before the peer closed."""
    done = 0
    while done < len(buffer):
        count = connection.recv_into(buffer[done:])
        if not count:
            return False
        done += count
    return True


def _connect(transport: Transport) -> dict[int, socket.socket]:
    """A connection to every other position: each rank calls those before it and listens for those after it."""
    with closing(socket.create_server(("", 0), backlog=transport.size)) as server:
        server.settimeout(_CONNECT_SECONDS)
        mine = {"hosts": _hosts(), "port": server.getsockname()[1], "secret": secrets.token_hex(16)}
        everyone = [json.loads(data) for data in transport.allgather(json.dumps(mine).encode())]
        secret = everyone[0]["secret"].encode()
        failure, found = "", {}
        try:
            for position in range(transport.rank):
                there = everyone[position]
                found[position] = _call(there["hosts"], there["port"], mine["hosts"])
                found[position].sendall(_HELLO.pack(transport.rank, secret))
            while len(found) < transport.size - 1:
                position, connection = _answer(server, secret)
                if transport.rank < position < transport.size:
                    found[position] = connection
        except OSError as error:
            missing = sorted(set(range(transport.size)) - {transport.rank} - set(found))
            failure = f"rank {transport.ranks[transport.rank]} and {[transport.ranks[m] for m in missing]}: {error}"
    failures = [data.decode() for data in transport.allgather(failure.encode()) if data]
    if failures:
        raise TransportError(
            f"Every pair of ranks needs a TCP connection; these have none: {'; '.join(failures)}. Open the ports "
            "between the hosts, or launch with MPI, which brings its own connections."
        )
    for connection in found.values():
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return found


def _hosts() -> list[str]:
    """Addresses under which peers may reach this host; its name comes first, to tell hosts apart."""
    name = socket.gethostname()
    addresses: dict[str, None] = {}
    with suppress(OSError):  # a host whose name nobody knows is still found by the address of its default route
        addresses = {str(entry[4][0]): None for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
    with suppress(OSError), closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only picks the route
        addresses[str(probe.getsockname()[0])] = None
    return [name, *addresses]


def _call(hosts: list[str], port: int, own: list[str]) -> socket.socket:
    candidates = ["127.0.0.1"] if hosts[0] == own[0] else []
    candidates += hosts[1:] or hosts
    error: OSError = OSError("no address known")
    for host in candidates:
        try:
            return socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        except OSError as failed:
            error = failed
    raise error


def _answer(server: socket.socket, secret: bytes) -> tuple[int, socket.socket]:
    """The next caller that knows the secret. Others are hung up on."""
    while True:
        connection, _ = server.accept()
        connection.settimeout(_CONNECT_SECONDS)
        hello = bytearray(_HELLO.size)
        if _fill(connection, memoryview(hello)):
            position, shown = _HELLO.unpack(hello)
            if secrets.compare_digest(shown, secret):
                return position, connection
        connection.close()
