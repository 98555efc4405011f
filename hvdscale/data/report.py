"""What a plan gives to whom, and what a resize moves: numbers with a printed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hvdscale.data.shares import share_out
from hvdscale.data.types import Int64s

__all__ = ["Move", "ShardReport", "ideal_move"]

_BAR = 40  # characters of the longest bar
_ROWS = 16  # shards shown before the middle ones are left out


@dataclass(frozen=True, eq=False)
class ShardReport:
    """Sizes of the shards in one epoch.

    Attributes:
        policy: of the plan.
        sizes: samples of each shard, int64[shards].
        goals: what each would hold under an exact division by weight, int64[shards].
    """

    policy: str
    sizes: Int64s
    goals: Int64s

    @classmethod
    def of(cls, policy: str, sizes: Int64s, weights: tuple[float, ...] | None) -> ShardReport:
        return cls(policy, sizes, share_out(int(sizes.sum()), len(sizes), weights))

    @property
    def n(self) -> int:
        """Samples in all."""
        return int(self.sizes.sum())

    @property
    def mean(self) -> float:
        """Samples of a shard on average."""
        return self.n / len(self.sizes)

    @property
    def skew(self) -> float:
        """The largest ratio of a size to its goal; without weights, max/mean. 1.0 for no samples."""
        if self.n == 0:
            return 1.0
        if (self.goals == self.goals[0]).all() or self.goals.max() - self.goals.min() <= 1:
            return float(self.sizes.max() / self.mean)
        return float((self.sizes / np.maximum(self.goals, 1)).max())

    @property
    def empty(self) -> int:
        """Shards without a sample."""
        return int(np.count_nonzero(self.sizes == 0))

    def __str__(self) -> str:
        low, high = int(self.sizes.min()), int(self.sizes.max())
        lines = [
            f"{self.n:,} samples over {len(self.sizes)} shards ({self.policy}): {low:,} to {high:,} each, "
            f"mean {self.mean:,.1f}, largest {self.skew:.4f} of its share"
        ]
        if self.empty and self.n:
            lines.append(f"{self.empty} shards hold no sample.")
        return "\n".join([*lines, *self._chart()])

    def _chart(self) -> list[str]:
        shards = list(range(len(self.sizes)))
        left_out = len(shards) - _ROWS
        if left_out > 1:
            shards = shards[: _ROWS // 2] + shards[-_ROWS // 2 :]
        high = max(int(self.sizes.max()), 1)
        width, digits = len(str(len(self.sizes) - 1)), len(f"{high:,}")
        held = {shard: int(self.sizes[shard]) for shard in shards}
        rows = [
            f"  {shard:>{width}}  {size:>{digits},}  {'#' * round(_BAR * size / high)}" for shard, size in held.items()
        ]
        if left_out > 1:
            rows.insert(_ROWS // 2, f"  {'.' * width}  {left_out} more shards")
        return rows


@dataclass(frozen=True)
class Move:
    """What a resize moves.

    Attributes:
        fraction: share of the samples that change owner, 0 .. 1.
        ideal: the least that any exact division to the same shares must move;
            ``|k' - k| / max(k, k')`` for ``k`` equal shards that become ``k'``.
    """

    fraction: float
    ideal: float

    def __str__(self) -> str:
        return f"{self.fraction:.2%} of the samples move; between shards of exact size at least {self.ideal:.2%}"


def ideal_move(before: tuple[int, tuple[float, ...] | None], after: tuple[int, tuple[float, ...] | None]) -> float:
    """The share of the data that shards have too little of, summed: nothing less can move."""
    (old, old_weights), (new, new_weights) = before, after
    count = max(old, new)
    have, want = np.zeros(count), np.zeros(count)
    have[:old], want[:new] = _parts(old, old_weights), _parts(new, new_weights)
    return float(np.maximum(want - have, 0).sum())


def _parts(shards: int, weights: tuple[float, ...] | None) -> npt.NDArray[np.float64]:
    """The part of each shard, summing to 1. Weights may be as large as floats go; their sum is not."""
    scaled = np.array(weights or np.ones(shards))
    scaled /= scaled.max()
    parts: npt.NDArray[np.float64] = scaled / scaled.sum()
    return parts
