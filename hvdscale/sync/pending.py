"""``optimizer.sync`` where the agreement begins with the first step only, as in Keras: variables come with it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

from hvdscale.sync.handle import LocalSync

__all__ = ["PendingSync"]

T = TypeVar("T")


class PendingSync(Generic[T]):
    """The agreement of a plan in which ranks train alone, from before it has begun.

    To have it, to ask it for what this rank knows and to tell it something takes no other rank. ``flush()`` joins the
    ranks that make their first step; the state is asked for, or loaded, on all of them.

    Args:
        trains: whether this rank makes steps.
        read: this rank's weights by name.
        figures: the metrics of a plan that has not begun.
        begin: ``begin(joins)`` begins, and calls ``start``; ``joins``: other ranks may be making their first step.
    """

    def __init__(
        self,
        trains: bool,
        read: Callable[[], dict[str, T]],
        figures: Mapping[str, float],
        begin: Callable[[bool], None],
    ) -> None:
        self._trains, self._read, self._figures, self._begin = trains, read, figures, begin
        self._told: list[tuple[float, float]] = []
        self._begun: LocalSync[T] | None = None

    def start(self, sync: LocalSync[T]) -> None:
        """From now on there is this agreement."""
        self._begun = sync
        for loss, samples in self._told:
            sync.tell(loss, samples)
        self._told.clear()

    def _now(self, joins: bool = False) -> LocalSync[T]:
        if self._begun is None or joins:
            self._begin(joins)
        assert self._begun is not None
        return self._begun

    @property
    def trains(self) -> bool:
        return self._trains

    def flush(self) -> None:
        self._now(joins=True).flush()

    def tell(self, loss: float, samples: float = 1.0) -> None:
        if self._begun is None:
            self._told.append((loss, samples))
        else:
            self._begun.tell(loss, samples)

    def outer_weights(self) -> dict[str, T]:
        return self._read() if self._begun is None else self._begun.outer_weights()

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        if self._begun is None:
            yield
        else:
            with self._begun.evaluating():
                yield

    def metrics(self) -> dict[str, float]:
        return dict(self._figures) if self._begun is None else self._begun.metrics()

    def state_dict(self) -> dict[str, Any]:
        return self._now().state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._now().load_state_dict(state)
