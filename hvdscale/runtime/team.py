"""A few ranks that exchange small arrays at once, again and again: what tensor parallel layers wait for.

Horovod answers once a cycle, about a millisecond; these messages go from rank to rank directly. Every rank adds in
rank order, so all get the same bits. Large arrays are added up in shares, as many bytes as a ring sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.runtime.channel import ranks_of
from hvdscale.runtime.post import Post, SoloPost, open_post
from hvdscale.runtime.transport import MPITransport, SoloTransport, Transport

__all__ = ["Team", "open_team"]

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

# Up to here everyone sends everything to everyone: one latency instead of two.
_AT_ONCE_BYTES = 1 << 14
_TAG = 0  # messages of one source arrive in the order they were sent, and all ranks make the same calls


class Team:
    """The ranks of ``post``. Every one calls the same methods in the same order, with arrays of the same size."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self.rank = post.rank
        self.size = post.size
        self.ranks = post.ranks

    @property
    def sent_bytes(self) -> int:
        return self._post.sent_bytes

    def add(self, values: Array) -> Array:
        """The sum over ranks of float[...], as a new array; the same bits on every rank."""
        if self.size == 1:
            return values.copy()
        flat = np.ascontiguousarray(values).reshape(-1)  # [n]
        total: Array
        if self.size == 2 or flat.nbytes <= _AT_ONCE_BYTES:
            total = _in_order(self.collect(flat, [flat.shape] * self.size))
        else:
            edges = [flat.size * i // self.size for i in range(self.size + 1)]
            shares = [flat[a:b] for a, b in pairwise(edges)]
            own = _in_order(self.gather(shares, [shares[self.rank].shape] * self.size))
            total = np.concatenate(self.gather([own] * self.size, [share.shape for share in shares]))
        return total.reshape(values.shape)

    def largest(self, values: Array) -> Array:
        """The largest over ranks of float[...], elementwise, as a new array."""
        flat = np.ascontiguousarray(values).reshape(-1)
        most: Array = np.maximum.reduce(self.collect(flat, [flat.shape] * self.size))
        return most.reshape(values.shape)

    def first(self, values: Array) -> Array:
        """The first rank's values; all pass arrays of one shape and dtype."""
        sent = np.ascontiguousarray(values).reshape(-1)
        if self.rank:
            sent = sent[:0]
        came = self.gather([sent] * self.size, [(values.size,), *[(0,)] * (self.size - 1)])[0]
        return came.reshape(values.shape)

    def collect(self, own: Array, shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Everyone's contiguous array, in rank order; ``shapes`` are theirs, the dtype is that of ``own``."""
        return self.gather([own] * self.size, shapes)

    def gather(self, sent: Sequence[Array], shapes: Sequence[tuple[int, ...]]) -> list[Array]:
        """Send ``sent[r]`` to each rank ``r``, and return what came from each; the own one as it is. All contiguous.

        Raises:
            TransportError: a rank has left, or sent another number of bytes.
        """
        received = [
            sent[r] if r == self.rank else np.empty(shape, sent[self.rank].dtype) for r, shape in enumerate(shapes)
        ]
        others = [(self.rank + i) % self.size for i in range(1, self.size)]
        tickets = [self._post.receive(_bytes(received[r]), r, _TAG) for r in others if received[r].size]
        tickets += [self._post.send(_bytes(sent[r]), r, _TAG) for r in others if sent[r].size]
        for ticket in tickets:
            ticket.wait()
        return received


def _in_order(parts: Sequence[Array]) -> Array:
    total = parts[0].copy()
    for part in parts[1:]:
        total += part
    return total


def _bytes(array: Array) -> Bytes:
    return array.reshape(-1).view(np.uint8)


def open_team(
    groups: Iterable[Sequence[int]], transport: Transport, intern: Callable[[Iterable[Sequence[int]]], list[Any]]
) -> Team:
    """The team of this rank's group, one of ``groups``, which are a partition of all ranks. Collective over all ranks.

    Args:
        groups: global ranks; the same on every rank.
        transport: of all ranks.
        intern: makes Horovod's process sets, asked where there is no MPI.
    """
    every = [tuple(group) for group in groups]
    place = next(i for i, group in enumerate(every) if transport.ranks[transport.rank] in group)
    if len(every[place]) == 1 or isinstance(transport, SoloTransport):
        alone = SoloPost()
        alone.ranks = every[place]
        return Team(alone)
    if isinstance(transport, MPITransport):  # which needs no process set of Horovod's
        return Team(open_post(transport.subset(ranks_of(every[place], transport.ranks))))
    return Team(open_post(transport.subset(intern(every)[place])))
