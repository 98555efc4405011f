"""Who is still there: every rank gives everyone a sign of life now and then, and says when it leaves.

A rank is gone when it said so, when its post says so, or when nothing was heard of it for too long.
"""

from __future__ import annotations

import time
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from hvdscale.errors import TransportError
from hvdscale.runtime.fencing import Process
from hvdscale.runtime.post import Post, Ticket

__all__ = ["News", "Presence"]

_BEATS_IN_PATIENCE = 8
_LONGEST_BEAT_SECONDS = 1.0
_LOOK_SECONDS = 0.1  # between two looks at who has left


class News(IntEnum):
    """What a rank tells the others."""

    ALIVE = 0
    STOPPED = 1  # it asks nothing any more, before it was done; it still answers
    DONE = 2  # it leaves, and nothing was left to do
    HERE = 3  # it has come: then follows which process it is
    COUNTED_OUT = 4  # to one that was silent for too long, and is not: the others go on without it


class Presence:
    """What this rank knows of the others of ``post``, whose tag ``tag`` it uses. Used by one thread.

    ``gone`` and ``stopped`` say by position how a rank went; those that are ``done`` are gone, too, and so are those
    that are ``silent``. ``counted_out``: what others made of this rank's own silence.
    """

    def __init__(self, post: Post, tag: int, patience_seconds: float) -> None:
        self.gone: dict[int, str] = {}
        self.stopped: dict[int, str] = {}
        self.done: set[int] = set()
        self.silent: set[int] = set()
        self.counted_out = ""
        self.processes: dict[int, Process] = {post.rank: Process.own()}
        self._reported: set[int] = set()
        self._post, self._tag, self._patience_seconds = post, tag, patience_seconds
        self._beat_seconds = min(_LONGEST_BEAT_SECONDS, patience_seconds / _BEATS_IN_PATIENCE)
        self._peers = [rank for rank in range(post.size) if rank != post.rank]
        self._looked = time.monotonic()
        self._heard = dict.fromkeys(self._peers, self._looked)
        self._beaten = self._checked = 0.0
        self._sent: list[tuple[Ticket, npt.NDArray[np.uint8]]] = []
        self.say(News.HERE, self.processes[post.rank].encode())

    def look(self) -> list[int]:
        """Give a sign of life if it is time to. The ranks that ask nothing any more, each once."""
        now = time.monotonic()
        if now - self._looked > self._patience_seconds / 2:  # this process itself was held up: it has heard nobody
            self._heard = dict.fromkeys(self._peers, now)
        self._looked = now
        self._listen()
        if now - self._beaten > self._beat_seconds:
            self._beaten = now
            self.say(News.ALIVE)
        if now - self._checked > _LOOK_SECONDS:
            self._checked = now
            for rank in self._peers:
                if rank not in self.gone:
                    self._check(rank, now)
        news = sorted({*self.gone, *self.stopped} - self._reported)
        self._reported.update(news)
        return news

    def say(self, news: News, more: bytes = b"") -> None:
        """Tell everyone."""
        self._sent = [sent for sent in self._sent if not _over(sent[0])]
        for rank in self._peers:
            if rank not in self.gone:
                self._tell(rank, news, more)

    def _tell(self, rank: int, news: News, more: bytes = b"") -> None:
        data = np.frombuffer(bytes([news]) + more, np.uint8).copy()
        self._sent.append((self._post.send(data, rank, self._tag), data))

    def lose(self, rank: int, how: str) -> None:
        """``rank`` is gone."""
        self.gone.setdefault(rank, how)

    def _listen(self) -> None:
        while (found := self._post.probe(None, self._tag)) is not None:
            source, data = found[0], np.empty(found[2], np.uint8)
            self._post.receive(data, source, self._tag).wait()
            self._heard[source] = time.monotonic()
            if source in self.silent and data[0] == News.ALIVE:
                self._tell(source, News.COUNTED_OUT)
            elif data[0] == News.HERE:
                self.processes[source] = Process.read(data[1:].tobytes())
            elif data[0] == News.COUNTED_OUT:
                own, other = self._post.ranks[self._post.rank], self._post.ranks[source]
                self.counted_out = (
                    f"rank {own} stood still for longer than patience_seconds={self._patience_seconds:g}, and "
                    f"rank {other} goes on without it. Use more patience if a rank may stand still."
                )
            elif data[0] == News.DONE:
                self.done.add(source)
                self.lose(source, f"rank {self._post.ranks[source]} has left the job: it was done.")
            elif data[0] == News.STOPPED:
                self.stopped[source] = self._left(source)

    def _check(self, rank: int, now: float) -> None:
        if self._post.has_left(rank):
            self._listen()  # it may have said that it was done since we last listened
            self.lose(rank, self._left(rank))
        elif now - self._heard[rank] > self._patience_seconds:
            self.silent.add(rank)
            self.lose(
                rank,
                f"rank {self._post.ranks[rank]} has given no sign of life for {self._patience_seconds:g} s: it was "
                "killed, its host is gone, or it stands still. Start the job again from its last checkpoint.",
            )

    def _left(self, rank: int) -> str:
        return (
            f"rank {self._post.ranks[rank]} left the job (an error, sys.exit, a kill or the end of the script) while "
            "others train. Every rank ends with optimizer.sync.flush(). Start the job again from its last checkpoint."
        )


def _over(ticket: Ticket) -> bool:
    try:
        return ticket.test()
    except TransportError:
        return True
