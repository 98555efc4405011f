"""What cannot be placed is refused when the optimizer is wrapped, on every rank alike."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.update import check_elementwise

__all__ = ["check_placed"]

_ELEMENTWISE = frozenset({"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "Ftrl", "Lion", "Nadam", "RMSprop", "SGD"})
_WHOLE = {
    "Adafactor": "its second moments are means over rows and columns",
    "Lamb": "its rate follows the norm of each variable",
    "Muon": "it orthogonalises whole matrices",
    "MultiOptimizer": "it hands whole variables to others",
}


def check_placed(update: str, optimizer: Any) -> None:
    """Raise PlanError where an optimizer's update cannot be made by other ranks than each its own."""
    if verbs.world().launch.elastic:
        raise PlanError(
            f'update="{update}" keeps parts of the optimizer\'s state on single ranks, and in an elastic job ranks may '
            'go. Use update="local", or start without --min-np.'
        )
    kind = type(optimizer).__name__
    if kind == "LossScaleOptimizer":
        raise PlanError(
            f'update="{update}" goes inside of a {kind}, which must see the gradients of all ranks: '
            f"keras.optimizers.{kind}(hvd.DistributedOptimizer(...))."
        )
    if kind == "MultiOptimizer":
        raise PlanError(
            f'update="{update}" places the variables of one optimizer, and {kind} has several. Use "local".'
        )
    if update == "sharded":
        known = _ELEMENTWISE if type(optimizer).__module__.startswith("keras.") else frozenset()
        check_elementwise(kind, update, known, _WHOLE, lambda arrays, steps: _trial(optimizer, arrays, steps))


def _trial(optimizer: Any, arrays: list[np.ndarray], gradients: list[list[np.ndarray]]) -> list[np.ndarray]:
    """Steps of a twin of ``optimizer``, with its settings and variables of its own."""
    settings = {**optimizer.get_config(), "gradient_accumulation_steps": None}
    settings |= dict.fromkeys(("clipnorm", "global_clipnorm"))  # those are looked after
    with verbs.eager():
        twin = type(optimizer).from_config(settings)
        variables = [keras.Variable(array) for array in arrays]
        twin.build(variables)
        for step in gradients:
            twin.apply([keras.ops.convert_to_tensor(g) for g in step], variables)
        return [np.asarray(keras.ops.convert_to_numpy(v)) for v in variables]
