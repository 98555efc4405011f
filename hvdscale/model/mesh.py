"""The ranks as a grid: copies of the model (data), its layers (pipeline), its features (tensor).

Ranks along the tensor axis lie next to each other, since they exchange most; then the pipeline, then the data axis:
``rank = (d * pp + p) * tp + t``, as in Narayanan et al., arXiv 2104.04473.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal, NamedTuple

from hvdscale.errors import PlanError

__all__ = ["Axis", "Coordinates", "Mesh"]

Axis = Literal["dp", "pp", "tp"]
_AXES: tuple[Axis, ...] = ("dp", "pp", "tp")  # the slowest first


class Coordinates(NamedTuple):
    """A rank's place along the data, pipeline and tensor axis, each from 0."""

    dp: int
    pp: int
    tp: int


@dataclass(frozen=True)
class Mesh:
    """``dp`` copies of a model whose layers lie on ``pp`` stages, and whose features lie on ``tp`` ranks each.

    Raises:
        PlanError: an axis that is not a whole number from 1.
    """

    dp: int = 1
    pp: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for axis, length in zip(_AXES, self.shape, strict=True):
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise PlanError(f"Mesh({axis}=...) must be a whole number of ranks from 1; it is {length!r}.")

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.dp, self.pp, self.tp)

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.dp * self.pp * self.tp

    def check(self, world_size: int) -> None:
        """Raise PlanError unless the mesh takes exactly the ranks there are."""
        if self.size == world_size:
            return
        others = self.pp * self.tp
        rest = f"dp={world_size // others}" if world_size % others == 0 else f"a world of {self.size} ranks"
        raise PlanError(
            f"dp * pp * tp must be the number of ranks: {self.dp} * {self.pp} * {self.tp} = {self.size}, and there are "
            f"{world_size}. Use {rest}, or other axes."
        )

    def coordinates(self, rank: int) -> Coordinates:
        """Where ``rank`` lies.

        Raises:
            PlanError: no such rank in the mesh.
        """
        if not 0 <= rank < self.size:
            raise PlanError(f"A mesh of {self.size} ranks has ranks 0 to {self.size - 1}; rank {rank} was asked for.")
        rest, tp = divmod(rank, self.tp)
        dp, pp = divmod(rest, self.pp)
        return Coordinates(dp, pp, tp)

    def rank(self, dp: int = 0, pp: int = 0, tp: int = 0) -> int:
        """The rank that lies there.

        Raises:
            PlanError: outside the mesh.
        """
        for axis, place, length in zip(_AXES, (dp, pp, tp), self.shape, strict=True):
            if not 0 <= place < length:
                raise PlanError(f"The mesh has places 0 to {length - 1} along {axis}; {place} was asked for.")
        return (dp * self.pp + pp) * self.tp + tp

    def group(self, rank: int, *axes: Axis) -> tuple[int, ...]:
        """The ranks, ascending, that differ from ``rank`` along ``axes`` only.

        ``group(r, "dp")``: those that hold the same part of the model. ``group(r, "pp", "tp")``: one whole model.

        Raises:
            PlanError: an axis there is not.
        """
        for axis in axes:
            if axis not in _AXES:
                raise PlanError(f"The axes of a mesh are 'dp', 'pp' and 'tp'; {axis!r} was asked for.")
        here = self.coordinates(rank)
        places = [
            range(length) if axis in axes else [place]
            for axis, place, length in zip(_AXES, here, self.shape, strict=True)
        ]
        return tuple(self.rank(*place) for place in itertools.product(*places))

    def groups(self, *axes: Axis) -> tuple[tuple[int, ...], ...]:
        """All ranks, split into the groups along ``axes``; the same on every rank."""
        return tuple(dict.fromkeys(self.group(rank, *axes) for rank in range(self.size)))
