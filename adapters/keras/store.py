"""A Keras model and its optimizer as rounds see them: float32 vectors in, float32 vectors out.

Variables are read and written as they are, or, inside a graph, through arrays that the graph has handed out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

from hvdscale.errors import PlanError
from hvdscale.keras.first_state import FirstState
from hvdscale.keras.replicas import path_of
from hvdscale.sync.tensors import Role, Tensors, TensorSpec

__all__ = ["KerasStore", "check_reset", "embedding_tables", "outer_names", "slots_of", "spec_of"]


class VariableList:
    """Keras variables, at ``places`` among those of the store."""

    def __init__(self, store: KerasStore, specs: Sequence[TensorSpec], places: Sequence[int]) -> None:
        self.specs = specs
        self._store = store
        self._places = places

    def read(self, positions: Sequence[int], out: np.ndarray) -> None:
        start = 0
        for position in positions:
            stop = start + self.specs[position].size
            out[start:stop] = np.asarray(self._store.get(self._places[position]), np.float32).ravel()
            start = stop

    def write(self, positions: Sequence[int], values: np.ndarray) -> None:
        start = 0
        for position in positions:
            stop = start + self.specs[position].size
            self._store.set(self._places[position], values[start:stop].reshape(self.specs[position].shape))
            start = stop

    def view(self, position: int, writes: bool = False) -> np.ndarray | None:
        return None

    def keep(self) -> Callable[[], None]:
        kept = [(place, np.array(self._store.get(place))) for place in self._places]

        def put_back() -> None:
            for place, values in kept:
                self._store.set(place, values)

        return put_back


class KerasStore:
    """What rounds touch of a Keras model.

    Args:
        optimizer: built; holds the moments and the learning rate.
        variables: those it trains.
        model: for its running statistics, and to know embeddings; without it no buffer is averaged.
        with_moments: whether rounds touch the moments.
    """

    def __init__(self, optimizer: Any, variables: Sequence[Any], model: Any, with_moments: bool) -> None:
        layers = layers_of(model)
        embeddings = embedding_tables(model)
        self._optimizer = optimizer
        self.variables: list[Any] = []
        self._staged: list[np.ndarray] | None = None
        self.first_state = FirstState(optimizer)
        self._spoilt = False
        self._lr = 0.0
        self.weights: Tensors = self._list([(v, "embedding" if id(v) in embeddings else "weight") for v in variables])
        self.buffers: Tensors = self._list([pair for layer in layers for pair in _statistics(layer)])
        self._moments = self._list_of_moments(variables) if with_moments else []

    def get(self, place: int) -> Any:
        """The value of ``variables[place]``, as an array."""
        if self._staged is not None:
            return self._staged[place]
        return keras.ops.convert_to_numpy(self.variables[place])

    def set(self, place: int, value: np.ndarray) -> None:
        if self._staged is not None:
            self._staged[place] = value.astype(self._staged[place].dtype)
        else:
            self.variables[place].assign(value)

    def stage(self, lr: float, arrays: Sequence[np.ndarray]) -> None:
        """From now on work on ``arrays``, the values of ``variables``."""
        self._lr, self._staged = float(lr), list(arrays)

    def unstage(self) -> list[np.ndarray]:
        """The arrays as they are now; from now on work on the variables again."""
        arrays, self._staged = self._staged or [], None
        return arrays

    def moments(self, positions: Sequence[int]) -> Tensors:
        return VariableList(
            self,
            [self._moment_specs[i] for position in positions for i in self._moments[position]],
            [self._moment_places[i] for position in positions for i in self._moments[position]],
        )

    def forget_moments(self, positions: Sequence[int]) -> None:
        moments = self.moments(positions)
        moments.write(range(len(moments.specs)), np.zeros(sum(spec.size for spec in moments.specs), np.float32))

    def begin_anew(self) -> None:
        if self._staged is None:
            self.first_state.take(self.first_state.values())
        else:
            self._spoilt = True  # the graph has the variables: it asks afterwards

    def spoilt(self) -> bool:
        """Whether the optimizer must still begin anew; asked once."""
        spoilt, self._spoilt = self._spoilt, False
        return spoilt

    def lr(self) -> float:
        if self._staged is not None:
            return self._lr
        return float(keras.ops.convert_to_numpy(self._optimizer.learning_rate))

    def _list(self, entries: Sequence[tuple[Any, Role]]) -> VariableList:
        specs, places = self._register(entries)
        return VariableList(self, specs, places)

    def _register(self, entries: Sequence[tuple[Any, Role]]) -> tuple[list[TensorSpec], list[int]]:
        start = len(self.variables)
        self.variables += [variable for variable, _ in entries]
        names = outer_names([v for v, _ in entries])
        specs = [spec_of(name, v, role) for name, (v, role) in zip(names, entries, strict=True)]
        return specs, list(range(start, len(self.variables)))

    def _list_of_moments(self, variables: Sequence[Any]) -> list[list[int]]:
        """Which moments belong to each variable."""
        slots = [slot for name, slot in slots_of(self._optimizer).items() if name != "_accumulated_gradients"]
        places = {id(v): i for i, v in enumerate(self._optimizer._trainable_variables)}
        moments: list[Any] = []
        owned = []
        for variable in variables:
            at = places[id(variable)]
            owned.append(list(range(len(moments), len(moments) + len(slots))))
            moments += [(slot[at], "moment") for slot in slots]
        self._moment_specs, self._moment_places = self._register(moments)
        return owned


def spec_of(name: str, variable: Any, role: Role) -> TensorSpec:
    """What a round is told of ``variable``."""
    return TensorSpec(name, tuple(variable.shape), keras.backend.standardize_dtype(variable.dtype), role)


def layers_of(model: Any) -> list[Any]:
    """Every layer of the model, nested ones too; none of no model."""
    return [] if model is None else list(model._flatten_layers())


def embedding_tables(model: Any) -> set[int]:
    """The ``id`` of the model's embedding variables."""
    return {id(layer.embeddings) for layer in layers_of(model) if isinstance(layer, keras.layers.Embedding)}


def outer_names(variables: Sequence[Any]) -> list[str]:
    """Names that a model has again when it is built or loaded anew.

    Keras tells layers apart by counters that depend on what was built before; here the second of a name gets .1. And
    it begins with the model's name in a model that was called, not in one that was loaded; here what all begin with
    is left out, as far as layer and variable remain.
    """
    paths = [path_of(variable).split("/") for variable in variables]
    shortest = min(map(len, paths), default=0)
    shared = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), shortest)
    names = ["/".join(path[min(shared, max(shortest - 2, 0)) :]) for path in paths]
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        unique.append(f"{name}.{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return unique


def _statistics(layer: Any) -> list[tuple[Any, Role]]:
    """The running mean and variance of a batch normalisation that trains."""
    mean, variance = getattr(layer, "moving_mean", None), getattr(layer, "moving_variance", None)
    if mean is None or variance is None or not layer.trainable:
        return []
    return [(mean, "mean"), (variance, "variance")]


def slots_of(optimizer: Any) -> dict[str, list[Any]]:
    """The optimizer's lists by attribute: as many variables as it trains, of their shapes, in their order.

    Its moments, and the sums of ``gradient_accumulation_steps``.
    """
    trained = optimizer._trainable_variables
    shapes = [tuple(v.shape) for v in trained]
    found = {}
    for name, value in sorted(vars(optimizer).items()):
        if name == "_trainable_variables" or not isinstance(value, (list, tuple)) or not value:
            continue
        if all(isinstance(v, keras.Variable) for v in value) and [tuple(v.shape) for v in value] == shapes:
            found[name] = list(value)
    return found


def check_reset(optimizer: Any) -> None:
    """Refuse to forget moments whose bias correction counts the steps of all variables together.

    Raises:
        PlanError: any optimizer but SGD.
    """
    if not isinstance(optimizer, keras.optimizers.SGD):
        raise PlanError(
            f'state="reset" cannot begin {type(optimizer).__name__} anew: Keras corrects its moments by the step count '
            'of the whole optimizer, and empty moments late in training would make huge steps. Use state="average".'
        )
