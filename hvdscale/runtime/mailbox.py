"""Messages that threads of this process hand over: what arrived and nobody asked for, and what was asked for ahead."""

from __future__ import annotations

import threading
from collections import deque

import numpy as np
import numpy.typing as npt

from hvdscale.errors import TransportError

__all__ = ["Handover", "Mailbox"]

Bytes = npt.NDArray[np.uint8]


class Handover:
    """A ticket that another thread completes.

    Args:
        what: what is awaited, for messages.
        out: where the message goes; ``None`` for one that is sent.
        patience_seconds: how long ``wait`` waits; ``None`` without end.
    """

    def __init__(self, what: str, out: Bytes | None = None, patience_seconds: float | None = None) -> None:
        self._what, self.out, self._patience_seconds = what, out, patience_seconds
        self._over = threading.Event()
        self._error: str | None = None

    def test(self) -> bool:
        if self._over.is_set() and self._error is not None:
            raise TransportError(self._error)
        return self._over.is_set()

    def wait(self) -> None:
        if not self._over.wait(self._patience_seconds):
            raise TransportError(f"{self._what}: nothing came within {self._patience_seconds:g} s.")
        self.test()

    def finish(self, error: str | None = None) -> None:
        self._error = error
        self._over.set()

    def fill(self, data: Bytes) -> str | None:
        """Put the message where it belongs and finish; what is wrong with it, if anything is."""
        assert self.out is not None
        wrong = length_error(self._what, data.nbytes, self.out.nbytes)
        if wrong is None:
            self.out[:] = data
        self.finish(wrong)
        return wrong


def length_error(what: str, came_bytes: int | str, expected_bytes: int) -> str | None:
    """The message for a length that is not the expected one; ``came_bytes`` may be a word where nobody counted."""
    if came_bytes == expected_bytes:
        return None
    return (
        f"{what}: a message is as long as the buffer made for it; {came_bytes} bytes came for {expected_bytes}. "
        "Both ranks must agree on shapes and dtypes."
    )


class Mailbox:
    """One rank's incoming messages. Those of a source and a tag are received in the order they were sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unread: dict[tuple[int, int], deque[tuple[Bytes, Handover | None]]] = {}
        self._asked: dict[tuple[int, int], deque[Handover]] = {}
        self._lost: dict[int, str] = {}

    def ask(self, source: int, tag: int, ticket: Handover) -> Handover:
        """Give the next message of this source and tag to ``ticket``, now or when it comes."""
        with self._lock:
            unread = self._unread.get((source, tag))
            if not unread:
                if source in self._lost:
                    ticket.finish(self._lost[source])
                else:
                    self._asked.setdefault((source, tag), deque()).append(ticket)
                return ticket
            data, sender = unread.popleft()
        wrong = ticket.fill(data)
        if sender is not None:
            sender.finish(wrong)
        return ticket

    def expected(self, source: int, tag: int) -> Handover | None:
        """The ticket that waits for the next message of this source and tag, taken out."""
        with self._lock:
            asked = self._asked.get((source, tag))
            return asked.popleft() if asked else None

    def deliver(self, source: int, tag: int, data: Bytes, sender: Handover | None = None) -> None:
        """A message is there. ``sender`` is finished when someone has taken it."""
        with self._lock:
            asked = self._asked.get((source, tag))
            if not asked:
                self._unread.setdefault((source, tag), deque()).append((data, sender))
                return
            ticket = asked.popleft()
        wrong = ticket.fill(data)
        if sender is not None:
            sender.finish(wrong)

    def probe(self, source: int | None, tag: int | None) -> tuple[int, int, int] | None:
        """(source, tag, bytes) of a message nobody has asked for yet."""
        with self._lock:
            for (from_, with_), unread in self._unread.items():
                if unread and source in (None, from_) and tag in (None, with_):
                    return from_, with_, unread[0][0].nbytes
        return None

    def has_lost(self, source: int) -> bool:
        """Whether no further message will come from this source."""
        return source in self._lost

    def lose(self, source: int, why: str) -> None:
        """No further message will come from this source."""
        with self._lock:
            self._lost[source] = why
            waiting = [ticket for (from_, _), asked in self._asked.items() if from_ == source for ticket in asked]
            for key in [key for key in self._asked if key[0] == source]:
                del self._asked[key]
        for ticket in waiting:
            ticket.finish(why)
