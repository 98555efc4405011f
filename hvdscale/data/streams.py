"""Sharding a stream of records whose number nobody knows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from hvdscale.data.checks import MOST_SHARDS, instance, integer, one_of
from hvdscale.data.stream_past import Run, first_open, known_marks, merge_states, read_state
from hvdscale.data.stream_reader import StreamReader
from hvdscale.data.stream_routes import ByKey, InOrder, InWindows, Route
from hvdscale.errors import PlanError

__all__ = ["ShardStream", "StreamPolicy"]

StreamPolicy = Literal["ordered", "random", "hash"]

_FORMAT = "stream-v1"
_DEFAULT_WINDOW = 1 << 14
_LARGEST_WINDOW = 1 << 30
_LARGEST_BATCH = 1 << 62


@dataclass(frozen=True)
class ShardStream:
    """A stream of records over ``shards`` shards, each record to exactly one of them.

    Every rank reads the same stream from the same source and keeps its own records: nothing is sent, and the
    stream must be the same, record by record, on every rank and whenever it is read again. A stream that
    differs between ranks (each rank its own socket, say) is sharded already and no partition can be promised.

    - ``"ordered"``: record ``i`` goes to shard ``i % shards``. Shards differ by one record at most. Source order.
    - ``"random"``: in windows of ``window`` records, each window in an order of its own, dealt out in turn. A record
      moves inside its window only: a stream sorted by class stays so but for that. A shard holds its part of one
      window in memory. The last window is short, and shards may differ by some records in it.
    - ``"hash"``: by key, as ``key(record)``, so that equal keys share a shard: that of a hashed ``ShardPlan`` with
      the same seed. Source order. Shards are equal in
      expectation only, and nothing can be known of skew before the stream ends.

    Args:
        shards: number of shards, usually the world size.
        policy: one of the three.
        window: for ``"random"``: records in a window, 16,384 unless given.
        key: for ``"hash"``: the integer, string or bytes that a record is sharded by; one kind in a stream.
        seed: any integer from 0; names the order in windows, and the hash.
        epoch: which pass over the stream, from 0; each has its own order. ``next_epoch()`` gives the next.

    Raises:
        PlanError: an argument out of its range, or one that the policy does not use.
    """

    shards: int
    policy: StreamPolicy = "ordered"
    window: int | None = field(default=None, kw_only=True)
    key: Callable[[Any], int | str | bytes] | None = field(default=None, kw_only=True, repr=False, compare=False)
    seed: int = field(default=0, kw_only=True)
    epoch: int = field(default=0, kw_only=True)
    past: tuple[Run, ...] = field(default=(), kw_only=True, repr=False)
    """What earlier runs of this epoch read, as ``resume`` knows it from their states."""

    def __post_init__(self) -> None:
        for name, low, high in (("shards", 1, MOST_SHARDS), ("seed", 0, None), ("epoch", 0, None)):
            object.__setattr__(self, name, integer(name, getattr(self, name), low, high))
        one_of("policy", self.policy, get_args(StreamPolicy))
        instance("past", self.past, tuple)
        for run in self.past:
            instance("A run of the past", run, Run)
        if self.policy == "random":
            window = _DEFAULT_WINDOW if self.window is None else self.window
            object.__setattr__(self, "window", integer("window", window, 1, _LARGEST_WINDOW))
        elif self.window is not None:
            raise PlanError(f'Only policy "random" uses a window; the policy is "{self.policy}". Leave window out.')
        if self.policy == "hash" and not callable(self.key):
            raise PlanError(f'Policy "hash" needs key, a function of a record; it is {self.key!r}.')
        if self.policy != "hash" and self.key is not None:
            raise PlanError(f'Only policy "hash" uses key; the policy is "{self.policy}". Leave key out.')

    def describe(self) -> str:
        """What this stream promises, and what no sharding of it can."""
        always = (
            "Promised: while every rank reads the same records, each goes to exactly one shard, also over a stop and "
            "a restart with another number of shards, where no rank had begun a pass before all ended the one before.\n"
            "Not promised: an exact partition of a stream that differs between ranks or between readings; equal "
            "numbers of batches, for the end is not known before it comes."
        )
        if self.policy == "ordered":
            return f"{always}\nOrdered: source order; shards differ by one record at most."
        if self.policy == "hash":
            return (
                f"{always}\nHash: equal keys share a shard. Shards are equal in expectation only; skew is not known "
                "before the stream ends. Keys of two kinds are refused, and so is, after a stop, a key function that "
                "gives the last records before it other keys than they had."
            )
        return (
            f"{always}\nRandom: within windows of {self.window} records only; no record leaves its window, so records "
            "far apart stay so. In the last, short window shards may differ by some records. After a stop in that "
            "window, records that the source has gained since may be left out."
        )

    def reader(
        self,
        source: Callable[[int], Iterable[Any]],
        shard: int,
        batch_size: int,
        *,
        every: int = 1,
        first: int = 0,
        after: Mapping[str, Any] | None = None,
    ) -> StreamReader:
        """One pass over ``shard``, in batches: lists of ``batch_size`` records, the last one shorter.

        Args:
            source: ``source(start)`` gives the records from number ``start`` on, in order; it is called once, when
                reading starts. ``lambda start: itertools.islice(open(path), start, None)``, or a real seek.
            shard: whose records.
            batch_size: records in a batch.
            every, first: give batches ``first, first + every, ...`` only; for one of several workers of a shard.
            after: a state of this shard in this run; goes on behind it. Batches are numbered from 0 again.

        Raises:
            PlanError: an argument out of its range.
            StateError: ``after`` is of another stream, run or shard; and while reading, if keys are not what they
                were when the past was saved.
        """
        shard = integer("shard", shard, 0, self.shards - 1)
        batch_size = integer("batch_size", batch_size, 1, _LARGEST_BATCH)
        integer("every", every, 1)
        integer("first", first, 0, every - 1)
        if not callable(source):
            raise PlanError(
                "source is a function of the record to start at, such as lambda start: records[start:]; "
                f"it is {source!r}."
            )
        facts = {"format": _FORMAT, **self._facts(), "shards": self.shards, "shard": shard}
        facts["epoch"] = self.epoch
        facts["past"] = [list(run.reached) for run in self.past]
        delivered, known, reached = 0, known_marks(self.past), first_open(self.past)
        if after is not None:
            delivered, own = read_state(after, facts)
            known, reached = known_marks([own]), first_open([own])
        route = self._route(known)
        return StreamReader(
            route, self.past, facts, source, batch_size, every, first, delivered=delivered, reached=reached
        )

    def resume(self, states: Sequence[Mapping[str, Any]], shards: int) -> ShardStream:
        """This stream over ``shards`` shards, without what was delivered already, in the epoch of the states.

        Where all shards had come to the end of the stream, that is the next epoch.

        Args:
            states: ``state_dict()`` of the reader of every shard of the stopped run, in any order. Shards may have
                got differently far in one epoch; some may be in the next one where all others have ended theirs.
            shards: the new number of shards.

        Raises:
            StateError: states of another stream, seed, window or version, of several epochs, or not one of each shard.
            PlanError: ``shards`` out of its range.
        """
        epoch, past = merge_states(states, {"format": _FORMAT, **self._facts()})
        return dataclasses.replace(self, shards=shards, epoch=epoch, past=past)

    def next_epoch(self) -> ShardStream:
        """The same stream for the pass after this one, from its start."""
        return dataclasses.replace(self, epoch=self.epoch + 1, past=())

    def _facts(self) -> dict[str, Any]:
        return {"policy": self.policy, "window": self.window, "seed": self.seed}

    def _route(self, known: Mapping[int, str]) -> Route:
        if self.policy == "random":
            assert self.window is not None
            return InWindows(self.window, ("stream", self.seed, self.epoch))
        if self.policy == "hash":
            assert self.key is not None
            return ByKey(self.key, self.seed, known)
        return InOrder()
