"""What all plans of the relaxed family share: train alone for a while, then agree in a round."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel
from hvdscale.sync.anchored import Anchored
from hvdscale.sync.exchange import Exchange, Mean
from hvdscale.sync.fragments import Fragment
from hvdscale.sync.hierarchical import Hierarchical, Roads
from hvdscale.sync.local_plan import LocalPlan, State, check_whole
from hvdscale.sync.nodes import Groups, check_groups
from hvdscale.sync.part import Part
from hvdscale.sync.schedule import Adaptive, Schedule, period
from hvdscale.sync.tensors import Tensors
from hvdscale.sync.touched import Touched
from hvdscale.sync.wire import Codec, parse_wire
from hvdscale.update import Outer

__all__ = ["Relaxed", "Rows", "State"]

Rows = Literal["all", "touched"]

_ACROSS = 8  # rounds of a node to one of all nodes, when nobody says
_PROBES = (0, 1, 10, 100, 1000, 10000, 100000)  # steps at which ranks compare a schedule they cannot compare by value


@dataclass(frozen=True)
class Relaxed(LocalPlan):
    """Ranks train alone for ``every`` steps, then meet in a round.

    Args:
        every: steps between rounds: an int, or a schedule ``step -> int`` that says the same on every rank.
        warmup: steps at the start in which gradients are averaged at every step.
        wire: what a pseudo-gradient looks like on the way: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int4"``
            or ``"topk:f"``. What is lost is sent the next time (error feedback). Vectors (biases, norms) and
            embeddings go as fp32 all the same.
        fragments: parts of the model that take turns, each every ``every`` steps.
        overlap: steps a fragment may travel while training goes on; 0: training waits.
        merge: what a rank does with the new anchor: ``"adopt"`` takes it, with what was learnt while it
            travelled on top; ``"mix"`` or ``"mix:a"`` goes the fraction ``a`` (0.5) of the way to it.
        groups: who meets in a round: ``"world"``, all ranks; ``"node"``, the ranks of each host, and only every
            ``across``-th time all hosts; or those groups as tuples of ranks, such as ``((0, 1), (2, 3))``. A round of
            a node is a plain mean in fp32; ``wire``, ``overlap``, ``merge`` and the outer optimizer are for the
            rounds of all, in which the first rank of each node speaks for it.
        across: how many rounds of a node make one of all nodes; 8 when left out. Only with such groups.
        state: the inner optimizer's moments after a round: ``"keep"`` each rank's own, ``"average"`` them,
            or ``"reset"`` them to zero.
        rows: an embedding's rows become the mean over ``"all"`` ranks, as everything does, or over those that
            ``"touched"`` them since the last round: a word that one rank of 8 has met moves 8 times as far. For inner
            optimizers that leave other rows alone, such as plain SGD and sparse ones.

    Raises:
        PlanError: a value that cannot be, or two that do not go together.
    """

    every: int | Schedule
    wire: str = field(default="fp32", kw_only=True)
    fragments: int = field(default=1, kw_only=True)
    overlap: int = field(default=0, kw_only=True)
    merge: str = field(default="adopt", kw_only=True)
    groups: Groups = field(default="world", kw_only=True)
    across: int | None = field(default=None, kw_only=True)
    state: State = field(default="keep", kw_only=True)
    rows: Rows = field(default="all", kw_only=True)

    def __post_init__(self) -> None:
        for name, low in (("warmup", 0), ("fragments", 1), ("overlap", 0)):
            check_whole(name, getattr(self, name), low)
        check_groups(self.groups)
        if self.across is not None:
            check_whole("across", self.across, 1)
            if self.groups == "world":
                raise PlanError(
                    f'across={self.across} counts rounds inside nodes, and groups="world" has none. Say groups="node", '
                    "or make every longer."
                )
        shortest = period(self.every, self.warmup) * (1 if isinstance(self.every, Adaptive) else self.rounds_a_crossing)
        if self.overlap >= shortest:
            raise PlanError(
                f"A fragment must arrive before it leaves again: overlap < every, but overlap is {self.overlap} and "
                f"every is {shortest}. Use a smaller overlap or a longer period."
            )
        for name, kind in (("state", State), ("rows", Rows)):
            if getattr(self, name) not in get_args(kind):
                names = ", ".join(map(repr, get_args(kind)))
                raise PlanError(f"{name} is one of {names}; it is {getattr(self, name)!r}.")
        if self.state != "keep" and self.overlap:
            raise PlanError(
                f'state="{self.state}" changes moments the moment ranks meet; with overlap={self.overlap} they meet '
                'while training goes on. Use state="keep", or overlap=0.'
            )
        parse_wire(self.wire)
        if self.rows == "touched" and (self.overlap or self.mixing < 1):
            raise PlanError(
                'rows="touched" knows a row that nobody moved by its lying on the anchor, where '
                f'overlap={self.overlap} and merge="{self.merge}" do not leave it. Use overlap=0 and merge="adopt".'
            )
        self.mixing  # noqa: B018 - checked where the plan is made

    def outer_optimizer(self) -> Outer:
        """How the anchor moves; each plan says."""
        raise PlanError(f"{type(self).__name__} does not say how its anchor moves. Use LocalSGD, DiLoCo or SlowMo.")

    @property
    def rounds_a_crossing(self) -> int:
        """How many rounds of a node make one of all ranks; 1 where all ranks meet every time."""
        return 1 if self.groups == "world" else self.across or _ACROSS

    def part(self, fragment: Fragment, weights: Tensors, channel: Channel, roads: Roads | None) -> Part:
        """What a rank keeps of a fragment. ``roads``: where ranks meet in nodes."""
        codec = self.codec
        exchange: Exchange = Mean(fragment, codec, channel) if roads is None else Hierarchical(fragment, codec, roads)
        return Anchored(fragment, weights, self.by_row(fragment, exchange), self.outer_optimizer(), self.mixing)

    def by_row(self, fragment: Fragment, exchange: Exchange) -> Exchange:
        """``exchange``, in which an embedding's rows count as ``rows`` says."""
        return Touched(fragment, exchange) if self.rows == "touched" and fragment.tables else exchange

    @property
    def codec(self) -> Codec:
        return parse_wire(self.wire)

    @property
    def mixing(self) -> float:
        """How much of the way to the anchor a rank goes: 1 adopts it."""
        name, colon, rest = self.merge.partition(":") if isinstance(self.merge, str) else ("", "", "")
        if name == "adopt" and not colon:
            return 1.0
        try:
            fraction = float(rest) if colon else 0.5
        except ValueError:
            fraction = -1.0
        if name != "mix" or not 0 < fraction <= 1:
            raise PlanError(f'merge is "adopt", "mix" or "mix:a" with 0 < a <= 1; it is {self.merge!r}.')
        return fraction

    def facts(self) -> dict[str, object]:
        """What all ranks must agree on, by name."""
        every: object = self.every
        if callable(self.every):
            every = {step: self._probe(step) for step in _PROBES}
            if isinstance(self.every, Adaptive):
                every = (self.every, every)
        names = ("warmup", "wire", "fragments", "overlap", "merge", "groups", "across", "state", "rows")
        said = {name: getattr(self, name) for name in names}
        return {"plan": type(self).__name__, "every": every, **said, "outer": self.outer_optimizer()}

    def _probe(self, step: int) -> int | str:
        """The schedule's answer for a step; training may never come to one that it has no answer for."""
        try:
            return period(self.every, step)
        except PlanError:
            raise
        except Exception as error:
            return f"no answer ({type(error).__name__})"
