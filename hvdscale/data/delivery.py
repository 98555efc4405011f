"""What all readers of epochs share: where they are, and that a batch counts as read when it is handed out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

from hvdscale.data.batch import Batch
from hvdscale.data.certificate import REMEMBERED_EPOCHS
from hvdscale.data.checks import integer
from hvdscale.errors import StateError

__all__ = ["Delivery"]


class Delivery(ABC):
    """A reader that stands before step ``step`` of epoch ``epoch``.

    ``for batch in reader`` delivers. A loader that fetches ahead takes batches from ``ahead()``, which counts nothing,
    and calls the reader's ``deliver(batch)`` when training gets one.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch, self._step = epoch, 0
        self._sums: dict[int, int] = {}
        self._stream: Iterator[Batch] | None = None

    @property
    def epoch(self) -> int:
        """The epoch of the next batch to deliver."""
        return self._epoch

    @property
    def step(self) -> int:
        """Batches of ``epoch`` delivered by this reader."""
        return self._step

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self.ahead()
        batch = next(self._stream)
        self._count(batch)
        return batch

    @abstractmethod
    def ahead(self, epochs: int | None = None) -> Iterator[Batch]:
        """Batches from the next one to deliver on, not counted as delivered; ``epochs=1``: of this epoch only."""

    @abstractmethod
    def _count(self, batch: Batch) -> None:
        """Count the next batch as read."""

    def _forget(self) -> None:
        """Drop the sum of the epoch that has become too old."""
        self._sums.pop(self._epoch - 1 - REMEMBERED_EPOCHS, None)

    def _summed(self, epoch: int | None) -> int:
        """The number of an epoch to give the sum of; default: the last finished one.

        Raises:
            StateError: it is too long ago.
        """
        epoch = self._epoch - 1 if epoch is None else integer("epoch", epoch, 0)
        if epoch not in self._sums and epoch < self._epoch - REMEMBERED_EPOCHS:
            raise StateError(
                f"Sums are kept for {REMEMBERED_EPOCHS} epochs; epoch {epoch} is before epoch {self._epoch}."
            )
        return epoch
