"""Asking other ranks and being asked: a thread beside the training step answers, and sees who is still there."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from hvdscale.errors import TransportError
from hvdscale.runtime.parting import Parting
from hvdscale.runtime.post import LoopbackPost, Post, SoloPost, Ticket
from hvdscale.runtime.presence import News, Presence

__all__ = ["Answers", "Server", "Service"]

Bytes = npt.NDArray[np.uint8]
Answers = Sequence[tuple[int, Bytes]]  # (position, message)

_ASK, _ANSWER, _NEWS = 1, 2, 3

# How long the thread sleeps when there was nothing to do, and a rank that waits for answers between two looks.
_PAUSE_SECONDS, _LOOK_SECONDS = 0.0005, 0.0001
_GOODBYE_SECONDS = 0.2


class Server(Protocol):
    """What answers. Called by the service's thread alone."""

    def answer(self, source: int, message: Bytes) -> Answers:
        """What to send to whom, now that ``source`` has asked this."""
        ...

    def lose(self, rank: int) -> Answers:
        """What to send to whom, now that ``rank`` is gone."""
        ...


class Service:
    """The asking and answering of one rank over ``post``, which it closes. Made by all ranks.

    Args:
        post: among the ranks that ask each other.
        keep_going: the others go on when a rank leaves before it is done, unless it is one of ``needed``. Otherwise
            any such rank ends the work of all.
        needed: positions of ranks whose answers nobody can do without.
        patience_seconds: a rank not heard of for so long is gone.
    """

    def __init__(self, post: Post, keep_going: bool, needed: Sequence[int], patience_seconds: float) -> None:
        self.cpu_seconds = 0.0  # of the thread
        self.rank, self.ranks = post.ranks[post.rank], post.ranks
        self.idle = True  # nothing is left to do: this rank may leave
        self._post = post
        self._keep_going, self._needed = keep_going, set(needed)
        self._patience_seconds = patience_seconds
        self._presence = Presence(post, _NEWS, patience_seconds)
        self._server: Server | None = None
        self._own: queue.SimpleQueue[Bytes | Server | News | None] = queue.SimpleQueue()  # what this rank asks itself
        self._to_self: queue.SimpleQueue[Bytes] = queue.SimpleQueue()
        self._incoming: list[tuple[Ticket, int, Bytes]] = []
        self._outgoing: list[tuple[Ticket, int, Bytes]] = []
        self._abandoned: list[Bytes] = []  # on their way to ranks that are gone: MPI may still look at them
        self._broken: BaseException | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="hvdscale-service", daemon=True)
        self._parting = Parting(self, keep_going, patience_seconds, not isinstance(post, (SoloPost, LoopbackPost)))
        self._thread.start()
        post.attach(self)

    @property
    def sent_bytes(self) -> int:
        """What this rank has sent, asking and answering."""
        return self._post.sent_bytes

    def serve(self, server: Server) -> None:
        """From now on ``server`` answers; what was asked before has waited."""
        self._own.put(server)

    def ask(self, messages: Mapping[int, Bytes]) -> dict[int, Bytes]:
        """Send a message to each of some ranks, this one too if need be, and wait for an answer of each.

        Raises:
            TransportError: a rank without which there is no going on is gone; names it.
        """
        self.check()
        sent = [(to, self._post.send(data, to, _ASK)) for to, data in messages.items() if to != self._post.rank]
        if self._post.rank in messages:
            self._own.put(messages[self._post.rank])
        coming: dict[int, tuple[Ticket, Bytes]] = {}
        answers: dict[int, Bytes] = {}
        while True:
            self._collect(set(messages) - set(answers), coming, answers)
            if len(answers) == len(messages) and all(ticket.test() for _, ticket in sent):
                return answers
            self.check()
            for rank in set(messages) - set(answers) - set(coming):
                if rank in self._presence.gone and self._post.probe(rank, _ANSWER) is None:
                    raise TransportError(self._presence.gone[rank])
            time.sleep(_LOOK_SECONDS)

    def _collect(self, missing: set[int], coming: dict[int, tuple[Ticket, Bytes]], answers: dict[int, Bytes]) -> None:
        for rank in missing:
            if rank == self._post.rank:
                if not self._to_self.empty():
                    answers[rank] = self._to_self.get()
                continue
            if rank not in coming:
                found = self._post.probe(rank, _ANSWER)
                if found is None:
                    continue
                data = np.empty(found[2], np.uint8)
                coming[rank] = self._post.receive(data, rank, _ANSWER), data
            if coming[rank][0].test():
                answers[rank] = coming[rank][1]

    def check(self) -> None:
        """Raise TransportError if a rank without which there is no going on is gone."""
        if self._broken is not None:
            raise TransportError(f"The thread that answers other ranks ended: {self._broken!r}") from self._broken
        presence = self._presence
        if presence.counted_out:
            raise TransportError(presence.counted_out)
        for rank, how in [*presence.gone.items(), *presence.stopped.items()]:
            kept_going = self._keep_going and (rank not in self._needed or rank not in presence.gone)
            if rank not in presence.done and not kept_going:
                raise TransportError(how)

    @property
    def missing(self) -> tuple[int, ...]:
        """The ranks that are gone, or ask nothing any more, and were not done."""
        lost = {*self._presence.gone, *self._presence.stopped} - self._presence.done
        return tuple(self._post.ranks[position] for position in sorted(lost))

    @property
    def serves(self) -> bool:
        """Whether others ask this rank."""
        return self._server is not None and not self._presence.counted_out

    @property
    def counted_out(self) -> bool:
        """Whether the others go on without this rank, which was silent for too long."""
        return bool(self._presence.counted_out)

    def end_silent(self) -> dict[int, int]:
        """Kill those that fell silent on this rank's machine, if it is the first there; their process ids by rank."""
        presence, ended = self._presence, {}
        own = presence.processes[self._post.rank]
        silent = [(rank, presence.processes[rank]) for rank in sorted(presence.silent) if rank in presence.processes]
        beside = [rank for rank, process in presence.processes.items() if own.beside(process)]
        if any(rank < self._post.rank and rank not in presence.gone for rank in beside):
            return {}
        for rank, process in silent:
            if own.end(process):
                ended[self._post.ranks[rank]] = process.number
        return ended

    def part(self) -> None:
        """Leave soon, without waiting: the thread sends what is still to be sent, and tells whether this rank was done.

        May be called wherever garbage is collected, in any thread: takes no lock that could be held there.
        """
        if not self._closing:
            self._closing = True
            self._own.put(None)
            self._parting.forget()

    def close(self) -> None:
        """Leave, and return when the others were told."""
        self.part()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * self._patience_seconds)
        self._post.close()

    def linger(self) -> None:
        """Ask nothing any more, before all was done; but answer as long as anyone asks."""
        self._own.put(News.STOPPED)
        while len(self._presence.gone) < self._post.size - 1 and self._broken is None:
            time.sleep(_GOODBYE_SECONDS)

    # The thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closing:
                if not self._look():
                    self._listen_to_self()
                self.cpu_seconds = time.thread_time()
                self._parting.watch()
            until = time.monotonic() + self._patience_seconds
            while self._outgoing and time.monotonic() < until:
                self._forward()
                time.sleep(_LOOK_SECONDS)
            if self.idle:
                self._presence.say(News.DONE)
                time.sleep(_GOODBYE_SECONDS if self._post.size > 1 else 0)
        except BaseException as error:
            self._broken = error
        if self._closing:
            self._post.close()

    def _listen_to_self(self) -> None:
        try:
            asked = self._own.get(timeout=_PAUSE_SECONDS)
        except queue.Empty:
            return
        if isinstance(asked, np.ndarray):
            self._answer(self._post.rank, asked)
        elif isinstance(asked, News):
            self._presence.say(asked)
            if self._server is not None:
                self._send(self._server.lose(self._post.rank))
        elif asked is not None:
            self._server = asked
            for rank in {*self._presence.gone, *self._presence.stopped}:
                self._send(asked.lose(rank))

    def _look(self) -> bool:
        """Do what others ask; whether anything was asked."""
        if self._server is not None:
            while (asked := self._post.probe(None, _ASK)) is not None:
                source, _, size = asked
                data = np.empty(size, np.uint8)
                self._incoming.append((self._post.receive(data, source, _ASK), source, data))
        busy = bool(self._incoming)
        for waiting in list(self._incoming):
            ticket, source, data = waiting
            if self._over(ticket, source):
                self._incoming.remove(waiting)
                if source not in self._presence.gone:
                    self._answer(source, data)
        self._forward()
        for rank in self._presence.look():
            if self._server is not None:
                self._send(self._server.lose(rank))
        return busy

    def _forward(self) -> None:
        on_their_way = []
        for sent in self._outgoing:
            if not self._over(sent[0], sent[1]):
                on_their_way.append(sent)
            elif sent[1] in self._presence.gone:
                self._abandoned.append(sent[2])
        self._outgoing = on_their_way

    def _over(self, ticket: Ticket, peer: int) -> bool:
        """Whether a message has arrived or never will."""
        try:
            return ticket.test() or peer in self._presence.gone
        except TransportError as error:
            self._presence.lose(peer, str(error))
            return True

    def _answer(self, source: int, message: Bytes) -> None:
        assert self._server is not None
        self._send(self._server.answer(source, message))

    def _send(self, answers: Answers) -> None:
        for rank, data in answers:
            if rank == self._post.rank:
                self._to_self.put(data)
            elif rank not in self._presence.gone:
                self._outgoing.append((self._post.send(data, rank, _ANSWER), rank, data))
