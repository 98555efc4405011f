"""Passes that a loader's own threads draw ahead, each batch counted when training takes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from threading import Lock
from typing import Any, NoReturn, Protocol

from hvdscale.errors import PlanError

__all__ = ["Draws", "Passes", "refuse_overtaken"]


def refuse_overtaken() -> NoReturn:
    """Raises PlanError: an iterator goes on though its loader has been iterated again."""
    raise PlanError(
        "A batch was taken from an iterator whose loader has been iterated again since. Use one iterator of a loader "
        "at a time, and two loaders for two readings."
    )


class Draws(Protocol):
    """What ``Passes`` asks of a feed: ``Feed`` and ``StreamFeed`` are such."""

    @property
    def epoch(self) -> int: ...

    def batches(self) -> Iterator[Any]: ...

    def deliver(self) -> Sized: ...

    def finish(self) -> None: ...


class Passes:
    """A feed between the threads that draw and the one that takes.

    A pass ends with the delivery of its last batch, so a loader need not come back to learn that nothing is left.
    A pass with no batch at all ends when it is drawn. A new pass takes over from one that was left early: that one
    draws no more, and nothing of it counts any longer.
    """

    def __init__(self, feed: Draws) -> None:
        self._feed = feed
        self._lock = Lock()
        self._turn = 0
        self._last: deque[bool] = deque()  # of each batch drawn and not delivered: does the pass end with it?

    @property
    def turn(self) -> int:
        """The number of the latest pass."""
        return self._turn

    def draw(self) -> Iterator[tuple[int, Any]]:
        """The batches with something in them, each with the number of this pass, which ``deliver`` takes."""
        with self._lock:
            self._turn += 1
            turn = self._turn
            self._last.clear()
            batches = (batch for batch in self._feed.batches() if len(batch))
            following = next(batches, None)
            if following is None:
                self._feed.finish()
        while following is not None:
            with self._lock:
                if turn != self._turn:
                    return
                batch, following = following, next(batches, None)
                self._last.append(following is None)
            yield turn, batch

    def deliver(self, turn: int) -> Any:
        """Count the oldest batch drawn as read, and return it.

        Raises:
            PlanError: a later pass has begun since.
        """
        with self._lock:
            if turn != self._turn:
                refuse_overtaken()
            batch: Any = self._feed.deliver()
            while not len(batch):  # an empty batch, which has no data
                batch = self._feed.deliver()
            if self._last.popleft():
                self._feed.finish()
            return batch
