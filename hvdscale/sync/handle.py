"""What a script can ask of an optimizer's agreement: ``optimizer.sync``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from hvdscale.errors import StateError
from hvdscale.sync.engine import Engine
from hvdscale.sync.tensors import Store
from hvdscale.update.outer import Float32s

__all__ = ["LocalSync", "SteadySync", "Sync"]

T = TypeVar("T")


class Sync(Protocol[T]):
    """``optimizer.sync``, whatever the plan."""

    @property
    def trains(self) -> bool:
        """Whether this rank makes steps: one set aside as a server does not, and serves in ``flush()``."""
        ...

    def flush(self) -> None:
        """Finish a partial period, as a round of its own; on a boundary nothing is left to do. Collective.

        Ranks that have run out of data early wait in here and take part in the others' rounds with weight zero.
        Every rank holds the same weights afterwards.
        """
        ...

    def tell(self, loss: float, samples: float = 1.0) -> None:
        """Before a step: its mean loss, and how many samples (or tokens) it is made of. Neither is needed.

        Ranks count by their samples when weights are averaged, by their steps when nobody tells.
        """
        ...

    def outer_weights(self) -> dict[str, T]:
        """The weights all ranks share, by parameter name: those to evaluate and to save."""
        ...

    def evaluating(self) -> AbstractContextManager[None]:
        """Inside ``with``, the model holds the outer weights; afterwards this rank's own again."""
        ...

    def metrics(self) -> dict[str, float]:
        """Running figures: ``rounds``, ``bytes_sent``, ``drift``, ``seconds`` in communication and others."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What this rank needs to go on bit-equal, beside model, optimizer and data."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the state that this rank saved."""
        ...


class LocalSync(Generic[T]):
    """The agreement of a plan in which ranks train alone.

    ``convert`` makes a framework tensor of float32 weights; ``loaded`` is called when a state was taken up, which may
    be one of another phase.
    """

    def __init__(
        self,
        engine: Engine,
        store: Store,
        convert: Callable[[Float32s], T],
        loaded: Callable[[], None] = lambda: None,
    ) -> None:
        self._convert = convert
        self._loaded = loaded
        self.resume(engine, store)

    def resume(self, engine: Engine, store: Store) -> None:
        """Go on with another engine, over more tensors."""
        self._engine = engine
        self._store = store

    @property
    def trains(self) -> bool:
        return self._engine.trains

    def flush(self) -> None:
        self._engine.flush()

    def tell(self, loss: float, samples: float = 1.0) -> None:
        self._engine.tell(loss, samples)

    def outer_weights(self) -> dict[str, T]:
        specs = self._store.weights.specs
        return {
            spec.name: self._convert(weights) for spec, weights in zip(specs, self._engine.outer_weights(), strict=True)
        }

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        weights = self._store.weights
        put_back = weights.keep()
        outer = self._engine.outer_weights()
        weights.write(range(len(weights.specs)), np.concatenate([w.ravel() for w in outer]))
        try:
            yield
        finally:
            put_back()

    def metrics(self) -> dict[str, float]:
        return self._engine.figures()

    def state_dict(self) -> dict[str, Any]:
        return self._engine.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._engine.load_state_dict(state)
        self._loaded()


class Kept(Protocol):
    """What a rank keeps between steps."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class SteadySync(Generic[T]):
    """The agreement at every step: ranks hold the same weights always.

    Args:
        read: gives the weights by name.
        flush: where ranks hold parts of the optimizer's state: brings the whole to the first rank. Collective.
        metrics: running figures, where there are any.
        kept: what this rank keeps between steps, where it keeps anything.
    """

    def __init__(
        self,
        read: Callable[[], dict[str, T]],
        flush: Callable[[], None] = lambda: None,
        metrics: Callable[[], dict[str, float]] = dict,
        kept: Kept | None = None,
    ) -> None:
        self._read = read
        self._flush = flush
        self._metrics = metrics
        self._kept = kept

    @property
    def trains(self) -> bool:
        return True

    def flush(self) -> None:
        """Weights are the same everywhere already; a state that ranks hold in parts comes to the first rank."""
        self._flush()

    def tell(self, loss: float, samples: float = 1.0) -> None:
        """Every rank counts the same at every step."""

    def outer_weights(self) -> dict[str, T]:
        return self._read()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        yield

    def metrics(self) -> dict[str, float]:
        return self._metrics()

    def state_dict(self) -> dict[str, Any]:
        return {} if self._kept is None else self._kept.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._kept is not None:
            self._kept.load_state_dict(state)
        elif state:
            plan = (state.get("plan") or {}).get("plan", "it was saved with")
            raise StateError(
                "This state belongs to another plan, and this optimizer keeps nothing between steps. Load it into an "
                f"optimizer with the plan {plan}, or leave it out and load the outer weights."
            )
