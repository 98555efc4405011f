"""The contract suite's network in PyTorch."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

import hvdscale.torch as hvd
from tests.contract.driver import ContractDriver
from tests.contract.oracle import Batch, Weights


class Driver(ContractDriver):
    hvd = hvd

    def __init__(self) -> None:
        self._clipped: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array))

    def numpy(self, tensor: torch.Tensor) -> np.ndarray:
        return tensor.detach().numpy()

    def model(self, weights: Weights) -> nn.Module:
        inputs, hidden = weights[0].shape
        model = nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, 1))
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(value.T))  # torch keeps a layer's weight as (out, in)
        return model

    def parameters(self, model: nn.Module) -> list[torch.Tensor]:
        return list(model.parameters())

    def optimizer(self, kind: str, model: nn.Module) -> torch.optim.Optimizer:
        parameters = model.parameters()
        if kind == "adamw":
            matrices = {"params": [p for p in parameters if p.dim() > 1]}
            vectors = {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0, "lr": 0.02}
            optimizer = torch.optim.AdamW([matrices, vectors], lr=0.01, eps=1e-3, weight_decay=0.1)
            self._clipped.add(optimizer)
            return optimizer
        if kind == "adafactor":
            return torch.optim.Adafactor(parameters, lr=0.01)
        if kind == "adam":
            return torch.optim.Adam(parameters, lr=0.01, eps=1e-7)
        return torch.optim.SGD(parameters, lr=0.1, momentum={"sgd": 0.0, "momentum": 0.9}[kind])

    def distribute(self, optimizer: Any, model: nn.Module, **arguments: Any) -> torch.optim.Optimizer:
        return hvd.DistributedOptimizer(optimizer, model=model, **arguments)

    def train(self, model: nn.Module, optimizer: Any, batches: Sequence[Batch], passes: int = 1) -> None:
        for i, batch in enumerate(batches):
            x, y = (torch.from_numpy(a).float() for a in batch)
            (model(x) - y).square().mean().backward()
            if (i + 1) % passes == 0:
                if optimizer in self._clipped:
                    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    def weights(self, model: nn.Module) -> Weights:
        return [p.detach().double().numpy().T for p in model.parameters()]

    def set_weights(self, model: nn.Module, weights: Weights) -> None:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), weights, strict=True):
                parameter.copy_(torch.from_numpy(value.T))
