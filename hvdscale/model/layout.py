"""Where each parameter of a whole model lies on a mesh: one table for cutting, joining and moving to another mesh.

A parameter belongs to one stage of the pipeline (to several, if stages share it). On the tensor ranks of a stage it is
either split along one axis or held whole by each. Names and shapes are those of the model nobody has sharded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.errors import PlanError, StateError
from hvdscale.model.mesh import Mesh

__all__ = ["Layout", "Placement", "Split", "reshard"]

Array = npt.NDArray[Any]
Span = tuple[int, int]


@dataclass(frozen=True)
class Split:
    """How one axis is divided among tensor ranks.

    Args:
        axis: which one.
        sections: how many parts lie one after another along it, of which every rank gets its piece: 3 where the
            features of queries, keys and values are one matrix.
        grain: how many entries stay together: the features of an attention head.

    Raises:
        PlanError: numbers that cannot be.
    """

    axis: int
    sections: int = 1
    grain: int = 1

    def __post_init__(self) -> None:
        if self.axis < 0 or self.sections < 1 or self.grain < 1:
            given = (self.axis, self.sections, self.grain)
            raise PlanError(f"A split has axis >= 0, sections >= 1 and grain >= 1; it is Split{given}.")

    def spans(self, length: int, parts: int, part: int) -> tuple[Span, ...]:
        """(start, stop) of the pieces of ``part``, one in each section; parts as even as can be, the first larger.

        Raises:
            PlanError: the axis cannot be divided so.
        """
        units, rest = divmod(length, self.sections * self.grain)
        if rest:
            raise PlanError(
                f"An axis of {length} cannot be divided into {self.sections} sections of whole groups of {self.grain}."
            )
        if units < parts:
            what = f"{units} groups of {self.grain} (heads, say)" if self.grain > 1 else f"an axis of {length}"
            raise PlanError(
                f"{what} cannot be divided over tp={parts} ranks: each needs one at least. Use tp={units} or less."
            )
        small, larger = divmod(units, parts)
        start = (part * small + min(part, larger)) * self.grain
        stop = start + (small + (part < larger)) * self.grain
        section = length // self.sections
        return tuple((i * section + start, i * section + stop) for i in range(self.sections))


@dataclass(frozen=True)
class Placement:
    """One parameter (or buffer) of the whole model.

    Args:
        name: in the unsharded model.
        shape: there.
        dtype: there, as text.
        stages: of the pipeline that hold it; the first one speaks for it.
        split: over tensor ranks; ``None``: each holds all of it.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    stages: tuple[int, ...] = (0,)
    split: Split | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise PlanError(f"{self.name} belongs to no stage.")
        if self.split is not None and self.split.axis >= len(self.shape):
            raise PlanError(f"{self.name} has shape {list(self.shape)} and no axis {self.split.axis} to split.")

    def spans(self, parts: int, part: int) -> tuple[Span, ...]:
        assert self.split is not None
        try:
            return self.split.spans(self.shape[self.split.axis], parts, part)
        except PlanError as error:
            raise PlanError(f"{self.name}, shape {list(self.shape)}: {error}") from None

    def local_shape(self, parts: int, part: int) -> tuple[int, ...]:
        if self.split is None:
            return self.shape
        length = sum(stop - start for start, stop in self.spans(parts, part))
        return (*self.shape[: self.split.axis], length, *self.shape[self.split.axis + 1 :])


@dataclass(frozen=True)
class Layout:
    """All parameters and buffers of a model on ``mesh``.

    Raises:
        PlanError: a name given twice, a stage there is not, or an axis that cannot be divided.
    """

    mesh: Mesh
    placements: tuple[Placement, ...]

    def __post_init__(self) -> None:
        if len(self._by_name) < len(self.placements):
            names = [p.name for p in self.placements]
            raise PlanError(f"Names must be unique; {next(n for n in names if names.count(n) > 1)!r} appears twice.")
        for placement in self.placements:
            if max(placement.stages) >= self.mesh.pp or min(placement.stages) < 0:
                raise PlanError(f"{placement.name} is on stages {placement.stages}; the mesh has pp={self.mesh.pp}.")
            if placement.split is not None:
                placement.spans(self.mesh.tp, 0)

    @cached_property
    def _by_name(self) -> dict[str, Placement]:
        return {placement.name: placement for placement in self.placements}

    def __getitem__(self, name: str) -> Placement:
        try:
            return self._by_name[name]
        except KeyError:
            raise StateError(
                f"The model has no {name!r}; it has {', '.join(list(self._by_name)[:5])} and others."
            ) from None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def holds(self, name: str, rank: int) -> bool:
        """Whether ``rank`` has a part, or a copy, of it."""
        return self.mesh.coordinates(rank).pp in self[name].stages

    def speaks(self, name: str, rank: int) -> bool:
        """Whether ``rank``'s part counts: of copies among tensor ranks and stages only the first does.

        Over the ranks of one copy of the model, these parts are the parameter exactly once.
        """
        place, placement = self.mesh.coordinates(rank), self[name]
        return place.pp == placement.stages[0] and (placement.split is not None or place.tp == 0)

    def speakers(self, name: str, dp: int = 0) -> tuple[int, ...]:
        """The ranks of copy ``dp`` of the model whose parts make up the parameter, in the order they are joined."""
        placement = self[name]
        parts = range(self.mesh.tp) if placement.split is not None else range(1)
        return tuple(self.mesh.rank(dp, placement.stages[0], tp) for tp in parts)

    def local_shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Of what ``rank`` holds."""
        return self[name].local_shape(self.mesh.tp, self.mesh.coordinates(rank).tp)

    def elements(self, rank: int) -> int:
        """How many numbers ``rank`` holds."""
        return sum(int(np.prod(self.local_shape(n, rank))) for n in self.names if self.holds(n, rank))

    def slices(self, name: str, rank: int) -> tuple[tuple[slice, ...], ...]:
        """Where the pieces of ``rank``'s part lie in the whole array, in the order they lie in the part."""
        placement = self[name]
        if placement.split is None:
            return ((slice(None),) * len(placement.shape),)
        before = (slice(None),) * placement.split.axis
        spans = placement.spans(self.mesh.tp, self.mesh.coordinates(rank).tp)
        return tuple((*before, slice(start, stop)) for start, stop in spans)

    def cut(self, name: str, whole: Array, rank: int) -> Array:
        """``rank``'s part of the whole array, as an array of its own.

        Raises:
            StateError: an array of another shape.
        """
        placement = self[name]
        if tuple(whole.shape) != placement.shape:
            raise StateError(
                f"{name} has shape {list(placement.shape)} in the whole model; an array of {list(whole.shape)} came."
            )
        pieces = [whole[at] for at in self.slices(name, rank)]
        return np.concatenate(pieces, placement.split.axis if placement.split else 0) if placement.shape else whole

    def join(self, name: str, parts: Mapping[int, Array], dp: int = 0) -> Array:
        """The whole array from the parts of ``speakers(name, dp)``, by rank; other ranks' are not looked at.

        Raises:
            StateError: a part is missing or has another shape.
        """
        placement = self[name]
        speakers = self.speakers(name, dp)
        for rank in speakers:
            if rank not in parts:
                raise StateError(f"{name} lies on ranks {list(speakers)}; the part of rank {rank} is missing.")
            shape = self.local_shape(name, rank)
            if tuple(parts[rank].shape) != shape:
                raise StateError(f"{name} on rank {rank} has shape {list(shape)}; {list(parts[rank].shape)} came.")
        if placement.split is None:
            return parts[speakers[0]]
        whole = np.empty(placement.shape, parts[speakers[0]].dtype)
        for rank in speakers:
            at = 0
            for piece in self.slices(name, rank):
                length = piece[-1].stop - piece[-1].start
                source = (*piece[:-1], slice(at, at + length))
                whole[piece] = parts[rank][source]
                at += length
        return whole

    def cut_all(self, whole: Mapping[str, Array], rank: int) -> dict[str, Array]:
        """What ``rank`` holds of the whole model.

        Raises:
            StateError: a name is missing or unknown, or a shape is another one.
        """
        self.check_names(whole)
        return {name: self.cut(name, whole[name], rank) for name in self.names if self.holds(name, rank)}

    def join_all(self, parts: Mapping[int, Mapping[str, Array]]) -> dict[str, Array]:
        """The whole model from the parts of the ranks of one copy of it."""
        return {
            name: self.join(name, {rank: held[name] for rank, held in parts.items() if name in held})
            for name in self.names
        }

    def check_names(self, names: Iterable[str]) -> None:
        """Raise StateError unless these are the names of the whole model."""
        missing, unknown = [n for n in self.names if n not in set(names)], [n for n in names if n not in self._by_name]
        if missing or unknown:
            said = [
                f"{len(n)} are {w} ({', '.join(n[:3])})" for n, w in ((missing, "missing"), (unknown, "unknown")) if n
            ]
            raise StateError(f"The names must be those of the whole model; {' and '.join(said)}.")


def reshard(parts: Mapping[int, Mapping[str, Array]], source: Layout, target: Layout, rank: int) -> dict[str, Array]:
    """What ``rank`` of ``target`` holds, from what the ranks of ``source`` hold; one parameter at a time.

    Raises:
        StateError: the two layouts are not of the same model, or parts are missing.
    """
    target.check_names(source.names)
    held = {}
    for name in target.names:
        if target.holds(name, rank):
            whole = source.join(name, {r: theirs[name] for r, theirs in parts.items() if name in theirs})
            held[name] = target.cut(name, whole, rank)
    return held
