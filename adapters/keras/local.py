"""Training alone: what runs around the step of a Keras optimizer with a plan in which weights meet, not gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdscale.keras.backend import verbs
from hvdscale.keras.store import KerasStore, check_reset
from hvdscale.sync import LocalPlan, begin
from hvdscale.sync.engine import Engine
from hvdscale.sync.handle import LocalSync

__all__ = ["LocalTraining"]


class _KerasSync(LocalSync[Any]):
    """Its state counts passes, too: Keras may accumulate the gradients of several for a step."""

    def __init__(self, training: LocalTraining, engine: Engine, store: KerasStore) -> None:
        super().__init__(engine, store, verbs.tensor)
        self._training = training

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "passes": self._training.calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._training.resume(state.get("passes", 0))


class LocalTraining:
    """Each rank steps on its own gradients; weights meet. Made by all ranks of ``process_set`` alike.

    Args:
        plan: when and how.
        optimizer: built.
        variables: those it trains, equal on every rank.
        model: for running statistics and embeddings, if known.
        process_set: the ranks that meet.

    Raises:
        PlanError: more fragments than variables, or moments that cannot be reset.
    """

    def __init__(self, plan: LocalPlan, optimizer: Any, variables: Sequence[Any], model: Any, process_set: Any) -> None:
        if plan.state == "reset":
            check_reset(optimizer)
        self._store = KerasStore(optimizer, variables, model, with_moments=plan.state != "keep")
        self._plan = plan
        self._engine = begin(
            plan,
            self._store,
            lambda patient: verbs.open_channel(process_set, patient),
            lambda: verbs.open_post(process_set),
        )
        self._optimizer = optimizer
        self.calls = 0
        self.first_state = self._store.first_state
        self.sync: LocalSync[Any] = _KerasSync(self, self._engine, self._store)

    def resume(self, calls: int) -> None:
        """A state was taken up; ``calls``: passes so far, of which ``gradient_accumulation_steps`` make a step."""
        self.calls = calls
        self.first_state.resume(self._engine.anew)

    @property
    def has_warmup(self) -> bool:
        return self._plan.warmup > 0

    @property
    def variables(self) -> list[Any]:
        """Everything a round may touch."""
        return self._store.variables

    @property
    def learning_rate(self) -> Any:
        """The inner learning rate, as the backend holds it."""
        return self._optimizer.learning_rate

    def begin(self) -> None:
        """Before the first step, eagerly: the weights are the anchor."""
        self._engine.before_step()

    def warming_up(self) -> bool:
        """Whether gradients are averaged in the step to come."""
        return self._engine.warming_up

    def after_step(self) -> None:
        """Count this step, and hold the rounds that are due; in a graph, when it runs."""
        verbs.run_between_steps(self)

    def count(self) -> bool:
        """Count a step that reads and writes nothing; if it would, do nothing and say so."""
        self.calls += 1
        if self.calls % (self._optimizer.gradient_accumulation_steps or 1):
            return False  # no update yet
        if self._engine.meets_next:
            return True
        self._engine.after_step()
        return False

    def meet(self) -> None:
        """Count a step and hold its rounds, on the variables themselves."""
        self._engine.after_step()

    def spoilt(self) -> bool:
        """After ``meet_on``: whether the optimizer must begin anew, from ``first_state``."""
        return self._store.spoilt()

    def meet_on(self, lr: np.ndarray, *values: np.ndarray) -> list[np.ndarray]:
        """Count a step and hold its rounds, on the values of ``variables``; the values afterwards."""
        self._store.stage(float(lr), values)
        try:
            self._engine.after_step()
        finally:
            results = self._store.unstage()
        return [np.ascontiguousarray(result) for result in results]
