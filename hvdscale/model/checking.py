"""Whether the lists of a schedule are complete and in an order that makes sense on each rank alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from hvdscale.errors import PlanError
from hvdscale.model.actions import Action, Kind, Schedule
from hvdscale.model.passes import Links

__all__ = ["check_actions"]


def check_actions(schedule: Schedule, links: Links) -> None:
    """Every pass once, on the rank of its stage, after what it needs there; every message with both its ends.

    Raises:
        PlanError: naming the first action that breaks a rule.
    """
    place = {}  # action -> (rank, position)
    for rank, row in enumerate(schedule.actions):
        for i, action in enumerate(row):
            if not 0 <= action.stage < schedule.stages or schedule.rank_of(action.stage) != rank:
                raise PlanError(
                    f"Stage s of {schedule.stages} is on rank s % {schedule.ranks}; rank {rank} has {action}."
                )
            if action in place:
                raise PlanError(f"An action is done once; rank {rank} has {action} twice.")
            place[action] = (rank, i)
    _check_passes(schedule, place)
    _check_messages(schedule, place, links)


def _check_passes(schedule: Schedule, place: dict[Action, tuple[int, int]]) -> None:
    order: tuple[Kind, ...] = ("F", "I", "W") if schedule.splits_backward else ("F", "B")
    expected = schedule.stages * schedule.microbatches
    for stage in range(schedule.stages):
        for m in range(schedule.microbatches):
            passes = [Action(kind, stage, m) for kind in order]
            missing = [action for action in passes if action not in place]
            if missing:
                raise PlanError(f"Every stage works on every micro-batch; {missing[0]} is missing.")
            again = Action("C", stage, m)
            chain = [passes[0], *([again] if again in place else []), *passes[1:]]
            for before, after in pairwise(chain):
                if place[before][1] >= place[after][1]:
                    raise PlanError(f"{before} comes before {after}; rank {place[after][0]} has them the other way.")
    counts = Counter(action.kind for action in place)
    strange = [kind for kind in counts if kind in ("B", "I", "W") and kind not in order]
    if strange or any(counts[action.kind] != expected for action in passes):
        raise PlanError(
            f"A backward pass is whole (B) everywhere or in two halves (I, W) everywhere, once for each of "
            f"{expected} forward passes; there are {counts['F']} F, {counts['B']} B, {counts['I']} I, {counts['W']} W."
        )


def _check_messages(schedule: Schedule, place: dict[Action, tuple[int, int]], links: Links) -> None:
    messages = [action for action in place if action.kind in ("SF", "RF", "SB", "RB")]
    if not messages:
        return  # a bare schedule: passes wait for passes
    backward: Kind = "I" if schedule.splits_backward else "B"
    wanted: set[Action] = set()
    for source, target in links:
        if schedule.rank_of(source) == schedule.rank_of(target):
            continue
        for m in range(schedule.microbatches):
            there = (Action("SF", source, m, target), Action("RF", target, m, source))
            back = (Action("SB", target, m, source), Action("RB", source, m, target))
            ordered = [
                (Action("F", source, m), there[0]),
                (there[1], Action("F", target, m)),
                (Action(backward, target, m), back[0]),
                (back[1], Action(backward, source, m)),
            ]
            wanted |= {*there, *back}
            for before, after in ordered:
                for action in (before, after):
                    if action not in place:
                        raise PlanError(f"Stage {target} reads stage {source} on another rank; {action} is missing.")
                if place[before][1] >= place[after][1]:
                    raise PlanError(f"{before} comes before {after}; rank {place[after][0]} has them the other way.")
    extra = [action for action in messages if action not in wanted]
    if extra:
        raise PlanError(f"A message goes between two linked stages on two ranks; {extra[0]} does not.")
