"""Agreement at every step: Horovod's ring all-reduce of the gradients, or their mean in a narrow wire format.

Sergeev and Del Balso, "Horovod: fast and easy distributed deep learning in TensorFlow", arXiv 1802.05799.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from hvdscale.errors import PlanError
from hvdscale.sync.reduction import Reduction
from hvdscale.sync.wire import Codec, parse_wire

__all__ = ["EveryStep"]


@dataclass(frozen=True)
class EveryStep:
    """Agree on the gradients at every step.

    All three updates give the same weights. They differ in what a rank keeps and sends:

    - ``"local"``: gradients are all-reduced, and every worker applies the same update to its own copy.
    - ``"sharded"``: gradients are reduce-scattered, each rank updates 1/N of the parameters and keeps the optimizer's
      state for those alone, then weights are all-gathered (ZeRO, arXiv 1910.02054).
    - ``"central"``: gradients go to the first rank, which alone holds optimizer state, updates and broadcasts weights.

    Args:
        update: who applies the update.
        wire: what a gradient looks like on the way: ``"fp32"`` (Horovod's all-reduce, of any dtype), ``"fp16"``,
            ``"bf16"``, ``"int8"``, ``"int4"`` or ``"topk:f"``. What coding loses is sent with the next step's gradients
            (error feedback). Vectors (biases, norms) and embeddings, known from ``model=``, go as fp32 all the same.
            For slow links: int8 sends a quarter of the bytes, int4 an eighth, and both train nearly as fp32 does.

    Raises:
        PlanError: an argument is anything else, or both are given.
    """

    update: str = "local"
    wire: str = field(default="fp32", kw_only=True)

    def __post_init__(self) -> None:
        if self.update not in ("local", "central", "sharded"):
            raise PlanError(
                f'EveryStep(update=...) takes "local", "central" or "sharded", got {self.update!r}. '
                f"Leave it out: every worker then applies the averaged gradient itself.{_hint(self.update)}"
            )
        parse_wire(self.wire)
        if self.placed and self.coded:
            raise PlanError(
                f'wire="{self.wire}" makes one mean for every worker, and update="{self.update}" gives each rank the '
                'gradients of its own part. Use update="local", or leave wire out.'
            )

    @property
    def placed(self) -> bool:
        """Whether ranks update different elements."""
        return self.update != "local"

    @property
    def coded(self) -> bool:
        """Whether gradients travel in a format of their own, and not through Horovod's all-reduce."""
        return self.wire != "fp32"

    @property
    def codec(self) -> Codec:
        return parse_wire(self.wire)

    def check(self, reduction: Reduction) -> None:
        """Raise PlanError where gradients would be reduced in a way that the plan has no meaning for."""
        if self.coded and (reduction.op != "average" or reduction.predivide != 1.0 or reduction.groups is not None):
            given = (
                f"op={reduction.op}"
                if reduction.op != "average"
                else f"gradient_predivide_factor={reduction.predivide}"
                if reduction.predivide != 1.0
                else "groups=..."
            )
            raise PlanError(
                f'wire="{self.wire}" averages gradients in float32, in messages of its own; {given} is of Horovod\'s '
                "all-reduce. Leave one of the two out."
            )
        if self.placed and reduction.op == "adasum":
            raise PlanError(
                f'op=Adasum combines what every rank\'s own update did; with update="{self.update}" ranks make no such '
                'updates. Use op=Average, or update="local".'
            )
        if self.placed and reduction.groups is not None:
            raise PlanError(
                f'groups={reduction.groups} says which gradients travel together; with update="{self.update}" that '
                "follows from who updates them. Leave groups out."
            )

    def refuse_compression(self) -> NoReturn:
        """Raise PlanError: ``compression=`` is of Horovod's all-reduce."""
        raise PlanError(
            f'wire="{self.wire}" says what gradients look like on the way, and so does compression=... Leave one of '
            "the two out."
        )

    def refuse_elastic(self) -> NoReturn:
        """Raise PlanError: ranks come and go."""
        raise PlanError(
            f'wire="{self.wire}" keeps on every rank what coding lost, and in an elastic job ranks come and go. Leave '
            "wire out."
        )

    def facts(self) -> dict[str, object]:
        """What all ranks must agree on, by name."""
        return {"plan": self}


def _hint(update: object) -> str:
    """Where a wire format was given for an update: how to say it."""
    try:
        parse_wire(update)  # type: ignore[arg-type]
    except PlanError:
        return ""
    return f" A wire format is given by name: EveryStep(wire={update!r})."
