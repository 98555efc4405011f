"""The plan of which samples each rank reads."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import xxhash

from hvdscale.data.hashed import Hashed
from hvdscale.data.hashing import derive_words, hash_keys
from hvdscale.data.ordered import Ordered
from hvdscale.data.shuffled import Shuffled
from hvdscale.data.types import Int64s, Policy
from hvdscale.errors import PlanError

__all__ = ["PolicyName", "ShardPlan"]

PolicyName = Literal["ordered", "random", "hash"]

_MOST_SAMPLES = 2**62
_MOST_SHARDS = 2**31 - 1


@dataclass(frozen=True)
class ShardPlan:
    """``n`` samples over ``shards`` shards. In every epoch each sample belongs to exactly one shard.

    Equal arguments give equal shards on every rank and machine. Plans compare by what they decide.

    Args:
        n: number of samples; 0 is allowed.
        shards: number of shards, usually the world size.
        policy: ``"ordered"``: contiguous intervals of the source. ``"random"``: a new random order each
            epoch, dealt out in turn, so that a step of all ranks reads the same samples whatever their number.
            ``"hash"``: by key; a sample stays where it is as other samples come and go.
        seed: any integer from 0; names the random order, and the hash.
        keys: for ``"hash"``: one integer, string or bytes per sample; equal keys share a shard.
            Without keys the index is the key.

    Raises:
        PlanError: an argument out of its range, or keys that do not fit the samples.
    """

    n: int
    shards: int
    policy: PolicyName = "random"
    seed: int = field(default=0, kw_only=True)
    keys: Sequence[Any] | npt.NDArray[Any] | None = field(default=None, kw_only=True, repr=False, compare=False)
    keys_digest: str = field(init=False)
    _policy: Policy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        n = _integer("n, the number of samples,", self.n, 0, _MOST_SAMPLES)
        shards = _integer("shards", self.shards, 1, _MOST_SHARDS)
        seed = _integer("seed", self.seed, 0, None)
        if self.policy not in get_args(PolicyName):
            names = ", ".join(map(repr, get_args(PolicyName)))
            raise PlanError(f"policy is one of {names}; it is {self.policy!r}.")
        if self.keys is not None and self.policy != "hash":
            raise PlanError(f'Only policy "hash" uses keys; the policy is "{self.policy}". Leave keys out.')
        policy, digest = self._make_policy(n, shards, seed)
        for name, value in (("n", n), ("shards", shards), ("seed", seed), ("keys_digest", digest), ("_policy", policy)):
            object.__setattr__(self, name, value)

    def _make_policy(self, n: int, shards: int, seed: int) -> tuple[Policy, str]:
        if self.policy == "ordered":
            return Ordered(n, shards), ""
        if self.policy == "random":
            return Shuffled(n, shards, seed), ""
        salt = derive_words(1, "hash", seed)[0]
        if self.keys is None:
            return Hashed(n, shards, salt, None), ""
        if len(self.keys) != n:
            raise PlanError(f"Each sample has one key; there are {n} samples and {len(self.keys)} keys.")
        hashes = hash_keys(self.keys, salt)
        return Hashed(n, shards, salt, hashes), xxhash.xxh3_64_hexdigest(hashes.data)

    def indices(self, shard: int, epoch: int = 0) -> Int64s:
        """The samples of ``shard`` in this epoch, in reading order: int64[size]."""
        return self._policy.indices(self._shard(shard), _epoch(epoch))

    def size(self, shard: int, epoch: int = 0) -> int:
        """Number of samples of ``shard`` in this epoch."""
        return self._policy.size(self._shard(shard), _epoch(epoch))

    def owner(self, samples: npt.ArrayLike, epoch: int = 0) -> npt.NDArray[np.int32]:
        """The shard of each sample: int32, in the shape of ``samples``.

        Raises:
            PlanError: a sample that is no integer in ``0 .. n - 1``.
        """
        wanted = np.asarray(samples)
        if wanted.size == 0:
            return np.zeros(wanted.shape, np.int32)
        if wanted.dtype.kind not in "iu":
            raise PlanError(f"Samples are integers in 0..{self.n - 1}; these are {wanted.dtype}.")
        low, high = int(wanted.min()), int(wanted.max())
        if low < 0 or high >= self.n:
            raise PlanError(f"Samples lie in 0..{self.n - 1}; these go from {low} to {high}.")
        return self._policy.owner(wanted.astype(np.int64), _epoch(epoch)).astype(np.int32)

    def _shard(self, shard: int) -> int:
        return _integer("shard", shard, 0, self.shards - 1)


def _epoch(epoch: int) -> int:
    return _integer("epoch", epoch, 0, None)


def _integer(name: str, value: object, low: int, high: int | None) -> int:
    limits = f"from {low}" if high is None else f"in {low}..{high}"
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        raise PlanError(f"{name} must be an integer {limits}; it is {value!r}.")
    return number
