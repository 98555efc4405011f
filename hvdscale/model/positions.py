"""The optimizer of a whole model, from those of ranks that hold parts of it: which parameter stands where in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdscale.errors import StateError
from hvdscale.model.layout import Layout
from hvdscale.runtime.transport import Transport
from hvdscale.runtime.values import decode, encode

__all__ = ["WholeOptimizer", "merged_groups", "tell_optimizers"]

Groups = Sequence[Sequence[str]]


@dataclass(frozen=True)
class WholeOptimizer:
    """What an optimizer over the whole model is over.

    Args:
        groups: names of its parameters, group by group, in its order.
        held: for each of these, what the rank that speaks for it told of it.
    """

    groups: tuple[tuple[str, ...], ...]
    held: Mapping[str, Any]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for group in self.groups for name in group)


def merged_groups(ranks: Mapping[int, Groups], names: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """The groups of an optimizer over the whole model, from those of ranks with parts of it.

    Ranks that hold the same parameters keep the order they have. Those of stages are put into the order of the model,
    which each of them must have.

    Args:
        ranks: names of parameters, group by group, by rank.
        names: all of the model's, in order.

    Raises:
        StateError: ranks differ in how many groups they have, or in the group a shared parameter is in; or a stage has
            another order than the model.
    """
    (first, groups), *others = ranks.items()
    if all(_plain(theirs) == _plain(groups) for _, theirs in others):
        return _plain(groups)
    place = {name: number for number, name in enumerate(names)}
    group_of: dict[str, tuple[int, int]] = {}
    for rank, theirs in ranks.items():
        if len(theirs) != len(groups):
            raise StateError(
                f"The optimizers of all stages have the same groups; rank {first} has {len(groups)} and rank {rank} "
                f"{len(theirs)}. Make the same ones on every rank, empty ones too."
            )
        for number, group in enumerate(theirs):
            places = [place[name] for name in group]
            if places != sorted(places):
                raise StateError(
                    "Each group of a stage's optimizer has its parameters in the order of the model; group "
                    f"{number} on rank {rank} does not. Take them in the order of sharded.named_parameters()."
                )
            for name in group:
                there, whose = group_of.setdefault(name, (number, rank))
                if there != number:
                    raise StateError(
                        f"A shared parameter is in the same group everywhere; {name} is in group {there} on rank "
                        f"{whose} and in group {number} on rank {rank}."
                    )
    ordered = sorted(group_of, key=place.__getitem__)
    return tuple(tuple(name for name in ordered if group_of[name][0] == number) for number in range(len(groups)))


def tell_optimizers(
    layout: Layout, rank: int, transport: Transport, groups: Groups, held: Mapping[str, Any], error: str = ""
) -> WholeOptimizer:
    """What the ranks of one copy of the model train, put together. Collective over ``transport``, of all ranks.

    Args:
        groups: names of this rank's parameters, group by group.
        held: what this rank tells of them: values that ``encode`` takes.
        error: what is wrong here; it becomes everyone's.

    Raises:
        StateError: an error of any rank, or groups that do not go together; on every rank of the copy.
    """
    try:
        mine = encode([error, [list(group) for group in groups], dict(held)], "the optimizer's state")
    except StateError as refusal:
        mine = encode([str(refusal), [], {}])
    told = [decode(data) for data in transport.allgather(mine)]
    for theirs, (message, _, _) in enumerate(told):
        if message:
            alone = all(other[0] == message for other in told)
            raise StateError(message if alone else f"rank {theirs}: {message}")
    copy = layout.mesh.group(rank, "pp", "tp")
    merged = merged_groups({r: told[r][1] for r in copy}, layout.names)
    dp = layout.mesh.coordinates(rank).dp
    names = [name for group in merged for name in group]
    return WholeOptimizer(merged, {n: told[layout.speakers(n, dp)[0]][2].get(n, {}) for n in names})


def _plain(groups: Groups) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(group) for group in groups)
