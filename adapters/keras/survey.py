"""What each unit of a model costs: parameters, and where there is a sample of its input, time and activations."""

from __future__ import annotations

import time
from typing import Any

import keras
import numpy as np
from keras import tree

from hvdscale.keras.backend import verbs
from hvdscale.keras.lazy import give_value
from hvdscale.keras.program import Program
from hvdscale.model.pipeline import INPUT
from hvdscale.model.survey import Cost, Reading

__all__ = ["measure", "readings"]

_REPEATS = 3


def readings(program: Program) -> list[Reading]:
    """The program's units as the planner reads them; trained variables by their ``id``."""
    return [
        Reading(unit.name, unit.reads, {id(v): _bytes(v) for v in unit.variables if v.trainable})
        for unit in program.units
    ]


def measure(program: Program, sample: Any) -> list[Cost]:
    """Run the model unit by unit: three times the forward pass in seconds, and the bytes of what comes out.

    Variables without values have some meanwhile.

    Args:
        sample: one micro-batch of the model's input.
    """
    values: dict[int, Any] = {INPUT: sample}
    costs = []
    for number, unit in enumerate(program.units):
        missing = [v for v in unit.variables if v._value is None]
        initializers = [v._initializer for v in missing]
        for variable in missing:
            give_value(variable)

        def run(given: dict[str, Any], number: int = number) -> Any:
            inside = {int(node): value for node, value in given.items()}
            program.run([number], inside, None)
            return inside[number]

        graph = verbs.compiled(run)
        given = {str(node): values[node] for node in unit.reads}
        times = []
        for _ in range(1 + _REPEATS):
            start = time.perf_counter()
            values[number] = graph(given)
            times.append(time.perf_counter() - start)
        for variable, initializer in zip(missing, initializers, strict=True):
            variable._value, variable._initializer = None, initializer
        size = sum(_bytes(t) for t in tree.flatten(values[number]) if t is not None)
        costs.append(Cost(3 * min(times[1:]), size, size))
    return costs


def _bytes(tensor: Any) -> int:
    size = np.dtype(keras.backend.standardize_dtype(tensor.dtype)).itemsize
    return int(np.prod(tensor.shape)) * size
