"""What a rank does in one training step, as data: a list of actions for each rank, readable as text.

| text | meaning |
| --- | --- |
| ``F2`` | forward pass of micro-batch 2 |
| ``B2`` | its backward pass |
| ``I2`` ``W2`` | the backward pass in two: gradients of the inputs, then those of the weights |
| ``C2`` | the forward pass again, for what was not kept (recomputation) |
| ``SF2>1`` ``RF2<0`` | send its output to stage 1, receive its input from stage 0 |
| ``SB2>0`` ``RB2<1`` | the same for gradients |
| ``T0`` | add up the gradients of shared parameter 0 over the ranks that hold it |
| ``D`` | the gradients of the stage are complete: the data-parallel reduction may start |

Where a rank holds more than one stage, ``@3`` at the end says which.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from hvdscale.errors import PlanError

__all__ = ["Action", "Kind", "Schedule"]

Kind = Literal["F", "B", "I", "W", "C", "SF", "RF", "SB", "RB", "T", "D"]

_TEXT = re.compile(r"(SF|RF|SB|RB|F|B|I|W|C|T|D)(\d*)(?:[<>](\d+))?(?:@(\d+))?")


@dataclass(frozen=True)
class Action:
    """One thing to do. ``microbatch`` is the number of the shared parameter in ``T``; ``peer`` the other stage."""

    kind: Kind
    stage: int
    microbatch: int = 0
    peer: int | None = None

    def text(self, with_stage: bool = True) -> str:
        number = "" if self.kind == "D" else str(self.microbatch)
        peer = "" if self.peer is None else f"{'>' if self.kind.startswith('S') else '<'}{self.peer}"
        return f"{self.kind}{number}{peer}" + (f"@{self.stage}" if with_stage else "")

    @classmethod
    def parse(cls, text: str, stage: int = 0) -> Action:
        """The action that ``text`` names; ``stage`` where it names none.

        Raises:
            PlanError: a text that names no action.
        """
        match = _TEXT.fullmatch(text)
        if match is None or (match[1] != "D" and not match[2]) or (len(match[1]) == 2) != (match[3] is not None):
            raise PlanError(f"An action is such as F0, B0, SF0>1 or F0@2; {text!r} is none.")
        kind, number, peer, named = match.groups()
        return cls(
            cast(Kind, kind),
            stage if named is None else int(named),
            int(number or 0),
            None if peer is None else int(peer),
        )

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Schedule:
    """For each rank of a pipeline its actions in order. Stage ``s`` is on rank ``s % ranks``.

    Args:
        name: of the method that made it.
        ranks: of the pipeline.
        stages: a multiple of ``ranks``.
        microbatches: into how many pieces a batch is divided.
        actions: by rank.
    """

    name: str
    ranks: int
    stages: int
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.stages % self.ranks or self.stages < 1 or len(self.actions) != self.ranks:
            raise PlanError(
                f"Each rank has as many stages and one list of actions; there are {self.ranks} ranks, {self.stages} "
                f"stages and {len(self.actions)} lists."
            )
        if self.microbatches < 1:
            raise PlanError(f"A batch is divided into at least one micro-batch; {self.microbatches} were asked for.")

    def rank_of(self, stage: int) -> int:
        return stage % self.ranks

    def stages_of(self, rank: int) -> tuple[int, ...]:
        return tuple(range(rank, self.stages, self.ranks))

    @cached_property
    def splits_backward(self) -> bool:
        """Whether gradients of inputs and of weights are computed apart."""
        return any(action.kind == "I" for row in self.actions for action in row)

    def edited(self, edit: Callable[[int, Action], Sequence[Action]], name: str | None = None) -> Schedule:
        """Each action replaced by what ``edit(rank, action)`` gives."""
        rows = tuple(tuple(new for a in row for new in edit(rank, a)) for rank, row in enumerate(self.actions))
        return replace(self, name=name or self.name, actions=rows)

    def text(self) -> str:
        """One line a rank, as ``parse`` reads it."""
        with_stage = self.stages > self.ranks
        return "\n".join(" ".join(action.text(with_stage) for action in row) for row in self.actions)

    @classmethod
    def parse(cls, text: str, microbatches: int | None = None, stages: int | None = None) -> Schedule:
        """A schedule written as ``text``: one line a rank.

        Raises:
            PlanError: a word that is no action.
        """
        lines = [line.split() for line in text.strip().splitlines()]
        rows = tuple(tuple(Action.parse(word, rank) for word in line) for rank, line in enumerate(lines))
        found = max((a.microbatch + 1 for row in rows for a in row if a.kind in ("F", "B", "I", "W")), default=0)
        count = stages or max((a.stage + 1 for row in rows for a in row), default=0)
        return cls("given", len(rows), count, microbatches or found, rows)

    def __iter__(self) -> Iterator[tuple[Action, ...]]:
        return iter(self.actions)
