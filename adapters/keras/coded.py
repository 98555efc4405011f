"""Gradients on their way in a narrow wire format, under Keras: one message a step, in a graph each time it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from hvdscale.errors import StateError
from hvdscale.keras.backend import verbs
from hvdscale.keras.store import embedding_tables, outer_names, spec_of
from hvdscale.sync import EveryStep
from hvdscale.sync.gradient_mean import GradientMean, metrics_of

__all__ = ["CodedMean"]


class CodedMean:
    """Averages an optimizer's gradients in the wire format of ``plan``.

    Args:
        plan: says the format.
        process_set: the ranks that take part.

    ``model``, if known, has the embeddings, which go as float32.
    """

    model: Any = None

    def __init__(self, plan: EveryStep, process_set: Any) -> None:
        self._plan, self._process_set = plan, process_set
        self._channel: Any = None
        self._means: dict[tuple[int, ...], GradientMean] = {}  # by the ids of the variables that have gradients
        self._variables: list[Any] = []  # so that no id is given away anew
        self._saved: Mapping[str, Any] | None = None  # loaded before the first step

    def average(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """The mean of all ranks' dense ``gradients``, each in its own dtype; ``None`` stays. Collective."""
        present = [i for i, g in enumerate(gradients) if g is not None]
        if not present:
            return list(gradients)
        mean = self._mean([variables[i] for i in present])
        order = [present[p] for p in mean.fragments[0].positions]
        sizes = [math.prod(variables[i].shape) for i in order]  # a graph may not know its gradients' shapes
        flat = ops.concatenate(
            [ops.reshape(ops.cast(gradients[i], "float32"), (n,)) for i, n in zip(order, sizes, strict=True)]
        )

        def exchange(values: np.ndarray) -> np.ndarray:
            return mean.wait(mean.send(0, np.array(values, np.float32)))

        averaged = verbs.exchanged(flat, exchange)
        results, stop = list(gradients), 0
        for i, size in zip(order, sizes, strict=True):
            start, stop = stop, stop + size
            results[i] = ops.cast(ops.reshape(averaged[start:stop], variables[i].shape), gradients[i].dtype)
        return results

    def metrics(self) -> dict[str, float]:
        """``rounds``, ``bytes_sent`` and ``seconds`` waited."""
        return metrics_of(self._means.values())

    def state_dict(self) -> dict[str, Any]:
        if len(self._means) > 1:
            raise StateError(
                f"The optimizer has averaged {len(self._means)} different lists of variables, and a state is of one. "
                "Give it the same variables at every step."
            )
        return next((mean.state_dict() for mean in self._means.values()), dict(self._saved or {}))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self._means:
            self._saved = state  # it is checked where the first step says what is averaged
        for mean in self._means.values():
            mean.load_state_dict(state)

    def _mean(self, variables: Sequence[Any]) -> GradientMean:
        key = tuple(map(id, variables))
        if key not in self._means:
            tables = embedding_tables(self.model)
            specs = [
                spec_of(name, v, "embedding" if id(v) in tables else "weight")
                for name, v in zip(outer_names(variables), variables, strict=True)
            ]
            with verbs.eager():
                if self._channel is None:
                    self._channel = verbs.open_channel(self._process_set)
                mean = GradientMean(self._plan, specs, self._channel)
            if self._saved:
                mean.load_state_dict(self._saved)
                self._saved = None
            self._variables += variables
            self._means[key] = mean
        return self._means[key]
