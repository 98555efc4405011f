"""What earlier runs of a stream have read: a number for each of their shards.

Shard ``r`` of a run delivers its records by ascending position. So after ``reached[r]`` it has delivered exactly
its records at positions below. That holds whatever the other shards did, and says all that a restart must know.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdscale.data.checks import MOST_SHARDS, differ, states_of_all
from hvdscale.data.types import Int64s
from hvdscale.errors import StateError

__all__ = ["Run", "first_open", "known_marks", "merge_states", "read_state"]

_MOST = 2**62  # records


@dataclass(frozen=True)
class Run:
    """One run over some number of shards: records of shard ``r`` at positions below ``reached[r]`` are delivered.

    ``marks[r]`` is what the route of the run said of the record right before ``reached[r]``, where it did.
    """

    reached: tuple[int, ...]
    marks: tuple[str | None, ...] = ()

    def delivered(self, positions: Int64s, owners: Callable[[int], Int64s]) -> npt.NDArray[np.bool_]:
        """Whether this run delivered the records at ``positions``, or an earlier one had.

        ``owners(shards)`` are their shards among so many.
        """
        return positions < np.array(self.reached, np.int64)[owners(len(self.reached))]


def first_open(past: Sequence[Run]) -> int:
    """All records at positions below this one are delivered."""
    return min(past[-1].reached) if past else 0


def known_marks(past: Sequence[Run]) -> dict[int, str]:
    """The marks of the last run, by the numbers of their records."""
    pairs = zip(past[-1].reached, past[-1].marks, strict=False) if past else ()
    return {reached - 1: mark for reached, mark in pairs if mark is not None and reached}


def merge_states(states: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> tuple[int, tuple[Run, ...]]:
    """The epoch to go on in, and its past, of a stream named by ``facts``, from the states of all shards of a run.

    Raises:
        StateError: a state of another stream or run, or not one state of each shard.
    """
    states = states_of_all(states)
    for i, state in enumerate(states):
        _check_state(i, state, facts)
    latest = max(state["epoch"] for state in states)
    at = [_begun(state) if state["finished"] and state["epoch"] == latest - 1 else state for state in states]
    first = _run_of(at[0])
    for i, state in enumerate(at):
        if _run_of(state) != first:
            raise StateError(
                f"States are of one run and one pass, or of its end; state 0 is of {first}, state {i} of "
                f"{_run_of(state)}. Save states when no rank has begun the next pass before another ended this one."
            )
    shards = at[0]["shards"]
    got = sorted(state["shard"] for state in at)
    if len(got) != shards or got != list(range(shards)):
        raise StateError(f"Each of the {shards} shards of the run has one state; these are of shards {got!s:.80}.")
    if all(state["finished"] for state in at):
        return at[0]["epoch"] + 1, ()
    in_order = sorted(at, key=lambda state: int(state["shard"]))
    last = Run(tuple(state["reached"] for state in in_order), tuple(state.get("key") for state in in_order))
    # What an earlier run delivered beyond all that this one has: only that must still be known.
    earlier = [Run(tuple(run)) for run in at[0]["past"]]
    return at[0]["epoch"], (*(run for run in earlier if max(run.reached) > min(last.reached)), last)


def read_state(state: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[int, Run]:
    """Batches delivered, and the place reached by its shard alone, of a state named by ``facts``.

    Raises:
        StateError: it is a state of something else.
    """
    _check_state(0, state, facts)
    return state["batches"], Run((state["reached"],), (state.get("key"),))


def _check_state(i: int, state: object, facts: Mapping[str, Any]) -> None:
    if not isinstance(state, Mapping):
        raise StateError(f"A state is a dictionary from state_dict(); state {i} is {state!r}.")
    for name, value in facts.items():
        if differ(state.get(name), value):
            raise StateError(
                f"State {i} is of another stream: its {name} is {state.get(name)!r}, that of this stream {value!r}."
            )
    numbers = {name: state.get(name) for name in ("epoch", "shards", "shard", "batches", "reached")}
    past, finished, mark = state.get("past"), state.get("finished"), state.get("key")  # older states have no key
    whole = all(_natural(value) for value in numbers.values()) and isinstance(finished, bool)
    whole = whole and isinstance(mark, str | None) and state["reached"] <= _MOST
    if not whole or not (isinstance(past, list) and all(map(_is_run, past))):
        raise StateError(f"State {i} is damaged: {numbers}, finished {finished!r}, key {mark!r:.80}, past {past!r}.")


def _begun(state: Mapping[str, Any]) -> dict[str, Any]:
    """The end of a pass as the start of the next one."""
    start = {"finished": False, "past": [], "batches": 0, "reached": 0, "key": None}
    return {**state, "epoch": state["epoch"] + 1, **start}


def _run_of(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: state[name] for name in ("epoch", "shards", "past")}


def _is_run(saved: object) -> bool:
    numbers = saved if isinstance(saved, list) else []
    return 0 < len(numbers) <= MOST_SHARDS and all(_natural(number) and number <= _MOST for number in numbers)


def _natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
