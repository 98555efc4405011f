"""What is added to a bare schedule before it runs: messages, recomputation, the sums of shared parameters."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from hvdscale.model.actions import Action, Schedule

__all__ = ["Links", "chain_links", "with_messages", "with_recompute", "with_reductions"]

Links = tuple[tuple[int, int], ...]
"""(source, target): the output of stage ``source`` is read by the later stage ``target``."""


def chain_links(stages: int) -> Links:
    """Each stage reads the one before it."""
    return tuple((stage, stage + 1) for stage in range(stages - 1))


def with_recompute(schedule: Schedule, stages: Collection[int] | None = None) -> Schedule:
    """Forward passes of ``stages`` (default: all but the last) keep only their inputs, and run again before backward.

    Chen et al., "Training deep nets with sublinear memory cost", arXiv 1604.06174. The last stage goes backward right
    after it went forward: it would gain nothing.
    """
    chosen = set(range(schedule.stages - 1) if stages is None else stages)

    def edit(rank: int, action: Action) -> Sequence[Action]:
        if action.kind in ("B", "I") and action.stage in chosen:
            return Action("C", action.stage, action.microbatch), action
        return (action,)

    return schedule.edited(edit)


def with_messages(schedule: Schedule, links: Links) -> Schedule:
    """Sends after what makes a value, receives before what needs it, wherever two linked stages are on two ranks.

    A recomputation needs no message: it comes before the gradient is waited for.
    """
    far = [(a, b) for a, b in links if schedule.rank_of(a) != schedule.rank_of(b)]
    into: dict[int, list[int]] = {}
    out_of: dict[int, list[int]] = {}
    for source, target in sorted(far):
        into.setdefault(target, []).append(source)
        out_of.setdefault(source, []).append(target)

    def edit(rank: int, action: Action) -> Sequence[Action]:
        stage, m = action.stage, action.microbatch
        before, after = into.get(stage, []), out_of.get(stage, [])
        if action.kind == "F":
            return (
                *(Action("RF", stage, m, source) for source in before),
                action,
                *(Action("SF", stage, m, target) for target in after),
            )
        if action.kind in ("B", "I"):
            return (
                *(Action("RB", stage, m, target) for target in after),
                action,
                *(Action("SB", stage, m, source) for source in reversed(before)),
            )
        return (action,)

    return schedule.edited(edit)


def with_reductions(schedule: Schedule, ties: Iterable[Collection[int]] = ()) -> Schedule:
    """``D`` where a stage's gradients are complete; at the end ``T`` for each parameter shared over ranks.

    ``ties``: for each shared parameter the stages that hold it. The gradients of a stage that holds one are complete
    only after the sum.
    """
    shared = [(number, sorted(stages)) for number, stages in enumerate(ties)]
    over_ranks = [(n, stages) for n, stages in shared if len({schedule.rank_of(s) for s in stages}) > 1]
    waiting = {stage for _, stages in over_ranks for stage in stages}
    last = "W" if schedule.splits_backward else "B"
    left = dict.fromkeys(range(schedule.stages), schedule.microbatches)
    rows = []
    for rank, row in enumerate(schedule.actions):
        new: list[Action] = []
        for action in row:
            new.append(action)
            if action.kind == last:
                left[action.stage] -= 1
                if not left[action.stage] and action.stage not in waiting:
                    new.append(Action("D", action.stage))
        for number, stages in over_ranks:
            held = [stage for stage in stages if schedule.rank_of(stage) == rank]
            if held:
                new.append(Action("T", held[0], number))
        new += [Action("D", stage) for stage in schedule.stages_of(rank) if stage in waiting]
        rows.append(tuple(new))
    return Schedule(schedule.name, schedule.ranks, schedule.stages, schedule.microbatches, tuple(rows))
