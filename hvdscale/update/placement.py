"""Which rank updates which elements: all of them on one rank, or 1/N on each.

Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models", arXiv 1910.02054 (stage 1
and 2), for ``"sharded"``; Li et al., "Scaling distributed machine learning with the parameter server", OSDI 2014, with
one synchronous server, for ``"central"``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from hvdscale.errors import PlanError

__all__ = ["Bucket", "Piece", "Placement", "Update", "place"]

Update = Literal["central", "sharded"]


@dataclass(frozen=True)
class Piece:
    """A run of one tensor's elements that one rank updates: ``[start, stop)`` of the tensor, flattened.

    ``at`` is where it begins in that rank's share of the bucket.
    """

    tensor: int
    start: int
    stop: int
    at: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def place(self) -> slice:
        """Where it lies in the share."""
        return slice(self.at, self.at + self.size)


@dataclass(frozen=True)
class Bucket:
    """Tensors that travel as one message, flattened one after the other and cut into a share for each rank.

    Args:
        tensors: positions in the registry, in order.
        sizes: elements of each.
        shares: elements of each rank's share, in rank order; together at least those of the tensors, and what is
            more is padding at the end.
    """

    tensors: tuple[int, ...]
    sizes: tuple[int, ...]
    shares: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements of the message, padding included."""
        return sum(self.shares)

    def places(self) -> list[slice]:
        """Where each tensor lies in the message."""
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def pieces(self, rank: int) -> list[Piece]:
        """What ``rank`` updates, one piece at most of each tensor, in order."""
        first = sum(self.shares[:rank])
        last = first + self.shares[rank]
        found = []
        for tensor, place in zip(self.tensors, self.places(), strict=True):
            start, stop = max(place.start, first), min(place.stop, last)
            if start < stop:
                found.append(Piece(tensor, start - place.start, stop - place.start, start - first))
        return found


@dataclass(frozen=True)
class Placement:
    """Who updates what, over the registry of one optimizer's trainable tensors. The same object on every rank."""

    update: Update
    ranks: int
    buckets: tuple[Bucket, ...]

    def pieces(self, rank: int) -> list[Piece]:
        """What ``rank`` updates, over all buckets; ``at`` counts within the bucket of the piece."""
        return [piece for bucket in self.buckets for piece in bucket.pieces(rank)]


def place(
    update: Update, positions: Sequence[int], sizes: Sequence[int], kinds: Sequence[Hashable], ranks: int, elements: int
) -> Placement:
    """Pack tensors into buckets and give each rank its share of them.

    Buckets hold neighbours in the registry of one kind, so that a backward pass, which makes gradients in nearly the
    reverse order, completes them one after the other.

    Args:
        update: ``"sharded"``: equal shares; ``"central"``: everything to the first rank.
        positions: of the tensors in the registry, ascending.
        sizes: elements of each.
        kinds: what tensors must have in common to travel together, of each: dtype and device, say.
        ranks: how many take part.
        elements: a bucket is closed when it holds as many; a larger tensor is a bucket of its own.
    """
    if update not in ("central", "sharded"):
        raise PlanError(f'update is "central" or "sharded" where updates are placed; it is {update!r}.')
    open_now: dict[Hashable, list[int]] = {}  # places in ``positions``
    runs: list[list[int]] = []
    for i, (size, kind) in enumerate(zip(sizes, kinds, strict=True)):
        run = open_now.get(kind)
        if run is None or (run and sum(sizes[j] for j in run) + size > elements):
            run = open_now[kind] = []
            runs.append(run)
        run.append(i)
    return Placement(update, ranks, tuple(_bucket(update, run, positions, sizes, ranks) for run in runs))


def _bucket(update: Update, run: Sequence[int], positions: Sequence[int], sizes: Sequence[int], ranks: int) -> Bucket:
    total = sum(sizes[i] for i in run)
    share = -(-total // ranks)
    shares = (share,) * ranks if update == "sharded" else (share * ranks,) + (0,) * (ranks - 1)
    return Bucket(tuple(positions[i] for i in run), tuple(sizes[i] for i in run), shares)
