"""Keras layers whose weights are split over a team: Shoeybi et al., arXiv 1909.08053, section 3.

A built layer becomes one of these in place (``split``): it and its variables stay the same objects, so that models,
optimizers and tied weights that refer to them keep working.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops
from keras.src.backend import get_keras_mask, set_keras_mask

from hvdscale.errors import PlanError
from hvdscale.keras.backend import verbs
from hvdscale.model.layout import Split
from hvdscale.runtime.team import Team

__all__ = [
    "ColumnParallelDense",
    "ColumnParallelEinsumDense",
    "HeadParallelAttention",
    "RowParallelDense",
    "RowParallelEinsumDense",
    "TeamDropout",
    "VocabParallelEmbedding",
    "keep_part",
    "parallel_class",
    "sizes_of",
    "split_letters",
]


def sizes_of(split: Split, length: int, parts: int) -> tuple[int, ...]:
    """How many entries of an axis of ``length`` each rank of a team holds."""
    return tuple(sum(b - a for a, b in split.spans(length, parts, part)) for part in range(parts))


def keep_part(variable: Any, whole: np.ndarray, split: Split, team: Team) -> None:
    """Give a Keras variable, which stays the same object, this rank's part of ``whole``."""
    spans = split.spans(whole.shape[split.axis], team.size, team.rank)
    part = np.concatenate([np.take(whole, range(a, b), split.axis) for a, b in spans], split.axis)
    variable._shape = part.shape
    variable._initialize(part)


class ColumnParallelDense(layers.Dense):
    """A dense layer whose outputs are split; ``whole_output`` puts them together again on every rank."""

    team: Team
    sizes: tuple[int, ...]  # outputs of each rank
    whole_output: bool

    def call(self, inputs: Any, training: Any = None) -> Any:
        x = ops.matmul(verbs.enter(inputs, self.team), self.kernel)
        x = x if self.bias is None else ops.add(x, self.bias)
        x = verbs.join(x, self.team, -1, self.sizes) if self.whole_output else x
        return x if self.activation is None else self.activation(x)

    def compute_output_shape(self, input_shape: Any) -> tuple[Any, ...]:
        return (*input_shape[:-1], sum(self.sizes) if self.whole_output else self.sizes[self.team.rank])


class RowParallelDense(layers.Dense):
    """A dense layer whose inputs are split: it takes all of them, or this rank's part. Every rank gets all outputs."""

    team: Team
    sizes: tuple[int, ...]  # inputs of each rank

    def call(self, inputs: Any, training: Any = None) -> Any:
        x = _part(inputs, -1, self)
        x = verbs.leave(ops.matmul(x, self.kernel), self.team)
        x = x if self.bias is None else ops.add(x, self.bias)
        return x if self.activation is None else self.activation(x)


def split_letters(equation: str) -> tuple[str, str, str, str, str]:
    """(inputs, kernel, outputs, first axis of outputs, first axis that is summed) of an einsum over a kernel."""
    left, outputs = equation.replace(" ", "").split("->")
    inputs, kernel = left.split(",")
    inputs, outputs = inputs.replace("...", "."), outputs.replace("...", ".")
    column = next((letter for letter in kernel if letter in outputs and letter not in inputs), "")
    row = next((letter for letter in kernel if letter in inputs and letter not in outputs), "")
    return inputs, kernel, outputs, column, row


def _from_the_end(letters: str, letter: str) -> int:
    return letters.index(letter) - len(letters)


class ColumnParallelEinsumDense(layers.EinsumDense):
    """An einsum layer split along the first axis of its kernel that is one of the outputs."""

    team: Team
    sizes: tuple[int, ...]  # of that axis, of each rank
    whole_output: bool

    def call(self, inputs: Any, training: Any = None) -> Any:
        _, _, outputs, letter, _ = split_letters(self.equation)
        x = ops.einsum(self.equation, verbs.enter(inputs, self.team), self.kernel)
        x = x if self.bias is None else ops.add(x, self.bias)
        x = verbs.join(x, self.team, _from_the_end(outputs, letter), self.sizes) if self.whole_output else x
        return x if self.activation is None else self.activation(x)


class RowParallelEinsumDense(layers.EinsumDense):
    """An einsum layer split along the first axis of its kernel that is summed over."""

    team: Team
    sizes: tuple[int, ...]  # of that axis, of each rank

    def call(self, inputs: Any, training: Any = None) -> Any:
        letters, _, _, _, letter = split_letters(self.equation)
        x = _part(inputs, _from_the_end(letters, letter), self)
        x = verbs.leave(ops.einsum(self.equation, x, self.kernel), self.team)
        x = x if self.bias is None else ops.add(x, self.bias)
        return x if self.activation is None else self.activation(x)


def _part(x: Any, dim: int, layer: Any) -> Any:
    """This rank's part of the inputs, of which all or that part may come."""
    came, sizes, rank = x.shape[dim], layer.sizes, layer.team.rank
    if came == sum(sizes):
        return verbs.part_of(x, layer.team, dim, sizes)
    if came != sizes[rank]:
        raise PlanError(
            f"{layer.name} is split by rows: it takes all {sum(sizes)} features or this rank's {sizes[rank]}; {came} "
            "came."
        )
    return x


class VocabParallelEmbedding(layers.Embedding):
    """An embedding whose rows are split; every rank gets all features of all tokens."""

    team: Team
    sizes: tuple[int, ...]  # rows of each rank

    def call(self, inputs: Any) -> Any:
        start, rows = sum(self.sizes[: self.team.rank]), self.sizes[self.team.rank]
        ids = ops.cast(inputs, "int32")
        local = verbs.after_check(self._check, ids, [ids]) - start
        here = ops.logical_and(local >= 0, local < rows)
        taken = ops.take(self.embeddings, ops.where(here, local, 0), axis=0)
        taken = ops.cast(taken, self.compute_dtype) * ops.cast(ops.expand_dims(here, -1), self.compute_dtype)
        return verbs.leave(taken, self.team)

    def _check(self, ids: np.ndarray) -> np.ndarray:
        wrong = ids[(ids < 0) | (ids >= sum(self.sizes))]
        if wrong.size:
            raise IndexError(f"{self.name}: ids lie in 0..{sum(self.sizes) - 1}; {wrong[0]} came.")
        return np.zeros((), np.int32)


class TeamDropout(layers.Dropout):
    """Dropout between split layers: each rank draws the mask of the whole, which is that of one process."""

    team: Team
    sizes: tuple[int, ...]
    dim: int

    def call(self, inputs: Any, training: bool = False) -> Any:
        if not training or not self.rate:
            return inputs
        shape = list(ops.shape(inputs))
        shape[self.dim] = sum(self.sizes)
        mask = keras.random.dropout(ops.ones(shape, inputs.dtype), self.rate, seed=self.seed_generator)
        edges = np.cumsum(self.sizes)[:-1].tolist()
        return inputs * ops.split(mask, edges, axis=self.dim)[self.team.rank]


class HeadParallelAttention(layers.MultiHeadAttention):
    """Attention of which each rank has its own heads; every rank gets all outputs."""

    team: Team
    sizes: tuple[int, ...]  # heads of each rank

    def call(self, query: Any, value: Any, key: Any = None, **options: Any) -> Any:
        entered: dict[int, Any] = {}  # what comes in once is added up once
        for tensor in (query, value, key):
            if tensor is not None and id(tensor) not in entered:
                mask = get_keras_mask(tensor)
                entered[id(tensor)] = verbs.enter(tensor, self.team)
                set_keras_mask(entered[id(tensor)], mask)
        inside = [None if t is None else entered[id(t)] for t in (query, value, key)]
        result = super().call(*inside, **options)
        if options.get("return_attention_scores"):
            output, scores = result
            return output, verbs.join(scores, self.team, 1, self.sizes)
        return result


def parallel_class(layer: Any, cls: type, team: Team, sizes: Sequence[int], **more: Any) -> None:
    """Make ``layer``, whose variables are parts, one of ``cls``."""
    object.__setattr__(layer, "__class__", cls)
    for name, value in {"team": team, "sizes": tuple(sizes), **more}.items():
        object.__setattr__(layer, name, value)  # past Keras: nothing to track or to save
