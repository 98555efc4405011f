"""A Keras model as a list of units, each of which reads the outputs of earlier ones: what stages are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import keras
import numpy as np
from keras.src import backend as keras_backend
from keras.src.backend.common import global_state

from hvdscale.keras.backend import verbs
from hvdscale.keras.replicas import path_of
from hvdscale.model.seeds import seed_of

__all__ = ["Program", "Unit", "marked", "plain"]

_GLOBAL_SEEDS = "global_seed_generator"


@dataclass(frozen=True)
class Unit:
    """One step of a model.

    Args:
        name: in messages and tables.
        reads: the units (``INPUT``: the model's input) whose outputs it takes.
        call: ``call(training, *values) -> value``. What is handed on is a list of (tensor, Keras mask or ``None``);
            the last unit gives the model's output as it is.
        holds: the layers and variables it uses.
    """

    name: str
    reads: tuple[int, ...]
    call: Callable[..., Any]
    holds: tuple[Any, ...] = ()

    @cached_property
    def variables(self) -> list[Any]:
        """Its weights, trained or not, each once."""
        found = [v for it in self.holds for v in (it.weights if isinstance(it, keras.layers.Layer) else [it])]
        return list({id(v): v for v in found}.values())

    @cached_property
    def layers(self) -> list[Any]:
        """With those inside them."""
        tops = [it for it in self.holds if isinstance(it, keras.layers.Layer)]
        return list({id(layer): layer for top in tops for layer in top._flatten_layers()}.values())

    @property
    def generators(self) -> list[Any]:
        """What random numbers are drawn from here, in a fixed order."""
        return list({id(g): g for layer in self.layers for g in layer._seed_generators}.values())


@dataclass(frozen=True)
class Program:
    """Units in the order in which they run; the last one gives the model's output.

    Args:
        model: the whole model: its weights have the names and the order of the unsharded one.
    """

    model: Any
    units: tuple[Unit, ...]
    _complaints: list[str] = field(default_factory=list)

    @property
    def complaint(self) -> str:
        """Told to all ranks after the step: one that raised in the middle of it would keep them waiting."""
        return self._complaints[0] if self._complaints else ""

    def seeds(self, nodes: Sequence[int], place: tuple[int, ...]) -> np.ndarray:
        """int32[n]: for each unit one for what is drawn outside generators, and one for each generator."""
        counts = [(node, 1 + len(self.units[node].generators)) for node in nodes]
        return np.array([seed_of(*place, node, i, bits=31) for node, n in counts for i in range(n)], np.int32)

    def run(self, nodes: Sequence[int], values: dict[int, Any], seeds: Any) -> None:
        """Add the outputs of units ``nodes`` to ``values``."""
        drawn = None if seeds is None else iter([seeds[i] for i in range(int(seeds.shape[0]))])
        with _own_seeds():
            for node in nodes:
                unit = self.units[node]
                if drawn is not None:
                    _reseed(next(drawn), [next(drawn) for _ in unit.generators], unit.generators)
                values[node] = unit.call(seeds is not None, *(values[source] for source in unit.reads))
                self._check(unit)

    def buffers(self, nodes: Sequence[int]) -> list[Any]:
        """What is not trained of these units: running statistics."""
        found = {id(v): v.value for node in nodes for v in self.units[node].variables if not v.trainable}
        return list(found.values())

    def _check(self, unit: Unit) -> None:
        for layer in unit.layers:
            if layer._losses:
                layer._clear_losses()
                self._complaints[:] = self._complaints or [
                    f"{path_of(layer)} adds a loss of its own, which a pipeline does not count. Make it part of "
                    "loss=..., a function of the model's output."
                ]


def marked(outputs: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Tensors with their Keras masks, which get lost where tensors are sent."""
    return [(tensor, keras_backend.get_keras_mask(tensor)) for tensor in outputs]


def plain(value: tuple[Any, Any]) -> Any:
    """The tensor of one such pair, its mask in its place."""
    tensor, mask = value
    if mask is not None:
        keras_backend.set_keras_mask(tensor, mask)
    return tensor


@contextmanager
def _own_seeds() -> Iterator[None]:
    """The script's own random numbers go on afterwards as if nothing had been drawn."""
    generator = keras.src.random.seed_generator.global_seed_generator()
    before = generator.state.value * 1
    try:
        yield
    finally:
        generator.state.assign(before)


def _reseed(own: Any, seeds: Sequence[Any], generators: Sequence[Any]) -> None:
    """Set the state of what a unit may draw from."""
    verbs.draw_from(own)
    states = [global_state.get_global_attribute(_GLOBAL_SEEDS), *generators]
    for generator, seed in zip(states, [own, *seeds], strict=True):
        generator.state.assign(verbs.pair(seed))
