"""``EveryStep(update="central" | "sharded")``: what runs around the step of an optimizer that updates slices.

Between steps the optimizer's groups hold the model's parameters, as ever. For the step itself they hold this rank's
slices, with their share of the reduced gradients, so that state is kept for those alone; then all ranks' updated
weights are written into the parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from horovod.torch import ProcessSet
from torch import Tensor
from torch.optim import Optimizer

from hvdscale.errors import StateError
from hvdscale.runtime.patience import patience
from hvdscale.sync import EveryStep, Reduction
from hvdscale.torch.carriers import carrier_of
from hvdscale.torch.host import travels_by_host
from hvdscale.torch.placed_reducer import PlacedReducer
from hvdscale.torch.placed_state import State, cut_state, gather_state, state_bytes
from hvdscale.torch.runtime import world
from hvdscale.torch.slices import Slices
from hvdscale.update import Placement, Update, place

__all__ = ["PlacedUpdate"]

_BUCKET_BYTES = 32 << 20  # one host: a message costs more than what overlaps saves
_BUCKET_BYTES_OF_LINKS = 4 << 20


class PlacedUpdate:
    """Each parameter's elements are updated by the rank that the placement names.

    Args:
        plan: ``EveryStep("central")`` or ``EveryStep("sharded")``.
        optimizer: whose step it is.
        reduction, compression: how gradients are added up.
        process_set: the ranks that take part; the first of them is the centre.
        prefix: before message names.
    """

    watches_gradients = True

    def __init__(
        self,
        plan: EveryStep,
        optimizer: Optimizer,
        reduction: Reduction,
        *,
        compression: Any,
        process_set: ProcessSet,
        prefix: str,
    ) -> None:
        self.update: Update = plan.update  # type: ignore[assignment]
        self._optimizer = optimizer
        self._process_set = process_set
        self._prefix = prefix
        self._carrier = carrier_of(plan.update, reduction, compression, process_set)
        self._reducer = PlacedReducer(
            self._place,
            self._carrier,
            reduction=reduction,
            compression=compression,
            process_set=process_set,
            prefix=prefix,
        )
        self.passes = reduction.passes
        self._parameters: list[Tensor] = []
        self._slices: Slices | None = None
        self._groups: list[list[Tensor]] | None = None  # of parameters, while the optimizer holds slices
        self._kept: State | None = None  # the whole state, between a flush and the next step, on the first rank
        self._flushed = False

    # As any exchange ---------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self._reducer.busy

    def add(self, named: Sequence[tuple[str, Tensor]]) -> None:
        self._parameters += [p for _, p in named]
        self._reducer.add(named)

    def set_passes(self, passes: int) -> None:
        self.passes = passes
        self._reducer.set_passes(passes)

    def synchronize(self) -> None:
        self._reducer.synchronize()

    def new_round(self) -> None:
        self.hand_back()
        self._reducer.new_round()

    def forget(self) -> None:
        self.hand_back()
        self._kept, self._flushed = None, False
        self._reducer.forget()

    def before_scaler(self) -> None:
        self.synchronize()

    def step_skipped(self) -> None:
        """On every rank: the scaler's check is one over all of them."""

    def before_step(self) -> None:
        self.hand_back()
        self.synchronize()

    def take_over(self) -> None:
        if self._slices is None or self._groups is not None:
            return
        self._kept, self._flushed = None, False
        cut_state(self._optimizer, self._slices, self._parameters)
        self._slices.load()
        held = self._slices.by_parameter
        self._groups = [group["params"] for group in self._optimizer.param_groups]
        for group in self._optimizer.param_groups:
            group["params"] = [held[id(p)].tensor for p in group["params"] if id(p) in held]

    def hand_back(self) -> None:
        if self._groups is None or self._slices is None:
            return
        for group, parameters in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = parameters
        self._groups = None
        self._slices.unload()

    def after_step(self) -> None:
        self.hand_back()
        slices = self._slices
        if slices is not None:
            spread = self._carrier.spread
            flights = [
                (bucket, spread(slices.share(bucket), bucket, f"{self._prefix}weights.{i}"))
                for i, bucket in enumerate(slices.placement.buckets)
            ]
            for bucket, arrive in flights:
                slices.adopt(bucket, arrive())
        self._reducer.after_step()

    # Placement ---------------------------------------------------------------------------------------

    def _place(self, positions: list[int]) -> Placement:
        """Other parameters than before are trainable: the state goes where they are updated now. Collective."""
        if self._slices is not None:
            self._optimizer.state = self._gather()  # type: ignore[assignment]
        parameters = [self._parameters[position] for position in positions]
        fast = all(p.device.type == "cpu" or travels_by_host(p) for p in parameters)
        slow = world().launch.spans_hosts or not fast
        placement = place(
            self.update,
            positions,
            [p.numel() for p in parameters],
            [(p.dtype, p.device) for p in parameters],
            self._process_set.size(),
            (_BUCKET_BYTES_OF_LINKS if slow else _BUCKET_BYTES) // 4,
        )
        self._slices = Slices(placement, self._process_set.rank(), self._parameters)
        return placement

    # State -------------------------------------------------------------------------------------------

    def _gather(self) -> State:
        assert self._slices is not None
        with patience("state_dict() of an optimizer with update=" + repr(self.update)):
            return gather_state(self._optimizer, self._slices, self._parameters, self._process_set)

    @property
    def is_cut(self) -> bool:
        """Whether this rank's state is that of its slices: no whole one was loaded since the last step."""
        return self._slices is not None and not any(p in self._optimizer.state for p in self._slices.parameters)

    @contextmanager
    def whole_state(self) -> Iterator[None]:
        """Inside, ``optimizer.state`` is the whole one, keyed by parameters. Collective, except after a flush.

        Raises:
            StateError: after a flush, on ranks that do not hold it.
        """
        self.hand_back()
        if self._flushed and self._kept is None:
            raise StateError(
                "After optimizer.sync.flush() the first rank holds the whole optimizer state, and this is another "
                "one. Call state_dict() there, or, without flush(), on every rank."
            )
        if self._slices is None:
            yield
            return
        cut = self._optimizer.state
        whole = self._kept if self._kept is not None else self._gather()
        self._optimizer.state = whole  # type: ignore[assignment]
        try:
            yield
        finally:
            self._optimizer.state = cut

    def flush(self) -> None:
        """Bring the whole state to the first rank, which can then save without the others. Collective."""
        if self._slices is not None:
            whole = self._gather()
            self._kept = whole if self._process_set.rank() == 0 else None
            self._flushed = True

    def metrics(self) -> dict[str, float]:
        """``state_bytes`` of this rank's optimizer state, ``bytes_sent`` by it."""
        return {
            "state_bytes": float(state_bytes(self._optimizer, self._slices)),
            "bytes_sent": float(self._carrier.sent_bytes),
        }
