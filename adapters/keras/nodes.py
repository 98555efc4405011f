"""What the nodes of a Keras graph do when they are run one by one, wherever what they read was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import tree

from hvdscale.keras.program import marked, plain
from hvdscale.model.pipeline import INPUT

__all__ = ["CallNode", "Ending", "Gather", "Place"]

_FUNCTIONAL = keras.src.models.functional.Functional

Place = tuple[int, int]  # a unit, and which of its outputs


class _Picks:
    """Finds tensors among the values of units that are read."""

    def __init__(self, root: Any, reads: tuple[int, ...]) -> None:
        self.root, self._reads = root, reads

    def _picker(self, values: Sequence[Any]) -> Any:
        given = dict(zip(self._reads, values, strict=True))
        if INPUT in given:
            x = given[INPUT]
            inputs = self.root._standardize_inputs(x) if isinstance(self.root, _FUNCTIONAL) else tree.flatten(x)
            given[INPUT] = [(tensor, None) for tensor in inputs]
        return lambda place: plain(given[place[0]][place[1]])


class CallNode(_Picks):
    """A node of the graph."""

    def __init__(self, root: Any, node: Any, reads: tuple[int, ...], sources: Mapping[int, Place]) -> None:
        super().__init__(root, reads)
        self._node, self._sources = node, sources
        self.outputs = len(node.outputs)

    def __call__(self, training: bool, *values: Any) -> list[tuple[Any, Any]]:
        return marked(self.tensors(training, values))

    def tensors(self, training: bool, values: Sequence[Any]) -> list[Any]:
        pick = self._picker(values)
        args, kwargs = self._node.arguments.fill_in({key: pick(place) for key, place in self._sources.items()})
        operation = self._node.operation
        if "training" in getattr(operation, "_call_context_args", ()):
            kwargs["training"] = training
        return list(tree.flatten(operation(*args, **kwargs)))


class Ending:
    """The last node, where it alone gives the model's output."""

    def __init__(self, call: CallNode) -> None:
        self._call = call

    def __call__(self, training: bool, *values: Any) -> Any:
        return _packed(self._call.root, self._call.tensors(training, values))


class Gather(_Picks):
    """The model's outputs, from where they lie."""

    def __init__(self, root: Any, reads: tuple[int, ...], places: Sequence[Place]) -> None:
        super().__init__(root, reads)
        self._places = places

    def __call__(self, training: bool, *values: Any) -> Any:
        pick = self._picker(values)
        return _packed(self.root, [pick(place) for place in self._places])


def _packed(graph: Any, tensors: Sequence[Any]) -> Any:
    return tree.pack_sequence_as(graph._outputs_struct, list(tensors))
