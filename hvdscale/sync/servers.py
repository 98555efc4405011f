"""The servers of the shared weights as one rank sees them: where which weights lie, and what comes of asking."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdscale.errors import DesyncError, TransportError
from hvdscale.runtime.post import Post
from hvdscale.runtime.service import Service
from hvdscale.sync.parameter_server import ParameterServer
from hvdscale.sync.requests import Answer, Bytes, Message
from hvdscale.sync.shard import Shard, Stage
from hvdscale.update.outer import Float32s

__all__ = ["Servers"]


class _Behind:
    """A shard behind a service: bytes in, bytes out."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def answer(self, source: int, message: Bytes) -> list[tuple[int, Bytes]]:
        return [(rank, told.encode()) for rank, told in self._shard.handle(source, Message.decode(message))]

    def lose(self, rank: int) -> list[tuple[int, Bytes]]:
        return [(rank, told.encode()) for rank, told in self._shard.lose(rank)]


class Servers:
    """The servers of ``total`` values, and this rank's part in serving them. Made by all ranks.

    ``places`` says by position of the server where its values lie.

    Raises:
        PlanError: more servers than ranks, or none left to train.
    """

    def __init__(self, plan: ParameterServer, post: Post, total: int) -> None:
        self._plan, self._post = plan, post
        self._workers, servers = plan.worker_ranks(post.size), plan.server_ranks(post.size)
        ends = [total * i // len(servers) for i in range(len(servers) + 1)]
        self.places = {server: slice(ends[i], ends[i + 1]) for i, server in enumerate(servers)}
        self.trains = post.rank in self._workers
        self.rank = post.ranks[post.rank]
        self.service = Service(post, plan.on_failure == "continue", servers, plan.patience_seconds)

    def begin(self, values: Float32s) -> None:
        """All weights are float32[total]: serve this rank's part of them, if it has one."""
        place = self.places.get(self._post.rank)
        if place is not None:
            outer = self._plan.outer_optimizer()
            shard = Shard(values[place].copy(), self._post.size, self._workers, self._plan.staleness, outer)
            self.service.serve(_Behind(shard))

    def ask(self, messages: Mapping[int, Message]) -> dict[int, Message]:
        """Each server's answer to its message.

        Raises:
            DesyncError: the ranks that train wait for different things.
            TransportError: a push was lost, or a rank is gone.
        """
        data = self.service.ask({server: message.encode() for server, message in messages.items()})
        answers = {server: Message.decode(data[server]) for server in messages}
        for server, answer in answers.items():
            self._refuse(self._post.ranks[server], answer)
        return answers

    def check_counts(self, answers: Mapping[int, Message], pushes: int) -> None:
        """After a flush: servers counted the same pushes of every rank, and ``pushes`` of this one.

        Raises:
            TransportError: they did not.
        """
        counts = {server: answer.ledger[: self._post.size].astype(int) for server, answer in answers.items()}
        first, *_ = counts
        for server, row in counts.items():
            here = (row >= 0) & (
                counts[first] >= 0
            )  # of a rank that is gone, a push may have reached some servers only
            if (row[here] != counts[first][here]).any() or row[self._post.rank] != pushes:
                raise TransportError(
                    f"Every push reaches every server once. Rank {self.rank} pushed {pushes} times; by rank, the "
                    f"server on rank {self._post.ranks[first]} counted {counts[first].tolist()} and that on rank "
                    f"{self._post.ranks[server]} {row.tolist()}. Go back to the last checkpoint."
                )

    def _refuse(self, server: int, answer: Message) -> None:
        if answer.kind == Answer.MISCOUNT:
            came, expected = answer.ledger.astype(int)
            raise TransportError(
                f"Every push arrives once; the server on rank {server} got push {came} of rank {self.rank} and was "
                f"waiting for push {expected}. After a restart every rank loads the state that it saved."
            )
        if answer.kind == Answer.COUNTED_OUT:
            raise TransportError(
                f"The server on rank {server} had heard nothing of rank {self.rank} for longer than patience_seconds="
                f"{self._plan.patience_seconds:g} and goes on without it. Use more patience if it may stand still."
            )
        if answer.kind == Answer.APART:
            rows: Any = answer.ledger.reshape(-1, 2).astype(int)
            lines = [
                f"  rank {rank}: {Stage(stage).name.lower()}, after {clock} pushes"
                for rank, (stage, clock) in zip(self._post.ranks, rows, strict=True)
            ]
            raise DesyncError(
                "Ranks wait for different things:\n" + "\n".join(lines) + "\nEvery rank that trains saves and loads "
                "optimizer.sync after the same number of steps, before any of them flushes for good."
            )
