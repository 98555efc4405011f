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
        self.restart(plan.warmup)

    def restart(self, step: int) -> None:
        """Begin new periods after ``step`` steps, at which all ranks hold the same weights."""
        count = len(self._due)
        length = self._at_least(period(self._plan.every, step))
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

    def settle(self, fragment: int, drift: float) -> None:
        """The round is over: ranks had been ``drift`` apart."""
        met = self._due[fragment]
        every = self._plan.every
        before = self._length[fragment]
        length = every.following(before, drift) if isinstance(every, Adaptive) else period(every, met)
        self._length[fragment] = self._at_least(length)
        self._due[fragment] = met + self._length[fragment]

    def _at_least(self, length: int) -> int:
        return max(length, self._plan.overlap + 1)  # a fragment arrives before it leaves again

    def state(self) -> dict[str, Any]:
        return {"due": list(self._due), "length": list(self._length)}

    def load(self, state: dict[str, Any]) -> None:
        self._due, self._length = list(state["due"]), list(state["length"])
