"""Training alone: what runs around the step of an optimizer with a plan in which weights meet, not gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from horovod.torch import ProcessSet
from torch import Tensor, nn
from torch.optim import Optimizer

from hvdscale.sync import LocalPlan, begin
from hvdscale.sync.engine import Engine
from hvdscale.sync.handle import LocalSync
from hvdscale.torch.broadcast import broadcast_parameters
from hvdscale.torch.channel import open_channel, open_post
from hvdscale.torch.reducer import Reducer
from hvdscale.torch.steps import StepsOnParameters
from hvdscale.torch.store import TorchStore, state_of_arrays, state_of_tensors

__all__ = ["LocalTraining"]


class _TorchSync(LocalSync[Tensor]):
    """Its state is of tensors and plain numbers: what ``torch.load`` reads without being told to trust the file."""

    def state_dict(self) -> dict[str, Any]:
        return state_of_tensors(super().state_dict())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state_of_arrays(state))


class LocalTraining(StepsOnParameters):
    """Each rank steps on its own gradients; weights meet.

    Args:
        plan: when and how.
        optimizer: whose step it is.
        model: for buffers and embeddings, if known.
        process_set: the ranks that meet.
        averager: makes what averages gradients during the warm-up; ``None`` without one.
    """

    def __init__(
        self,
        plan: LocalPlan,
        optimizer: Optimizer,
        model: nn.Module | None,
        process_set: ProcessSet,
        averager: Callable[[], Reducer] | None,
    ) -> None:
        self._plan = plan
        self._optimizer = optimizer
        self._model = model
        self._process_set = process_set
        self._averager = averager
        self._reducer = None if averager is None else averager()
        self._named: list[tuple[str, Tensor]] = []
        self.passes = 1 if self._reducer is None else self._reducer.passes
        self._store: TorchStore
        self._engine: Engine
        self._sync: LocalSync[Tensor] | None = None  # once there are rounds

    def open(self) -> None:
        """Begin the rounds. Collective: a copy, which one rank alone may make, does so when it is first used."""
        if self._sync is None:
            self._store = self._trainable()
            self._engine = begin(
                self._plan,
                self._store,
                lambda patient: open_channel(self._process_set, patient),
                lambda: open_post(self._process_set),
            )
            self._sync = _TorchSync(self._engine, self._store, torch.from_numpy, self._enter_phase)

    @property
    def sync(self) -> LocalSync[Tensor]:
        self.open()
        assert self._sync is not None
        return self._sync

    @property
    def watches_gradients(self) -> bool:
        return self._reducer is not None

    @property
    def busy(self) -> bool:
        return self._reducer is not None and self._reducer.busy

    def add(self, named: Sequence[tuple[str, Tensor]]) -> None:
        """Parameters of the optimizer, at first or later. Later ones become the first rank's, which is collective."""
        first = not self._named
        if not first:
            self.open()
        self._named += named
        if self._reducer is not None:
            self._reducer.add(named)
        if not first:
            root = (self._process_set.ranks or [0])[0]
            broadcast_parameters([p for _, p in named], root, self._process_set)
            self._renew()

    def set_passes(self, passes: int) -> None:
        self.passes = passes
        if self._reducer is not None:
            self._reducer.set_passes(passes)

    def synchronize(self) -> None:
        """In the warm-up: wait for the averaged gradients. After it gradients stay each rank's own."""
        if self._reducer is not None:
            self._reducer.synchronize()

    def before_scaler(self) -> None:
        self.synchronize()

    def new_round(self) -> None:
        if self._reducer is not None:
            self._reducer.new_round()

    def forget(self) -> None:
        if self._reducer is not None:
            self._reducer.forget()

    def before_step(self) -> None:
        self.synchronize()

    def take_over(self) -> None:
        """A step follows, whoever waited for gradients."""
        self.open()
        if self._trained != [p.requires_grad for _, p in self._named]:
            self._renew()  # frozen or unfrozen since
        self._engine.before_step()

    def after_step(self) -> None:
        if self._reducer is not None:
            self._reducer.after_step()
        self._engine.after_step()
        self._enter_phase()

    def _enter_phase(self) -> None:
        """Gradients are averaged in the warm-up alone. A step ends it, and a state may be of either side."""
        if self._reducer is not None and not self._engine.warming_up:
            self._reducer.stop()
            self._reducer = None
        elif self._reducer is None and self._averager is not None and self._engine.warming_up:
            self._reducer = self._averager()
            self._reducer.add(self._named)
            self._reducer.set_passes(self.passes)

    def step_skipped(self) -> None:
        """A gradient scaler left the step out: it counts all the same, so that ranks meet at the same round."""
        self.before_step()
        self.take_over()
        self.after_step()

    def _trainable(self) -> TorchStore:
        self._trained = [p.requires_grad for _, p in self._named]
        unique = {id(p): (name, p) for name, p in reversed(self._named) if p.requires_grad}
        return TorchStore(self._optimizer, list(reversed(unique.values())), self._model)

    def _renew(self) -> None:
        self._store = self._trainable()
        self._engine = self._engine.over(self._store)
        self.sync.resume(self._engine, self._store)
