"""What one adapter must be able to do for the contract suite: a handful of verbs, one class per framework.

``drivers/torch.py`` etc. each define ``class Driver(ContractDriver)``; ``HVDSCALE_ADAPTER`` picks it
(``torch``, ``tensorflow`` or ``keras``; for ``keras`` KERAS_BACKEND picks the backend).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from tests.contract.oracle import Batch, Weights


class ContractDriver(ABC):
    """The two-layer network of ``oracle.py`` in one framework, trained through ``hvd.DistributedOptimizer``."""

    hvd: ModuleType

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
    def optimizer(self, kind: str, model: Any) -> Any:
        """``"sgd"``, ``"momentum"`` or ``"adam"`` with the oracle's settings, not yet distributed."""

    @abstractmethod
    def distribute(self, optimizer: Any, model: Any, **arguments: Any) -> Any:
        """``hvd.DistributedOptimizer(optimizer, ...)`` with this framework's usual arguments and ``arguments``."""

    @abstractmethod
    def train(self, model: Any, optimizer: Any, batches: Sequence[Batch], passes: int = 1) -> None:
        """One backward pass per batch; a step every ``passes`` of them."""

    @abstractmethod
    def weights(self, model: Any) -> Weights:
        """The network's weights, in the oracle's order and layout, as float64."""
