"""Which layers of a Keras model are split by features, and how: by the user's rules, or by what is known of models.

``rules="auto"`` knows ``MultiHeadAttention``, MLPs (dense layers that follow each other in a Functional or Sequential
model, or have the usual names in a layer of one's own), and the vocabulary's embedding and head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from hvdscale.errors import PlanError
from hvdscale.keras.parallel_layers import split_letters
from hvdscale.model.layout import Split
from hvdscale.model.rules import PAIRS, Rules, match_rules, nothing_found

__all__ = ["Part", "find_parts", "named_layers"]

_SPLITTABLE = (layers.Dense, layers.EinsumDense, layers.Embedding, layers.MultiHeadAttention)
_ELEMENTWISE_LAYERS = (layers.ReLU, layers.LeakyReLU, layers.ELU, layers.Identity, layers.Dropout)
_ELEMENTWISE = {
    "celu", "elu", "exponential", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh", "leaky_relu", "linear", "mish",
    "relu", "relu6", "selu", "sigmoid", "silu", "soft_shrink", "softplus", "softsign", "swish", "tanh", "tanh_shrink",
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """What becomes of one layer.

    Args:
        role: ``"column"``, ``"row"``, ``"vocab"``, ``"heads"`` or ``"dropout"``.
        splits: of its variables, by the attribute that holds them.
        whole_output: of a column: every rank gets all outputs.
        of: of a dropout: the column whose outputs it acts on.
    """

    role: str
    splits: tuple[tuple[str, Split], ...] = ()
    whole_output: bool = True
    of: str = ""


def named_layers(model: Any) -> dict[str, Any]:
    """Every layer inside ``model``, by its path in it; the layers inside attention belong to it."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def walk(layer: Any) -> None:
        for child in layer._layers:
            if id(child) in seen or isinstance(child, layers.InputLayer):
                continue
            seen.add(id(child))
            name = (child.path or child.name).removeprefix(f"{model.name}/")  # a Sequential puts its own name in front
            while name in found:
                name += "#"
            found[name] = child
            if type(child) is not layers.MultiHeadAttention:
                walk(child)

    walk(model)
    return found


def find_parts(model: Any, rules: Rules) -> dict[str, Part]:
    """What becomes of each layer that is split, by its path.

    Raises:
        PlanError: rules that match nothing, or that cannot be carried out.
    """
    every = named_layers(model)
    candidates = {name: layer for name, layer in every.items() if type(layer) in _SPLITTABLE}
    followers = _Followers(model, every)
    if rules == "auto":
        roles = dict(_known(every, candidates, followers))
        if not roles:
            raise nothing_found(list(candidates))
    else:
        roles = dict(match_rules(rules, list(candidates)))
    parts: dict[str, Part] = {}
    for name, role in roles.items():
        layer = candidates[name]
        before_row, between = False, tuple[str, ...]()
        if role == "column":
            follower, between = followers.of(name)
            row_next = roles.get(follower or "") == "row" if followers.knows(name) else _row_beside(name, roles, every)
            before_row = row_next and _elementwise(layer)
        parts[name] = Part(*_splits(name, layer, role), whole_output=not before_row and role == "column")
        if before_row:
            for inside in between:
                parts[inside] = Part("dropout", parts[name].splits[:1], of=name)
    return {name: parts[name] for name in every if name in parts}


def _splits(name: str, layer: Any, role: str) -> tuple[str, tuple[tuple[str, Split], ...]]:
    """The role a layer plays, and how its variables are divided."""
    expected = {layers.Embedding: ("vocab",), layers.MultiHeadAttention: ("heads",)}.get(
        type(layer), ("column", "row", "vocab")
    )
    if role not in expected:
        raise PlanError(
            f"{name} is a {type(layer).__name__}, which can be {' or '.join(map(repr, expected))}; the rule says "
            f"{role!r}."
        )
    _check_plain(name, layer)
    if isinstance(layer, layers.Embedding):
        return "vocab", (("_embeddings", Split(0)),)
    if isinstance(layer, layers.MultiHeadAttention):
        return "heads", ()
    if isinstance(layer, layers.Dense):
        if role == "row":
            return "row", (("_kernel", Split(0)),)
        bias = () if layer.bias is None else (("bias", Split(0)),)
        return role, (("_kernel", Split(1)), *bias)
    return role, einsum_splits(name, layer, role)


def einsum_splits(name: str, layer: Any, role: str) -> tuple[tuple[str, Split], ...]:
    """How the variables of an einsum layer are divided."""
    _, kernel, outputs, column, row = split_letters(layer.equation)
    letter = row if role == "row" else column
    if not letter:
        raise PlanError(f"{name}: no axis of the kernel in {layer.equation!r} is one that {role!r} could split.")
    splits = [("_kernel", Split(kernel.index(letter)))]
    if layer.bias is not None and role != "row" and letter in layer.bias_axes:
        ordered = [axis for axis in outputs if axis in layer.bias_axes]
        # The bias has the axes from its first one to the last of the outputs; those it does not name have length 1.
        first = outputs.index(ordered[0])
        splits.append(("bias", Split(outputs.index(letter) - first)))
    return tuple(splits)


def _check_plain(name: str, layer: Any) -> None:
    for part in (layer, *(getattr(layer, "_layers", []))):
        if getattr(part, "lora_enabled", False) or getattr(part, "quantization_mode", None):
            raise PlanError(f"{name} is quantised or has LoRA weights, which cannot be split. Shard the model before.")
    constraints = [v for v in vars(layer) if v.endswith("_constraint") and getattr(layer, v) is not None]
    if constraints:
        raise PlanError(f"{name} has a {constraints[0]}, which would see a part of the weights. Leave it out.")


def _elementwise(layer: Any) -> bool:
    activation = getattr(layer, "activation", None)
    return activation is None or getattr(activation, "__name__", "") in _ELEMENTWISE


class _Followers:
    """Which dense layer the outputs of another reach through elementwise layers alone, in the graphs of a model."""

    def __init__(self, model: Any, every: Mapping[str, Any]) -> None:
        self._names = {id(layer): name for name, layer in every.items()}
        self._layers = every
        self._next: dict[int, list[Any]] = {}  # by id of a layer: those that take its output
        self._graphed: set[int] = set()
        for part in (model, *every.values()):
            graph = getattr(part, "_functional", part)
            if isinstance(graph, keras.src.models.functional.Functional):
                self._read(graph)

    def _read(self, graph: Any) -> None:
        made: dict[int, Any] = {}
        nodes = [node for depth in graph._nodes_by_depth.values() for node in depth]
        for node in nodes:
            for tensor in node.outputs:
                made[id(tensor)] = node.operation
            self._graphed.add(id(node.operation))
        for node in nodes:
            for tensor in node.input_tensors:
                if id(tensor) in made:
                    self._next.setdefault(id(made[id(tensor)]), []).append(node.operation)
        for tensor in graph.outputs:
            if id(tensor) in made:
                self._next.setdefault(id(made[id(tensor)]), []).append(None)  # also leaves the graph

    def knows(self, name: str) -> bool:
        """Whether the layer is part of a graph."""
        return id(self._layers[name]) in self._graphed

    def of(self, name: str) -> tuple[str | None, tuple[str, ...]]:
        """(the dense layer that follows, if one does; the dropout layers between)."""
        layer, between = self._layers[name], list[str]()
        while True:
            after = self._next.get(id(layer), [])
            if len(after) != 1 or after[0] is None:
                return None, ()
            layer = after[0]
            if type(layer) in (layers.Dense, layers.EinsumDense):
                return self._names.get(id(layer)), tuple(between)
            if type(layer) is layers.Dropout and layer.noise_shape is None:
                between.append(self._names[id(layer)])
            elif not (type(layer) in _ELEMENTWISE_LAYERS or (type(layer) is layers.Activation and _elementwise(layer))):
                return None, ()


def _row_beside(name: str, roles: Mapping[str, str], every: Mapping[str, Any]) -> bool:
    """In a layer of one's own, which has no graph: whether a row layer is an attribute of the same layer."""
    owner = _owner(every[name], every)
    if owner is None:
        return False
    beside = {id(value) for value in _attributes(owner).values()}
    return any(role == "row" and id(every[other]) in beside for other, role in roles.items())


def _owner(layer: Any, every: Mapping[str, Any]) -> Any:
    return next((o for o in every.values() if any(value is layer for value in _attributes(o).values())), None)


def _attributes(layer: Any) -> dict[str, Any]:
    """What a layer holds by name; torch keeps modules apart from the rest."""
    return {**vars(layer), **vars(layer).get("_modules", {})}


def _known(every: Mapping[str, Any], candidates: Mapping[str, Any], followers: _Followers) -> Iterator[tuple[str, str]]:
    taken: set[str] = set()
    dense = {name: layer for name, layer in candidates.items() if type(layer) is layers.Dense}
    for name, layer in candidates.items():
        if type(layer) is layers.MultiHeadAttention:
            yield name, "heads"
    for name, layer in dense.items():
        follower, _ = followers.of(name)
        if (
            follower in dense
            and name not in taken
            and follower not in taken
            and _elementwise(layer)
            and layer.units >= dense[str(follower)].units
        ):
            taken |= {name, str(follower)}
            yield name, "column"
            yield str(follower), "row"
    names = {id(layer): name for name, layer in dense.items()}
    for owner in every.values():
        held = {a: v for a, v in _attributes(owner).items() if id(v) in names and names[id(v)] not in taken}
        for outputs, inputs in PAIRS:
            if inputs in held and all(a in held and _elementwise(held[a]) for a in outputs):
                for a in outputs:
                    yield names[id(held[a])], "column"
                yield names[id(held[inputs])], "row"
                taken |= {names[id(held[a])] for a in (*outputs, inputs)}
                break
    tables = {name: layer for name, layer in candidates.items() if type(layer) is layers.Embedding}
    for name, layer in dense.items():
        shape = (layer.units, layer.kernel.shape[0])
        matching = [table for table, e in tables.items() if (e.input_dim, e.output_dim) == shape]
        if matching and name not in taken:
            yield name, "column"
            yield matching[0], "vocab"
