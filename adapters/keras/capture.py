"""The units of a Keras model: the nodes of its Functional graph, or of the one that its layers make.

A list of layers is strung together on symbolic inputs; so is a model of one's own, whose ``call`` is run on them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import keras
from keras import tree
from keras.src import backend as keras_backend

from hvdscale.errors import PlanError
from hvdscale.keras.nodes import CallNode, Ending, Gather, Place
from hvdscale.keras.program import Program, Unit
from hvdscale.model.pipeline import INPUT

__all__ = ["capture", "from_layers"]

_FUNCTIONAL = keras.src.models.functional.Functional


def from_layers(model: Any, sample: Any) -> Program:
    """The units of a Sequential or Functional model, or a list of layers; Sequential ones inside are taken apart.

    Args:
        sample: a batch of its input, to know shapes by where nothing else says them.

    Raises:
        PlanError: something that is no layer, or whose input nobody knows.
    """
    if isinstance(model, (list, tuple)) and model:
        model = _strung(model, sample)
    graph = _graph_of(model)
    if graph is None:
        what = "has no variables yet: call model.build(shape) first" if _sequential(model) else "is none of these"
        raise PlanError(
            'by="layers" takes a Sequential or Functional model, or a list of layers; this '
            f'{type(model).__name__} {what}. List its layers, with keras.Input(...) before them, or use by="graph".'
        )
    return _program(model, graph, (keras.Sequential,))


def capture(model: Any, sample: Any) -> Program:
    """The units of any model, models inside it taken apart.

    Raises:
        PlanError: ``call`` cannot be run on symbolic inputs: what stopped it, and what to do.
    """
    if not isinstance(model, keras.Model):
        raise PlanError(f'by="graph" takes a keras.Model; this is a {type(model).__name__}. A list goes by="layers".')
    graph = _graph_of(model)
    if graph is None:
        inputs = _inputs_like(
            sample, f"{type(model).__name__} is no Functional model, and is captured on symbolic inputs"
        )
        try:
            with keras.StatelessScope(initialize_variables=False):
                graph = keras.Function(inputs, model.call(inputs))
        except Exception as error:
            raise PlanError(
                f"{type(model).__name__}.call cannot be captured: {type(error).__name__}: {error} Its operations must "
                "be layers and keras.ops, and its control flow must not depend on values of tensors. Move what does "
                'not fit into a layer of its own, which then stays in one piece; or list the layers with by="layers".'
            ) from error
    return _program(model, graph, (keras.Model,))


def _graph_of(model: Any) -> Any:
    """The graph of a Functional model or of a built Sequential one, or ``None``."""
    if isinstance(model, keras.Sequential):
        return getattr(model, "_functional", None)
    return model if isinstance(model, _FUNCTIONAL) and type(model).call is _FUNCTIONAL.call else None


def _sequential(model: Any) -> bool:
    return isinstance(model, keras.Sequential)


def _strung(layers: Sequence[Any], sample: Any) -> keras.Model:
    """The list as a Functional model. Layers that are not built are, without values: each rank makes its own."""
    first, *rest = layers
    if isinstance(first, keras.KerasTensor):
        inputs = first
    elif isinstance(first, keras.layers.InputLayer):
        inputs = first.output
    else:
        inputs, rest = _inputs_like(sample, "A list of layers begins with keras.Input(...)"), list(layers)
    value = inputs
    with keras.StatelessScope(initialize_variables=False):
        for number, layer in enumerate(rest):
            if not callable(layer):
                raise PlanError(f"A layer is a Keras layer or a function of keras.ops; number {number} is {layer!r}.")
            value = layer(value)
        try:
            return keras.Model(inputs, value)
        except ValueError as error:  # two layers of one name, or a function that loses the input
            raise PlanError(f"These layers do not make a model: {error}") from error


def _inputs_like(sample: Any, otherwise: str) -> Any:
    """Symbolic inputs for batches like ``sample``, of any length."""
    if sample is None:
        raise PlanError(f"{otherwise}; or give sample=..., a batch of the model's input.")

    def symbolic(array: Any) -> Any:
        return keras.Input(tuple(array.shape[1:]), dtype=keras.backend.standardize_dtype(array.dtype))

    return tree.map_structure(symbolic, sample)


def _program(model: Any, graph: Any, opened: tuple[type[Any], ...]) -> Program:
    return Program(model, _Walk(graph, opened).units())


@dataclass(frozen=True)
class _Step:
    """A node, and where what it reads lies, by the ``id`` of the symbolic tensor."""

    node: Any
    sources: Mapping[int, Place]


class _Walk:
    """Goes through a graph, and into the models in it that are of a type in ``opened``."""

    def __init__(self, graph: Any, opened: tuple[type[Any], ...]) -> None:
        self._root, self._opened, self._names = graph, opened, set[str]()
        self._steps: list[_Step] = []
        places = {id(tensor): (INPUT, i) for i, tensor in enumerate(graph._inputs)}
        self._through(graph, places)
        self._outputs = [places[id(tensor)] for tensor in graph._outputs]

    def units(self) -> tuple[Unit, ...]:
        """Those that the output depends on: symbolic calls leave masks behind that nobody reads."""
        used = {unit for unit, _ in self._outputs}
        for number in reversed(range(len(self._steps))):
            if number in used:
                used |= {unit for unit, _ in self._steps[number].sources.values()}
        kept = sorted(used - {INPUT})
        numbers = {old: new for new, old in enumerate(kept)} | {INPUT: INPUT}
        units = [self._unit(self._steps[old], numbers) for old in kept]
        outputs = [(numbers[unit], i) for unit, i in self._outputs]
        call = units[-1].call if units else None
        if isinstance(call, CallNode) and call.outputs == 1 and outputs == [(len(units) - 1, 0)]:
            units[-1] = replace(units[-1], call=Ending(call))
        else:
            reads = tuple(dict.fromkeys(unit for unit, _ in outputs))
            units.append(Unit(self._name("output"), reads, Gather(self._root, reads, outputs)))
        return tuple(units)

    def _through(self, graph: Any, places: dict[int, Place]) -> None:
        for depth in sorted(graph._nodes_by_depth, reverse=True):
            for node in graph._nodes_by_depth[depth]:
                if node.is_input:
                    continue
                given = tree.flatten(node.arguments.args)
                inner = self._opens(node, given)
                if inner is None:
                    self._steps.append(_Step(node, {id(tensor): places[id(tensor)] for tensor in node.input_tensors}))
                    places |= {id(tensor): (len(self._steps) - 1, i) for i, tensor in enumerate(node.outputs)}
                else:
                    pairs = zip(inner._inputs, given, strict=True)
                    within = {id(theirs): places[id(ours)] for theirs, ours in pairs}
                    self._through(inner, within)
                    pairs = zip(node.outputs, inner._outputs, strict=True)
                    places |= {id(ours): within[id(theirs)] for ours, theirs in pairs}

    def _opens(self, node: Any, given: Sequence[Any]) -> Any:
        """The graph inside, where it can take the place of the node."""
        if not isinstance(node.operation, self._opened):
            return None
        inner = _graph_of(node.operation)
        named = {name: value for name, value in node.arguments.kwargs.items() if name != "training"}
        masks = named.pop("mask", None)
        if inner is None or len(node.arguments.args) != 1 or any(value is not None for value in named.values()):
            return None
        if isinstance(node.arguments.args[0], Mapping) or len(given) != len(inner._inputs):
            return None
        if masks is not None and any(
            mask is not keras_backend.get_keras_mask(tensor)
            for mask, tensor in zip(tree.flatten(masks), given, strict=True)
        ):
            return None  # others than the tensors bring along
        alike = (t.dtype == i.dtype and len(t.shape) == len(i.shape) for t, i in zip(given, inner._inputs, strict=True))
        return inner if all(alike) else None

    def _unit(self, step: _Step, numbers: Mapping[int, int]) -> Unit:
        sources = {key: (numbers[unit], i) for key, (unit, i) in step.sources.items()}
        reads = tuple(dict.fromkeys(unit for unit, _ in sources.values()))
        arguments, operation = step.node.arguments, step.node.operation
        loose = [v for v in tree.flatten((arguments.args, arguments.kwargs)) if isinstance(v, keras.Variable)]
        holds = ([operation] if isinstance(operation, keras.layers.Layer) else []) + loose
        call = CallNode(self._root, step.node, reads, sources)
        return Unit(self._name(operation.name), reads, call, tuple(holds))

    def _name(self, name: str) -> str:
        while name in self._names:
            name += "#"
        self._names.add(name)
        return name
