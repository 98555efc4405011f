"""The plan of which samples each rank reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from hvdscale.data.certificate import known_total
from hvdscale.data.checks import MOST_SHARDS, flag, instance, integer, numbers_below, one_of, shares_from, weights_for
from hvdscale.data.hashed import Hashed, moved_units
from hvdscale.data.hashing import hash_blocks, key_vector
from hvdscale.data.interruption import Interruption
from hvdscale.data.keys import HashedKeys, IndexKeys, hash_units, salt_of
from hvdscale.data.layouts import Layout
from hvdscale.data.permutation import Permutation
from hvdscale.data.positional import Positional, layout_of, resized
from hvdscale.data.reader import Reader
from hvdscale.data.report import Move, ShardReport, ideal_move
from hvdscale.data.state import merge_states
from hvdscale.data.types import BLOCK, Int64s, Keys, PolicyName, Reading, Share, TailName
from hvdscale.errors import PlanError

__all__ = ["ShardPlan"]

_MOST_SAMPLES = 2**62


@dataclass(frozen=True)
class ShardPlan:
    """``n`` samples over ``shards`` shards. In every epoch each sample belongs to exactly one shard.

    Equal arguments give equal shards on every rank and machine. Plans compare by what they decide.

    Args:
        n: number of samples; 0 is allowed.
        shards: number of shards, usually the world size; at most 65535.
        policy: ``"ordered"``: contiguous intervals of the source. ``"random"``: a new random order each
            epoch, dealt out in turn, so that a step of all ranks reads the same samples whatever their number.
            ``"hash"``: by key; a sample stays where it is as other samples come and go.
        seed: any integer from 0; names the random order, and the hash.
        keys: for ``"hash"``: one integer, string or bytes per sample; equal keys share a shard.
            Without keys the index is the key. The plan keeps two bytes of each, not the keys.
        weights: one positive number per shard, for unequal machines; sizes are in proportion.
        tail: how a reader meets shards that are no multiple of the batch. ``"exact"``: the last batch is smaller,
            and shards may have unequally many batches. ``"pad"``: all shards have as many batches, all full; what
            fills them is marked as not valid. ``"drop"``: all shards have as many batches, all full; the reader
            says which samples are left out.
        unique_keys: refuse keys that occur twice.
        even: for ``"hash"`` with keys: as even as units of the hash go, max/mean within 1.01 where no key comes very
            often and shards are few. A key's shard then depends on all keys: as the data grows, samples move.
        resized_from: the shards and weights before each ``resize``; set by it.
        interrupted: epochs read in part; set by ``resume``.
        first_epoch: where readers start; set by ``resume``.

    Raises:
        PlanError: an argument out of its range, or keys that do not fit the samples.
    """

    n: int
    shards: int
    policy: PolicyName = "random"
    seed: int = field(default=0, kw_only=True)
    keys: Keys | HashedKeys | None = field(default=None, kw_only=True, repr=False, compare=False)
    weights: Sequence[float] | None = field(default=None, kw_only=True)
    tail: TailName = field(default="exact", kw_only=True)
    unique_keys: bool = field(default=False, kw_only=True, repr=False, compare=False)
    even: bool = field(default=False, kw_only=True)
    resized_from: tuple[Share, ...] = field(default=(), kw_only=True)
    interrupted: tuple[Interruption, ...] = field(default=(), kw_only=True, repr=False)
    first_epoch: int = field(default=0, kw_only=True)
    keys_digest: str = field(init=False)

    def __post_init__(self) -> None:
        n = integer("n, the number of samples,", self.n, 0, _MOST_SAMPLES)
        shards = integer("shards", self.shards, 1, MOST_SHARDS)
        seed = integer("seed", self.seed, 0)
        one_of("policy", self.policy, get_args(PolicyName))
        one_of("tail", self.tail, get_args(TailName))
        weights = weights_for(shards, self.weights)
        unique, even = flag("unique_keys", self.unique_keys), flag("even", self.even)
        keys = self._hashed_keys(n, seed, unique)
        if unique and keys is None:
            raise PlanError('unique_keys is for policy "hash" with keys; there are none. Leave it out.')
        if even and keys is None:
            raise PlanError('even is for policy "hash" with keys; "random" and "ordered" are even by themselves.')
        checked: dict[str, object] = {"n": n, "shards": shards, "seed": seed, "weights": weights, "keys": keys}
        checked["even"] = even
        checked["unique_keys"] = unique
        checked["resized_from"] = shares_from(self.resized_from)
        instance("interrupted", self.interrupted, tuple)
        for each in self.interrupted:
            instance("An interrupted epoch", each, Interruption)
        checked["first_epoch"] = integer("first_epoch", self.first_epoch, 0)
        checked["keys_digest"] = "" if keys is None else keys.digest
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _hashed_keys(self, n: int, seed: int, unique: bool) -> HashedKeys | None:
        if self.keys is None:
            return None
        if self.policy != "hash":
            raise PlanError(f'Only policy "hash" uses keys; the policy is "{self.policy}". Leave keys out.')
        keys = self.keys if isinstance(self.keys, HashedKeys) else key_vector(self.keys)
        if len(keys) != n:
            raise PlanError(f"Each sample has one key; there are {n} samples and {len(keys)} keys.")
        if not isinstance(keys, HashedKeys):
            return HashedKeys.of(keys, seed, unique)
        if keys.seed != seed:
            raise PlanError(f"These keys were hashed under seed {keys.seed}, not {seed}. Give the keys.")
        return keys

    # What a shard reads.

    def indices(self, shard: int, epoch: int = 0) -> Int64s:
        """The samples of ``shard`` in this epoch, in reading order: int64[size].

        Of an epoch that was interrupted before ``resume``: what is still to be read.
        """
        return np.concatenate([np.zeros(0, np.int64), *self.blocks(shard, epoch)])

    def blocks(self, shard: int, epoch: int = 0, block: int = BLOCK) -> Iterator[Int64s]:
        """The same lazily, at most ``block`` samples at a time, in memory that does not grow with ``n``."""
        shard, block = self._shard(shard), integer("block", block, 1)
        return self.reading(epoch).blocks(shard, 0, block)

    def size(self, shard: int, epoch: int = 0) -> int:
        """Number of samples of ``shard`` in this epoch."""
        return int(self.reading(epoch).sizes[self._shard(shard)])

    def sizes(self, epoch: int = 0) -> Int64s:
        """Number of samples of every shard: int64[shards]. With ``"hash"`` the first call looks at every sample."""
        return self.reading(epoch).sizes.copy()

    def owner(self, samples: npt.ArrayLike, epoch: int = 0) -> npt.NDArray[np.int32]:
        """The shard of each sample: int32, in the shape of ``samples``.

        In an epoch that was interrupted before ``resume``, -1 for samples that had been read by then.

        Raises:
            PlanError: a sample that is no integer in ``0 .. n - 1``.
        """
        wanted = numbers_below("Samples", samples, self.n)
        reading = self.reading(epoch)
        return (reading.owner(wanted) if wanted.size else wanted).astype(np.int32)

    def owner_of_keys(self, keys: Keys) -> npt.NDArray[np.int32]:
        """The shard of each key under policy ``"hash"``, of keys in the plan or not: int32[len(keys)].

        Raises:
            PlanError: another policy, or keys of no usable kind.
        """
        if self.policy != "hash":
            raise PlanError(f'Only policy "hash" places keys; the policy is "{self.policy}".')
        vector, table = key_vector(keys), self._hashed.table
        out = np.empty(len(vector), np.int32)
        place = 0
        for hashes in hash_blocks(vector, salt_of(self.seed)):
            out[place : place + len(hashes)] = table.take(hash_units(hashes))
            place += len(hashes)
        return out

    def reading(self, epoch: int = 0) -> Reading:
        """What every shard reads in one epoch; the lower layer of the methods above."""
        epoch = integer("epoch", epoch, self.first_epoch)
        past = next((each for each in self.interrupted if each.epoch == epoch), None)
        if past is None:
            return self._first_reading(self.shares, epoch)
        if epoch not in self._continued:
            reading = self._first_reading(past.legs[0].shares, epoch)
            after = [*(leg.shares for leg in past.legs[1:]), self.shares]
            for leg, shares in zip(past.legs, after, strict=True):
                reading = reading.after(leg.within(reading.sizes, epoch), shares)
            self._continued[epoch] = reading
        return self._continued[epoch]

    def _first_reading(self, shares: tuple[Share, ...], epoch: int) -> Reading:
        own = shares == self.shares
        if self.policy == "hash":
            return self._hashed if own else Hashed(self._key_units, shares, self.even)
        dealt = self.policy == "random"
        layout = self._layout if own else layout_of(self.n, shares, dealt)
        return Positional(layout, shares, Permutation(self.n, (self.seed, epoch)) if dealt else None)

    # What the plan is.

    @property
    def shares(self) -> tuple[Share, ...]:
        """The first shards and weights, and those of each resize up to now."""
        return (*self.resized_from, (self.shards, self.weights))  # type: ignore[arg-type]

    def report(self, epoch: int | None = None) -> ShardReport:
        """Sizes, max/mean and the like, of the first epoch unless told; ``print`` it."""
        sizes = self.sizes(self.first_epoch if epoch is None else epoch)
        return ShardReport.of(self.policy, sizes, self.weights)  # type: ignore[arg-type]

    def certificate(self) -> int:
        """What the sums of all readers for one epoch must add up to, modulo 2**64: the epoch was read exactly once.

        About 4 ns a sample at the first call, then remembered.
        """
        return known_total(self.n)

    # From this plan to another.

    def resize(self, shards: int, weights: Sequence[float] | None = None) -> tuple[ShardPlan, Move]:
        """The same samples over other shards, moving as few as an exact division can.

        Shards that remain keep their numbers; the last ones leave, or new ones join behind them.
        """
        after = dataclasses.replace(self, shards=shards, weights=weights, resized_from=self.shares)
        ideal = ideal_move(self.shares[-1], after.shares[-1])
        if self.policy == "hash":
            return after, Move(moved_units(self._key_units, self._hashed.table, after._hashed.table), ideal)
        after.__dict__["_layout"], moved = resized(self._layout, after.shares[-1])  # no need to replay the lineage
        return after, Move(moved / max(self.n, 1), ideal)

    def reader(self, shard: int, batch_size: int, epoch: int | None = None) -> Reader:
        """Batches of ``shard``, epoch after epoch without end, from ``epoch`` (default: the plan's first) on.

        Raises:
            PlanError: under tail ``"drop"`` a shard that fills no batch; under ``"pad"`` a batch far beyond any shard.
        """
        return Reader(self, self._shard(shard), integer("batch_size", batch_size, 1, _MOST_SAMPLES), epoch)

    @classmethod
    def resume(
        cls,
        states: Sequence[Mapping[str, Any]],
        shards: int | None = None,
        *,
        keys: Keys | None = None,
        weights: Sequence[float] | None = None,
    ) -> ShardPlan:
        """The plan that reads what is left, from the ``state_dict`` of every reader of an interrupted run.

        Readers of the new plan start in the epoch of the slowest state. In every interrupted epoch they read what
        is left of it, exactly once in all; later epochs follow the plan for the new shards. With as many shards
        as before, each shard goes on with its own rest, batch for batch as if nothing had happened where all
        had come equally far. A plan that was resized is resized again; any other starts afresh.

        Args:
            states: one per shard of the interrupted run, in any order.
            shards: shards from now on; default: as before.
            keys: the keys again, for a plan that had some; a digest of them is checked.
            weights: of the new shards; default: as before where their number stays.

        Raises:
            StateError: states that are incomplete, damaged, of another format, or of different plans.
            PlanError: shards, keys or weights that cannot be.
        """
        past = merge_states(states)
        count = past.shares[-1][0] if shards is None else integer("shards", shards, 1, MOST_SHARDS)
        if weights is None and count == past.shares[-1][0]:
            weights = past.shares[-1][1]
        share = (count, weights_for(count, weights))
        lineage = past.shares if len(past.shares) > 1 else ()
        if share == past.shares[-1]:
            lineage = past.shares[:-1]
        before = cls(
            past.n,
            count,
            past.policy,
            seed=past.seed,
            keys=past.checked_keys(keys),
            weights=share[1],
            tail=past.tail,
            even=past.even,
            resized_from=lineage,
        )
        past.check_digest(before.keys_digest)
        epochs = past.interruptions(lambda epoch: before._past_sizes(past.interrupted, past.shares, epoch))
        return dataclasses.replace(before, interrupted=epochs, first_epoch=past.first_epoch)

    def _past_sizes(self, interrupted: tuple[Interruption, ...], shares: tuple[Share, ...], epoch: int) -> Int64s:
        """Sizes in ``epoch`` of the plan that this one continues."""
        (shards, weights), earlier = shares[-1], shares[:-1]
        kept = tuple(each for each in interrupted if each.epoch == epoch)
        past = dataclasses.replace(
            self, shards=shards, weights=weights, resized_from=earlier, interrupted=kept, first_epoch=0
        )
        return past.reading(epoch).sizes

    # Made when first asked for.

    @cached_property
    def _continued(self) -> dict[int, Reading]:
        return {}

    @cached_property
    def _layout(self) -> Layout:
        return layout_of(self.n, self.shares, self.policy == "random")

    @cached_property
    def _key_units(self) -> HashedKeys | IndexKeys:
        return self.keys if isinstance(self.keys, HashedKeys) else IndexKeys(self.n, self.seed)

    @cached_property
    def _hashed(self) -> Hashed:
        return Hashed(self._key_units, self.shares, self.even)

    def _shard(self, shard: int) -> int:
        return integer("shard", shard, 0, self.shards - 1)
