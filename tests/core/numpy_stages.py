"""A pipeline in NumPy: stages of tanh layers in float64, their gradients by hand. What the executor is tested with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hvdscale.model.verbs import Bundle, Spec

Array = np.ndarray[Any, np.dtype[np.float64]]


def weights(stages: int, width: int, tie: bool) -> list[Array]:
    random = np.random.default_rng(5)
    made = [random.normal(size=(width, width)) / np.sqrt(width) for _ in range(stages)]
    if tie:
        made[-1] = made[0].copy()
    return made


class NumpyStages:
    """Stage ``s`` is ``h = tanh((x + skip) @ w[s])``; the last one's loss is the mean of squares of ``h - y``.

    ``skips`` are links beside the chain: the output of one stage is added to the input of a later one.
    """

    def __init__(
        self,
        stages: int,
        own: Sequence[int],
        w: Sequence[Array],
        skips: Sequence[tuple[int, int]],
        x: Sequence[Array],
        y: Sequence[Array],
        tie: bool,
    ) -> None:
        self.stages, self.w, self.skips, self.x, self.y, self.tie = stages, w, skips, x, y, tie
        self.gradient = {stage: np.zeros_like(w[stage]) for stage in own}
        self.losses: dict[int, float] = {}
        self.total = sum(len(piece) for piece in x)
        self.log: list[str] = []
        self._kept: dict[tuple[int, int], tuple[Array, Array]] = {}
        self._inputs: dict[tuple[int, int], Array] = {}
        self._later: dict[tuple[int, int], Array] = {}

    def links_out(self, stage: int) -> list[int]:
        chain = [stage + 1] if stage + 1 < self.stages else []
        return chain + [b for a, b in self.skips if a == stage]

    def links_in(self, stage: int) -> list[int]:
        chain = [stage - 1] if stage else []
        return chain + [a for a, b in self.skips if b == stage]

    def forward(
        self, stage: int, microbatch: int, inputs: Mapping[int, Bundle[Array]], keep: bool
    ) -> Mapping[int, Bundle[Array]]:
        assert sorted(inputs) == sorted(self.links_in(stage))
        assert all(bundle.structure == f"from {source}" for source, bundle in inputs.items())
        total = sum(bundle.tensors[0] for bundle in inputs.values()) if inputs else self.x[microbatch]
        self._inputs[stage, microbatch] = np.array(total)
        h = self._run(stage, microbatch, keep)
        if stage == self.stages - 1:
            self.losses[microbatch] = float(np.square(h - self.y[microbatch]).mean()) * len(h) / self.total
        return {target: Bundle((h, np.arange(3.0)), f"from {stage}") for target in self.links_out(stage)}

    def recompute(self, stage: int, microbatch: int) -> None:
        self.log.append(f"C{microbatch}@{stage}")
        self._run(stage, microbatch, keep=True)

    def _run(self, stage: int, microbatch: int, keep: bool) -> Array:
        total = self._inputs[stage, microbatch]
        h: Array = np.tanh(total @ self.w[stage])
        if keep:
            self._kept[stage, microbatch] = (total, h)
        return h

    def backward(self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[Array]]) -> Mapping[int, Any]:
        given = self.backward_input(stage, microbatch, gradients)
        self.backward_weight(stage, microbatch)
        return given

    def backward_input(
        self, stage: int, microbatch: int, gradients: Mapping[int, Sequence[Array]]
    ) -> Mapping[int, Any]:
        _, h = self._kept[stage, microbatch]
        if stage == self.stages - 1:
            g = 2 * (h - self.y[microbatch]) / h.size * len(h) / self.total
        else:
            assert sorted(gradients) == sorted(self.links_out(stage))
            g = sum(parts[0] for parts in gradients.values())
        before = g * (1 - h * h)
        self._later[stage, microbatch] = before
        return dict.fromkeys(self.links_in(stage), (before @ self.w[stage].T,))

    def backward_weight(self, stage: int, microbatch: int) -> None:
        total, _ = self._kept.pop((stage, microbatch))
        self.gradient[stage] += total.T @ self._later.pop((stage, microbatch))

    def tied_gradient(self, number: int) -> Array:
        (held,) = self.gradient.keys() & {0, self.stages - 1}
        return self.gradient[held]

    def set_tied_gradient(self, number: int, parts: Sequence[Array]) -> None:
        (held,) = self.gradient.keys() & {0, self.stages - 1}
        self.gradient[held] = parts[0] + parts[1]

    def ready(self, stage: int) -> None:
        self.log.append(f"D@{stage}")

    def spec(self, tensor: Array) -> Spec:
        return Spec(tensor.shape, "float64", grad=tensor.ndim > 1)

    def view(self, tensor: Array) -> Any:
        return tensor.reshape(-1).view(np.uint8)

    def empty(self, spec: Spec) -> Array:
        return np.full(spec.shape, np.nan)
