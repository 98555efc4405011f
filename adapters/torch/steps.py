"""What runs around an optimizer's step: its gradients, or its closure's, are reduced first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import horovod.torch as _horovod
import torch
from horovod.torch import ProcessSet
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdscale._version import __version__
from hvdscale.runtime import timeline
from hvdscale.sync import EveryStep, LocalPlan, Reduction
from hvdscale.torch.reductions import allreduce

__all__ = ["Attachment", "Exchange", "StepsOnParameters", "Terms", "after_step", "before_step"]


@dataclass(frozen=True)
class Terms:
    """How one optimizer's gradients are reduced: what all ranks must agree on."""

    reduction: Reduction
    plan: EveryStep | LocalPlan
    compression: Any
    process_set: ProcessSet

    def __deepcopy__(self, memo: dict[int, Any]) -> Terms:
        return self

    def facts(self, kind: type[Optimizer], number: str) -> dict[str, object]:
        """The facts to compare, for an optimizer of this type and number."""
        return {
            "hvdscale": __version__,
            "torch": torch.__version__,
            "optimizer": f"{kind.__module__}.{kind.__qualname__}",
            "optimizers wrapped before": number,
            **self.plan.facts(),
            "reduction": self.reduction,
            "compression": getattr(self.compression, "__name__", type(self.compression).__name__),
        }


class Exchange(Protocol):
    """What runs around a step; ``Reducer``, ``DeltaReducer``, ``LocalTraining`` and ``PlacedUpdate``."""

    passes: int

    @property
    def watches_gradients(self) -> bool: ...

    @property
    def busy(self) -> bool: ...

    def add(self, named: Sequence[tuple[str, Tensor]]) -> None: ...

    def set_passes(self, passes: int) -> None: ...

    def synchronize(self) -> None: ...

    def new_round(self) -> None: ...

    def forget(self) -> None: ...

    def before_scaler(self) -> None: ...

    def step_skipped(self) -> None: ...

    def before_step(self) -> None: ...

    def after_step(self) -> None: ...

    def take_over(self) -> None:
        """Gradients are ready: the optimizer gets the tensors it updates on this rank."""
        ...

    def hand_back(self) -> None:
        """The optimizer gets the model's parameters back."""
        ...


class StepsOnParameters:
    """An exchange whose optimizer updates the model's own parameters."""

    def take_over(self) -> None:
        """It has them already."""

    def hand_back(self) -> None:
        """It has them still."""


@dataclass
class Attachment:
    """What hvdscale keeps on an optimizer. ``exchange`` is ``None`` where this rank steps alone."""

    terms: Terms
    names: dict[int, str] | None  # by id, as far as the user gave them
    named: list[tuple[str, Tensor]]
    number: str  # how many this process wrapped before, or which copy of which
    exchange: Exchange | None
    sparse: frozenset[int] = frozenset()  # by id, parameters known to have sparse gradients
    asks: bool = False  # ranks ask each other which gradients are sparse, because the user gave no model
    skip: bool = False
    model: nn.Module | None = None  # as the user gave it
    steps: int = 0  # of the optimizer, since it was wrapped
    sharded: Any = None  # the ShardedModel whose parts are trained


def before_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    held: Attachment = optimizer._hvdscale
    exchange = held.exchange
    if exchange is None:
        return None
    if held.skip:
        exchange.take_over()
        return None
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None or not exchange.watches_gradients:
        exchange.before_step()
        exchange.take_over()
        return None
    evaluate = _on_all_ranks(closure, held, exchange)
    if len(args) > 1:
        return (args[0], evaluate, *args[2:]), kwargs
    return args, {**kwargs, "closure": evaluate}


def after_step(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    held: Attachment = optimizer._hvdscale
    held.steps += 1
    if isinstance(held.terms.plan, EveryStep):  # rounds count their steps themselves
        timeline.step()
    if held.exchange is not None:
        held.exchange.after_step()


def _on_all_ranks(closure: Callable[[], Any], held: Attachment, exchange: Exchange) -> Callable[[], Any]:
    """The closure with its gradients and its loss reduced, so that line searches decide alike everywhere."""

    def evaluate() -> Any:
        exchange.hand_back()
        loss = closure()
        exchange.synchronize()
        exchange.take_over()
        if not isinstance(loss, (float, Tensor)):
            return loss
        value = loss.detach() if isinstance(loss, Tensor) else torch.tensor(loss, dtype=torch.float64)
        op = _horovod.Sum if held.terms.reduction.op == "sum" else _horovod.Average
        total = allreduce(
            value.double(), op=op, name=f"hvdscale.{held.number}.loss", process_set=held.terms.process_set
        )
        return total.to(value.dtype) if isinstance(loss, Tensor) else float(total)

    return evaluate
