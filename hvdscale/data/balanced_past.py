"""States of a balanced run, brought to one step.

A step's samples lie across all ranks, so a step is delivered by all of them or by none. But a rank whose last steps of
an epoch bring it nothing is through with them at once, before the others have come to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from hvdscale.data.checks import integer, states_of_all
from hvdscale.errors import PlanError, StateError

if TYPE_CHECKING:
    from hvdscale.data.balanced import BalancedPlan

__all__ = ["FORMAT", "own_states"]

FORMAT = "balanced-v1"


def own_states(plan: BalancedPlan, states: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The states of the readers of ``plan.plan`` right before the first step that a rank has not delivered.

    Raises:
        StateError: no state of a balanced reader, a damaged one, or states of different steps.
    """
    states = states_of_all(states)
    for i, state in enumerate(states):
        if not isinstance(state, Mapping) or state.get("format") != FORMAT:
            raise StateError(f"State {i} is not that of a balanced reader ({FORMAT}): {state!r:.200}.")
    places = [_place(state) for state in states]
    here = min(places)
    return [
        state["own"] if place == here else _back(plan, state["own"], place, here)
        for state, place in zip(states, places, strict=True)
    ]


def _place(state: Mapping[str, Any]) -> tuple[int, int]:
    """(epoch, step) before which the rank stands."""
    try:
        place = integer("epoch", state["epoch"], 0), integer("step", state["step"], 0)
        if not isinstance(state["own"], Mapping):
            raise PlanError("own is no table.")
    except (KeyError, PlanError) as error:
        raise StateError(f"A balanced state counts its steps; this one is damaged ({error}): {state!r:.200}.") from None
    return place


def _back(
    plan: BalancedPlan, own: Mapping[str, Any], place: tuple[int, int], here: tuple[int, int]
) -> Mapping[str, Any]:
    """``own`` as it was before the step ``here``, if the rank has got nothing since."""
    epoch, step = here
    try:
        shard = integer("shard", own["shard"], 0, plan.shards - 1)
        size = integer("batch_size", own["batch_size"], 1)
        sums = dict(own["sums"])
    except (KeyError, TypeError, ValueError, PlanError) as error:
        raise StateError(f"A balanced state is damaged ({error}): {own!r:.200}.") from None
    if place != (epoch + 1, 0) or plan.reader(shard, size, epoch).filled_steps(epoch) > step:
        raise StateError(
            f"A balanced step is delivered by all ranks or by none; rank {shard} is before step {place[1]} of epoch "
            f"{place[0]}, another before step {step} of epoch {epoch}. Resume from states saved at the same step."
        )
    reader = plan.plan.reader(shard, size, epoch)
    if step >= reader.steps(epoch):
        return own  # its own shard was read to the end by then
    for batch in islice(reader.ahead(1), step):
        reader.deliver(batch)
    then = reader.state_dict()
    sums.pop(str(epoch), None)
    return {**own, **{name: then[name] for name in ("epoch", "step", "delivered")}, "sums": {**sums, **then["sums"]}}
