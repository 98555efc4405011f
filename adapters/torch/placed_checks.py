"""What cannot be placed is refused when the optimizer is wrapped, on every rank alike."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from hvdscale.errors import PlanError
from hvdscale.sync import EveryStep
from hvdscale.torch.runtime import elastic
from hvdscale.update import check_elementwise

__all__ = ["check_placed", "sparse_parameters"]

_ELEMENTWISE = frozenset(
    {"ASGD", "Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"}
)
_WHOLE = {
    "Adafactor": "its second moments are means over rows and columns",
    "CAME": "its second moments are means over rows and columns",
    "LARS": "its rate follows the norm of each tensor",
    "Lamb": "its rate follows the norm of each tensor",
    "LAMB": "its rate follows the norm of each tensor",
    "Muon": "it orthogonalises whole matrices",
    "NovoGrad": "its second moment is one number a tensor",
    "SOAP": "it preconditions whole matrices",
    "Shampoo": "it preconditions whole matrices",
    "SparseAdam": "its gradients are sparse, and slices travel dense",
}


def check_placed(plan: EveryStep, optimizer: Optimizer, model: nn.Module | None, sparse_as_dense: bool) -> None:
    """Raise PlanError where an optimizer's update cannot be made by other ranks than each its own."""
    kind = type(optimizer).__name__
    if elastic():
        raise PlanError(
            f'update="{plan.update}" keeps parts of the optimizer\'s state on single ranks, and in an elastic job '
            'ranks may go. Use update="local", or start without --min-np.'
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PlanError(
            f"{kind} searches along all parameters at once, evaluating its closure as often as it needs; with "
            f'update="{plan.update}" no rank could. Use update="local".'
        )
    if not sparse_as_dense and sparse_parameters(model):
        raise PlanError(
            f'The model has embeddings with sparse=True, and with update="{plan.update}" gradients travel dense. Pass '
            'sparse_as_dense=True, or use update="local".'
        )
    if plan.update == "sharded":
        known = _ELEMENTWISE if type(optimizer).__module__.startswith("torch.optim.") else frozenset()
        check_elementwise(kind, plan.update, known, _WHOLE, lambda tensors, steps: _trial(optimizer, tensors, steps))


def sparse_parameters(model: nn.Module | None) -> frozenset[int] | None:
    """``id`` of the parameters whose gradients are sparse, as far as ``model`` tells."""
    if model is None:
        return None
    return frozenset(
        id(module.weight)
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
    )


def _trial(optimizer: Optimizer, arrays: list[np.ndarray], gradients: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Steps of a twin of ``optimizer``, with its settings and without its parameters, state and hooks."""
    tensors = [torch.from_numpy(array) for array in arrays]
    twin = type(optimizer).__new__(type(optimizer))
    own: dict[str, Any] = {key: value for key, value in vars(optimizer).items() if key != "step"}
    for hooks in [key for key in own if key.endswith("_hooks")]:
        own[hooks] = OrderedDict()
    own["state"] = defaultdict(dict)
    own["param_groups"] = [{**optimizer.param_groups[0], "params": tensors}]
    twin.__dict__.update(own)
    for step in gradients:
        for tensor, gradient in zip(tensors, step, strict=True):
            tensor.grad = torch.from_numpy(gradient)
        twin.step()
    return [tensor.numpy() for tensor in tensors]
