"""The state of a Keras optimizer as it was when it was made: to go on from, where its own is not finite any more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from hvdscale.keras.backend import verbs

__all__ = ["FirstState"]

_NOT_STATE = {"_variables", "_trainable_variables", "_iterations", "_learning_rate", "_loss_scale_factor"}


class FirstState:
    """What the same optimizer has, made anew and built on the same variables.

    Its step counter stays: schedules go by it. ``begun``, an integer variable, is the update before which the state was
    last made anew, and from which bias corrections count.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self.variables = [variable for _, variable in _state(self._optimizer)]
        with verbs.eager():
            self.begun = keras.Variable(0, dtype="int32", trainable=False, name="moments_begun")

    def values(self) -> list[np.ndarray]:
        """What ``variables`` hold at first."""
        kind = type(self._optimizer)
        with verbs.eager():
            twin = getattr(kind, "_hvdscale_base", kind).from_config(self._optimizer.get_config())
            twin.build(list(self._optimizer._trainable_variables))
            first = dict(_state(twin))
            # Moving averages of weights take them whole at the very first update alone, which that counter has passed.
            for place, variable in enumerate(self._optimizer._trainable_variables):
                first[f"_model_variables_moving_average.{place}"] = variable
            return [np.array(keras.ops.convert_to_numpy(first[name])) for name, _ in _state(self._optimizer)]

    def take(self, values: Any) -> None:
        """Hold ``values``, arrays or tensors; in a graph, when it runs."""
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)
        self.begun.assign(keras.ops.cast(self._optimizer.iterations, "int32"))

    def resume(self, begun: int) -> None:
        """Take up what an earlier run knew of ``begun``."""
        self.begun.assign(begun)


def _state(optimizer: Any) -> Iterator[tuple[str, Any]]:
    """The optimizer's variables by attribute, and place where there is a list of them; each once."""
    seen = {id(v) for v in optimizer._trainable_variables}
    for name, value in sorted(vars(optimizer).items()):
        if name in _NOT_STATE:
            continue
        for place, variable in enumerate(value if isinstance(value, (list, tuple)) else [value]):
            if isinstance(variable, keras.Variable) and id(variable) not in seen:
                seen.add(id(variable))
                yield f"{name}.{place}", variable
