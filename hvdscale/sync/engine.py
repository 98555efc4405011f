"""What carries a local plan out on one rank: ``Rounds``, or ``Asynchronous``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from hvdscale.errors import PlanError
from hvdscale.runtime.channel import Channel
from hvdscale.runtime.post import Post
from hvdscale.sync.asynchronous import Asynchronous
from hvdscale.sync.local_plan import LocalPlan
from hvdscale.sync.parameter_server import ParameterServer
from hvdscale.sync.relaxed import Relaxed
from hvdscale.sync.rounds import Rounds
from hvdscale.sync.tensors import Store
from hvdscale.update.outer import Float32s

__all__ = ["Engine", "begin", "first_figures"]


class Engine(Protocol):
    """What adapters ask of it; see ``Rounds``."""

    step: int

    @property
    def trains(self) -> bool:
        """Whether this rank makes steps; one set aside serves in ``flush()``."""
        ...

    @property
    def warming_up(self) -> bool: ...

    @property
    def meets_next(self) -> bool: ...

    def tell(self, loss: float, samples: float = 1.0) -> None: ...

    def before_step(self) -> None: ...

    def after_step(self) -> bool: ...

    def flush(self) -> bool: ...

    def outer_weights(self) -> list[Float32s]: ...

    def figures(self) -> dict[str, float]: ...

    def over(self, store: Store) -> Engine: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    @property
    def anew(self) -> int:
        """The step after which this rank's inner optimizer last began anew; 0 if it never did."""
        ...


def begin(
    plan: LocalPlan, store: Store, open_channel: Callable[[bool], Channel], open_post: Callable[[], Post]
) -> Engine:
    """Carry ``plan`` out on ``store``. Collective.

    Args:
        open_channel: ``open_channel(patient)``, where ranks meet in collectives.
        open_post: where ranks write to each other.

    Raises:
        PlanError: the plan does not fit the model or the number of ranks.
    """
    if isinstance(plan, ParameterServer):
        return Asynchronous(plan, store, open_post)
    if isinstance(plan, Relaxed):
        return Rounds(plan, store, open_channel(plan.overlap > 0))
    raise PlanError(f"{type(plan).__name__} does not say how weights meet. Use LocalSGD, DiLoCo or ParameterServer.")


def first_figures(plan: LocalPlan) -> dict[str, float]:
    """``figures()`` of what carries ``plan`` out, before it has begun."""
    return (Asynchronous if isinstance(plan, ParameterServer) else Rounds).first_figures()
