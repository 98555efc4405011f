"""What one adapter must be able to do for the contract suite: a handful of verbs, one class per framework.

``drivers/torch.py`` etc. each define ``class Driver(ContractDriver)``; ``HVDSCALE_ADAPTER`` picks it
(``torch``, ``tensorflow`` or ``keras``; for ``keras`` KERAS_BACKEND picks the backend).
"""

from __future__ import annotations

import itertools
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tests.contract.oracle import Batch, Weights

TRACES = os.environ.get("HVDSCALE_ADAPTER") == "tensorflow" or (
    os.environ.get("HVDSCALE_ADAPTER") == "keras" and os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
)
"""Whether a training traces graphs before its first step, which takes far longer than the steps."""


def crossed(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Rows of a table of promises: every combination of the values of ``axes``.

    Where trainings trace graphs, rows in which every value is there once. How the values go together is decided in the
    core, for all adapters alike, and PyTorch's full table shows it; a row here shows that TensorFlow carries it out.
    """
    if not TRACES:
        return list(itertools.product(*axes))
    return [tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))]


class ContractDriver(ABC):
    """The two-layer network of ``oracle.py`` in one framework, trained through ``hvd.DistributedOptimizer``."""

    hvd: ModuleType
    even_ranks: Any
    """The process set of ranks 0, 2, 4, ...; the world itself when there is one rank."""

    def init(self) -> None:
        """Join the job, with the process set of even ranks."""
        from hvdscale.runtime.launch import read_launch

        size = read_launch().size
        self.even_ranks = self.hvd.ProcessSet(range(0, size, 2)) if size > 1 else self.hvd.global_process_set
        self.hvd.init(process_sets=[self.even_ranks] if size > 1 else None)

    @abstractmethod
    def tensor(self, array: np.ndarray) -> Any:
        """A framework tensor of the same dtype."""

    @abstractmethod
    def numpy(self, tensor: Any) -> np.ndarray:
        """Back to NumPy."""

    @abstractmethod
    def model(self, weights: Weights) -> Any:
        """The network in float32 with these weights."""

    @abstractmethod
    def parameters(self, model: Any) -> list[Any]:
        """The trainable tensors or variables, in the oracle's order."""

    @abstractmethod
    def optimizer(self, kind: str, model: Any) -> Any:
        """Not yet distributed: ``"sgd"``, ``"momentum"`` or ``"adam"`` with the oracle's settings, or ``"adamw"``,
        which has weight decay, not the same for all parameters if the framework can, and clips by the global norm, or
        ``"adafactor"``, which looks at whole tensors.
        """

    @abstractmethod
    def distribute(self, optimizer: Any, model: Any, **arguments: Any) -> Any:
        """``hvd.DistributedOptimizer(optimizer, ...)`` so that training starts from the first rank's weights.

        ``arguments`` are Horovod's: ``op``, ``compression``, ``backward_passes_per_step``,
        ``gradient_predivide_factor``, ``groups``, ``process_set``.
        """

    @abstractmethod
    def train(self, model: Any, optimizer: Any, batches: Sequence[Batch], passes: int = 1) -> None:
        """One backward pass per batch; a step every ``passes`` of them."""

    @abstractmethod
    def weights(self, model: Any) -> Weights:
        """The network's weights, in the oracle's order and layout, as float64."""

    @abstractmethod
    def set_weights(self, model: Any, weights: Weights) -> None:
        """Load the network's weights, as from a checkpoint."""

    def everyones(self, array: np.ndarray) -> np.ndarray:
        """``array`` of all ranks, stacked along a new first axis."""
        # Named: Horovod counts the nameless by what a rank did before, and ranks outside a process set did less.
        gathered = self.hvd.allgather(self.tensor(array.reshape(1, -1)), name="everyones")
        return np.asarray(self.numpy(gathered)).reshape(-1, *array.shape)
