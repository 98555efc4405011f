"""Which fragments are due at a step: the same answer on every rank."""

from __future__ import annotations

from typing import Any

from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.schedule import Adaptive, period

__all__ = ["Calendar"]


class Calendar:
    """The next round of each of ``fragments`` fragments, which start evenly spread over the first period."""

    def __init__(self, plan: Relaxed, fragments: int) -> None:
        self._plan = plan
        self._due = [0] * fragments
        self._length = [0] * fragments
        self._met = [0] * fragments  # rounds inside nodes since the last of all ranks
        self.restart(plan.warmup)

    def restart(self, step: int) -> None:
        """Begin new periods after ``step`` steps, at which all ranks hold the same weights."""
        count = len(self._due)
        length = self._at_least(period(self._plan.every, step))
        self._met = [0] * count
        for fragment in range(count):
            known = self._length[fragment] if isinstance(self._plan.every, Adaptive) else 0
            self._length[fragment] = known or length
            self._due[fragment] = step + -(-self._length[fragment] * (fragment + 1) // count)

    def due(self, step: int) -> list[int]:
        """Fragments whose round is at ``step``."""
        return [fragment for fragment, due in enumerate(self._due) if due == step]

    def next(self) -> tuple[int, int]:
        """``(step, fragment)`` of the round that comes first."""
        return min((due, fragment) for fragment, due in enumerate(self._due))

    def crosses(self, fragment: int) -> bool:
        """Whether the next round of ``fragment`` is one of all ranks, not of each node alone."""
        return self._met[fragment] + 1 >= self._plan.rounds_a_crossing

    def met_inside(self, fragment: int) -> None:
        """The round, of each node alone, is over."""
        self._met[fragment] += 1
        self._due[fragment] += self._length[fragment]

    def met_everyone(self, fragment: int) -> None:
        """The round of all ranks begins."""
        self._met[fragment] = 0
        if not isinstance(self._plan.every, Adaptive):
            self._length[fragment] = self._at_least(period(self._plan.every, self._due[fragment]))
        self._due[fragment] += self._length[fragment]

    def settle(self, fragment: int, drift: float) -> None:
        """It is over: ranks had been ``drift`` apart."""
        if isinstance(self._plan.every, Adaptive):
            before = self._length[fragment]
            self._length[fragment] = self._at_least(self._plan.every.following(before, drift))
            self._due[fragment] += self._length[fragment] - before

    def _at_least(self, length: int) -> int:
        """What has left arrives before it leaves again, and before the length of a period depends on it."""
        rounds = 1 if isinstance(self._plan.every, Adaptive) else self._plan.rounds_a_crossing
        return max(length, -(-(self._plan.overlap + 1) // rounds))

    def state(self) -> dict[str, Any]:
        return {"due": list(self._due), "length": list(self._length), "met": list(self._met)}

    def load(self, state: dict[str, Any]) -> None:
        self._due, self._length, self._met = (list(state[name]) for name in ("due", "length", "met"))
